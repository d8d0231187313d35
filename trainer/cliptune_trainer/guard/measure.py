"""What general knowledge is measured by: the user's own data, embedded pictures, or the starting model.

Enters: the spec, and for a run the folders that it may read. Leaves: a `Choice` for the plan, and a `Probe`.
Called by preparation, which so refuses what cannot be read before the job waits for a device, and by `run`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from cliptune.embedded import INSTALL, embedded_probe
from cliptune.errors import WeightsUnavailableError
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.guard.agreement import AgreementProbe
from cliptune_trainer.guard.general import General, Probe
from cliptune_trainer.guard.probe import PairsProbe, read_probe
from cliptune_trainer.spec import Spec
from cliptune_trainer.spec.guard import AGREEMENT, EMBEDDED, ProbeConfig

# Of the embedded pictures, the share that a starting model must name right: a model that knows fewer has too
# little of that knowledge for its loss to tell anything. Chance is a half percent.
_KNOWN: Final = 0.1


def decide_guard(spec: Spec, clip: Clip) -> Choice:
    """Whether and by what a run is guarded. `clip` is the model that training starts from.

    Raises:
        WeightsUnavailableError: the embedded pictures were asked for and are not installed.
        ModelDamagedError: they are not what was released.
    """
    why = (
        "asked for"
        if not spec.guard.on
        else "no model is published"
        if not spec.publishes
        else "random weights know nothing yet"
        if not clip.pretrained
        else ""
    )
    if why:
        return Choice(subject="guard", value="off", reason=why)
    named = _named(spec)
    shard = _shard(spec)
    if named is not None:
        measure = f"general images of {named.data}"
    elif shard is not None:
        measure = "cliptune-mini's general pictures"
        if spec.guard.probe is None:
            else_allowed = spec.guard.allowed(agreement=True)
            measure += f", or {else_allowed:g} of the agreement where the starting model knows few of them"
    elif spec.guard.probe is not None:
        measure = "the agreement with the starting model, as asked for"
    else:
        measure = "the agreement with the starting model, as no general data is named or installed"
    allowed = spec.guard.allowed(agreement=named is None and shard is None)
    return Choice(
        subject="guard",
        value="on",
        reason=f"weights are pretrained: the best point is published that loses no more than {allowed:g} of"
        f" {measure}",
    )


def open_probe(
    spec: Spec,
    roots: DataRoots,
    *,
    examined: bool,
    check: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda told: None,
    cache: Path | None = None,
) -> Probe:
    """The probe of a run that is guarded.

    Args:
        spec: the job.
        roots: folders that it may read.
        examined: preparation has opened the sample's images already.
        check: called between forward passes; may raise.
        tell: told where the starting model knows too little of the embedded pictures.
        cache: folder where an index of shards is kept.

    Raises:
        As `decide_guard` and `read_probe`.
    """
    if (named := _named(spec)) is not None:
        return read_probe(named, roots, spec.evaluation, examined=examined, check=check, cache=cache)
    agreement = AgreementProbe(spec.evaluation.batch_size, check)
    if (shard := _shard(spec)) is None:
        return agreement
    # Its checksum is right: its images need no examination.
    config = ProbeConfig(data=str(shard))
    pictures = read_probe(config, DataRoots([shard.parent]), spec.evaluation, examined=True, check=check)
    return pictures if spec.guard.probe is not None else UsualProbe(pictures, agreement, tell)


class UsualProbe:
    """Asks about the embedded pictures; where the starting model knows too few of them, for its agreement.

    Args:
        pictures: the embedded ones.
        agreement: in their place.
        tell: told why.
    """

    def __init__(self, pictures: PairsProbe, agreement: AgreementProbe, tell: Callable[[str], None]) -> None:
        self._pictures, self._agreement, self._tell = pictures, agreement, tell
        self._counts: Probe = pictures

    def remember(self, clip: Clip) -> General:
        """Measures the starting model, and settles what later ones are measured by."""
        known = self._pictures.remember(clip)
        if known.value >= _KNOWN:
            return known
        self._tell(
            f"the starting model names {known.value:.0%} of cliptune-mini's {known.samples} general pictures"
            f" right, less than {_KNOWN:.0%}: the guard measures the agreement with it instead"
        )
        self._counts = self._agreement
        return self._agreement.remember(clip)

    def measure(self, clip: Clip, *, resamples: int) -> General:
        """By what `remember` has settled."""
        return self._counts.measure(clip, resamples=resamples)


def _named(spec: Spec) -> ProbeConfig | None:
    """The user's own data."""
    probe = spec.guard.probe
    return None if probe is None or probe.data in (EMBEDDED, AGREEMENT) else probe


def _shard(spec: Spec) -> Path | None:
    """The embedded pictures, where they are the measure and installed."""
    probe = spec.guard.probe
    if probe is not None and probe.data != EMBEDDED:
        return None
    shard = embedded_probe()
    if shard is None and probe is not None:
        raise WeightsUnavailableError(f"guard.probe.data = {EMBEDDED!r}: not installed: {INSTALL}")
    return shard
