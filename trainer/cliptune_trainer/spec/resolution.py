"""Sizes of training images: the spec's `[train.resolution]`, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from cliptune.v1 import spec_pb2
from cliptune_trainer.spec.check import one_of, within, wrong

SCHEDULES: Final = ("fixed", "progressive", "multi_scale")
LARGEST_SIDE: Final = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolutionConfig:
    """Sizes of training images. See `spec.proto`."""

    schedule: str = "fixed"
    sizes: tuple[int, ...] = ()  # by schedule, from the model's own
    tail_fraction: float = 0.1
    finish_fraction: float = 0.0
    finish_size: int | None = None
    first_augmentation: float = 0.5
    exact: bool = False

    def __post_init__(self) -> None:
        here = "train.resolution"
        one_of(f"{here}.schedule", self.schedule, SCHEDULES)
        for place, side in enumerate(self.sizes):
            within(f"{here}.sizes[{place}]", side, 1, LARGEST_SIDE)
        if any(low >= high for low, high in pairwise(self.sizes)):
            raise wrong(f"{here}.sizes", f"{list(self.sizes)}", "sizes that rise, each once")
        if self.schedule == "fixed" and len(self.sizes) > 1:
            allowed = "one size; several with schedule = 'progressive' or 'multi_scale'"
            raise wrong(f"{here}.sizes", f"{list(self.sizes)}", allowed)
        if self.schedule != "fixed" and len(self.sizes) == 1:
            raise wrong(f"{here}.sizes", f"{list(self.sizes)}", f"two or more sizes, for {self.schedule!r}")
        within(f"{here}.tail_fraction", self.tail_fraction, 0.0, 1.0)
        within(f"{here}.finish_fraction", self.finish_fraction, 0.0, 1.0)
        within(f"{here}.first_augmentation", self.first_augmentation, 0.0, 1.0)
        if self.finish_size is not None:
            within(f"{here}.finish_size", self.finish_size, 1, LARGEST_SIDE)
            if not self.finish_fraction:
                raise wrong(f"{here}.finish_size", str(self.finish_size), "none without finish_fraction")

    @property
    def plain(self) -> bool:
        """The model's own size throughout."""
        return self.schedule == "fixed" and not self.sizes and not self.finish_fraction


def resolution_config(message: spec_pb2.ResolutionSpec) -> ResolutionConfig:
    """The typed form of `ResolutionSpec`; unset fields take their documented defaults. Raises `SpecError`."""
    has = message.HasField
    return ResolutionConfig(
        schedule=message.schedule or "fixed",
        sizes=tuple(message.sizes),
        tail_fraction=message.tail_fraction if has("tail_fraction") else 0.1,
        finish_fraction=message.finish_fraction,
        finish_size=message.finish_size if has("finish_size") else None,
        first_augmentation=message.first_augmentation if has("first_augmentation") else 0.5,
        exact=message.exact,
    )
