"""The guard of one run: it measures what the model still knows, and chooses what is published.

Enters: the model, before its first step and after each. Leaves: general results beside the domain's, the
curve between the starting and the trained weights, the model with the weights that count. Called by the loop
and the examiner. Outside of `counted` the model holds the weights that are trained, always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from torch import Tensor

from cliptune_model.clip import Clip
from cliptune_trainer.guard.agreement import AGREEMENT
from cliptune_trainer.guard.curve import Curve, Point, choose
from cliptune_trainer.guard.general import General, Probe
from cliptune_trainer.guard.mean import RunningMean
from cliptune_trainer.guard.start import Pull, StartingWeights, changing, put_in
from cliptune_trainer.job import JobFolder
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.spec import Spec

_MEAN: Final = "guard/mean/"


class Guard:
    """Guards a run.

    Args:
        spec: the job.
        clip: the model, as it is trained: what is frozen is frozen, what is added is there.
        job: keeps the starting weights.
        probe: measures general knowledge; None: nothing is guarded.
        reporter: takes notices.
        resumed: the model is no longer the one that training started from.
    """

    def __init__(
        self,
        spec: Spec,
        clip: Clip,
        job: JobFolder,
        *,
        probe: Probe | None,
        reporter: Reporter,
        resumed: bool,
    ) -> None:
        self._config, self._clip, self._job, self._reporter = spec.guard, clip, job, reporter
        self._probe, self._resumed = probe, resumed
        self._start: StartingWeights | None = None
        self._mean: RunningMean | None = None
        self._pull: Pull | None = None
        self._reference: General | None = None
        self._chosen: dict[str, float] = {}
        self._known: General | None = None  # of the chosen point

    def begin(self) -> None:
        """Keeps the starting weights, or finds them again; before the first step of an attempt.

        Raises:
            OSError, SafetensorError: the disk has no room; call it again.
        """
        if self._probe is None or self._start is not None:
            return
        path = self._job.starting_weights
        self._start = StartingWeights.read(path) if self._resumed else StartingWeights.keep(self._clip, path)
        if self._start is None or self._start.whole().keys() != changing(self._clip).keys():
            told = f"{path.name}, kept when the job began, is gone or damaged: the last weights are published"
            self._reporter.notice("guard-lost", told)
            self._start = self._probe = None
            return
        if self._config.ema_decay:
            self._mean = self._mean or RunningMean(self._clip, self._config.ema_decay)
        if self._config.l2_sp:
            self._pull = self._start.pull(self._clip)

    def step_done(self, step: int, learning_rate: float) -> None:
        """After a step was given to the device; waits for nothing. Counted from 1."""
        if self._pull is not None:
            self._pull(min(1.0, learning_rate * self._config.l2_sp))
        if self._mean is not None:
            self._mean.step_done(step)

    @property
    def measures(self) -> bool:
        """Whether there is a probe."""
        return self._probe is not None

    @contextmanager
    def counted(self) -> Iterator[None]:
        """The model with the weights that count: the chosen point's, before there is one the trained ones' or
        their running mean's. With the trained ones again afterwards."""
        share = self._chosen.get("share")
        if self._start is None or (share is None and self._mean is None):
            yield
            return
        trained = self._trained()
        with put_in(self._clip, trained if share is None else self._start.between(trained, share)):
            yield

    def general(self, step: int, *, resamples: int = 0) -> tuple[General, float] | None:
        """What the model, as it is now, knows in general, and what the starting model knew."""
        if self._probe is None or self._start is None:
            return None
        start = self._remembered()
        known = start if step == 0 else self._known or self._probe.measure(self._clip, resamples=resamples)
        return known, start.value

    def choose(self, measure: Callable[[], float], *, resamples: int = 0) -> Curve | None:
        """Measures the points on the way, and chooses what is published.

        Args:
            measure: main metric of the domain of the model as it is now; NaN: it cannot be told. May raise,
                as the probe may: then nothing was chosen.
            resamples: behind the general interval of the chosen point, which is not measured again.

        Returns:
            None where there is nothing to choose by.
        """
        if self._probe is None or self._start is None:
            return None
        start = self._remembered()
        allowed = self._config.allowed(agreement=start.main_metric == AGREEMENT)
        trained = self._trained()
        points: list[Point] = []
        found: list[General | None] = []
        for share in (0.0, *self._config.points, 1.0):
            with put_in(self._clip, self._start.between(trained, share)):
                domain = measure()
                known = self._probe.measure(self._clip, resamples=resamples) if share > 0 else None
            found.append(known)
            points.append(Point(share=share, domain=domain, general=(known or start).value))
        if any(math.isnan(point.domain) for point in points):
            told = "the domain has no main metric on its validation rows: the trained weights are published"
            self._reporter.notice("guard-idle", told)
            return None
        curve = choose(points, allowed)
        point, self._known = curve.points[curve.chosen], found[curve.chosen]
        self._chosen = {
            "share": point.share,
            "domain_gain": curve.gain(point),
            "general_loss": curve.loss(point),
            "tolerance": curve.tolerance,
            "ema_decay": self._config.ema_decay,
        }
        self._reporter.notice("guard-chose", curve.reason, warning=curve.chosen == 0)
        return curve

    @property
    def record(self) -> Mapping[str, float]:
        """For the manifest of the published model; empty: nothing was chosen."""
        return self._chosen

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """For a checkpoint: JSON values, and tensors on the CPU."""
        mean = {} if self._mean is None else self._mean.state()
        values = {"guarded": self._probe is not None, "guard": self._chosen}
        return values, {_MEAN + name: tensor for name, tensor in mean.items()}

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`; before `begin`."""
        self._chosen = values.get("guard", {})
        mean = {
            name.removeprefix(_MEAN): tensor for name, tensor in tensors.items() if name.startswith(_MEAN)
        }
        if mean and self._config.ema_decay:
            self._mean = RunningMean(self._clip, self._config.ema_decay)
            self._mean.restore(mean)

    def _trained(self) -> dict[str, Tensor]:
        """A copy: what follows changes the model in place."""
        if self._mean is not None:
            return self._mean.weights()
        return {name: tensor.clone() for name, tensor in changing(self._clip).items()}

    def _remembered(self) -> General:
        if self._probe is None or self._start is None:
            raise RuntimeError("nothing is guarded")
        if self._reference is None:
            with put_in(self._clip, self._start.whole()):
                self._reference = self._probe.remember(self._clip)
        return self._reference
