"""What keeps the model from forgetting: the spec's `[guard]`, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from cliptune.metric_names import MAIN_METRICS
from cliptune.v1 import spec_pb2
from cliptune_trainer.spec.check import one_of, within, wrong
from cliptune_trainer.spec.data import FORMS, DataConfig

DEFAULT_POINTS: Final = (0.1, 0.2, 0.4, 0.6, 0.8)
# One point of a metric. The agreement with the starting model falls faster than what the model can do:
# docs/forgetting.md has both side by side.
PROBE_TOLERANCE: Final = 0.01
AGREEMENT_TOLERANCE: Final = 0.03
# In place of a data set: the pictures that cliptune-mini brings, or the starting model's own answers.
EMBEDDED: Final = "embedded"
AGREEMENT: Final = "agreement"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """General images with texts, or with labels.

    Attributes:
        data: where they are, or one of the two words above.
        main_metric: empty: by what can be measured.
    """

    data: str
    image_root: str = ""
    image_column: str = "image"
    caption_column: str = "caption"
    label_column: str = ""
    max_images: int = 1000
    main_metric: str = ""

    def __post_init__(self) -> None:
        if not self.data:
            allowed = f"{FORMS}; {EMBEDDED!r}; {AGREEMENT!r}; or no [guard.probe] at all"
            raise wrong("guard.probe.data", "empty", allowed)
        within("guard.probe.max_images", self.max_images, 2, 100_000)
        if self.main_metric:
            one_of("guard.probe.main_metric", self.main_metric, MAIN_METRICS)

    def table(self) -> DataConfig:
        """The same as where a table's columns are, for its reader."""
        return DataConfig(
            train=self.data,
            image_root=self.image_root,
            image_column=self.image_column,
            caption_column=self.caption_column,
            label_column=self.label_column,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What is measured beside the domain, and which weights are published.

    Attributes:
        on: it guards, if the weights are pretrained.
        probe: None: the embedded pictures where they are installed and the starting model knows them, else
            its agreement.
        ema_decay: of the running mean of the weights; 0: none.
        l2_sp: strength of the pull towards the starting weights.
        points: shares of the way from them that are measured, 0 and 1 apart.
        tolerance: general loss that may be paid; None: what is usual for the measure.
    """

    on: bool = True
    probe: ProbeConfig | None = None
    ema_decay: float = 0.0
    l2_sp: float = 0.0
    points: tuple[float, ...] = field(default=DEFAULT_POINTS)
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.ema_decay < 1.0:
            raise wrong("guard.ema_decay", f"{self.ema_decay:g}", "0 up to, but not, 1")
        within("guard.l2_sp", self.l2_sp, 0.0, 1000.0)
        if self.tolerance is not None:
            within("guard.tolerance", self.tolerance, 0.0, 1.0)
        before = 0.0
        for place, point in enumerate(self.points):
            if not before < point < 1.0:
                raise wrong(
                    f"guard.points[{place}]", f"{point:g}", f"above {before:g} and below 1: they rise"
                )
            before = point

    def allowed(self, *, agreement: bool) -> float:
        """General loss that may be paid; `agreement`: with the starting model is the measure."""
        if self.tolerance is not None:
            return self.tolerance
        return AGREEMENT_TOLERANCE if agreement else PROBE_TOLERANCE


def guard_config(guard: spec_pb2.GuardSpec) -> GuardConfig:
    """The typed form of `GuardSpec`; unset fields take their documented defaults. Raises `SpecError`."""
    return GuardConfig(
        on=not guard.off,
        probe=_probe(guard.probe) if guard.HasField("probe") else None,
        ema_decay=guard.ema_decay,
        l2_sp=guard.l2_sp,
        points=tuple(guard.points) or DEFAULT_POINTS,
        tolerance=guard.tolerance if guard.HasField("tolerance") else None,
    )


def _probe(probe: spec_pb2.ProbeSpec) -> ProbeConfig:
    return ProbeConfig(
        data=probe.data,
        image_root=probe.image_root,
        image_column=probe.image_column or "image",
        caption_column=probe.caption_column or "caption",
        label_column=probe.label_column,
        max_images=probe.max_images if probe.HasField("max_images") else 1000,
        main_metric=probe.main_metric,
    )
