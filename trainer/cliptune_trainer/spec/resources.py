"""What the job may use: the spec's `[resources]`, typed and checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from cliptune.v1 import spec_pb2
from cliptune_trainer.spec.check import within, wrong

_DEVICE: Final = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourceConfig:
    """What the job may use."""

    device: str = "auto"
    threads: int | None = None
    memory_gib: float | None = None  # what is free, less a reserve
    price_per_hour: float | None = None  # of the device, for the report

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise wrong("resources.device", repr(self.device), "auto, cpu, mps, cuda, cuda:N")
        if self.threads is not None:
            within("resources.threads", self.threads, 1, 4096)
        if self.memory_gib is not None:
            within("resources.memory_gib", self.memory_gib, 0.125, 65_536)
        if self.price_per_hour is not None:
            within("resources.price_per_hour", self.price_per_hour, 0.0, 1e6)

    @property
    def memory_bytes(self) -> int | None:
        """What the job may use of the device."""
        return None if self.memory_gib is None else int(self.memory_gib * 2**30)


def resources_config(resources: spec_pb2.ResourceSpec) -> ResourceConfig:
    """The typed form of `ResourceSpec`; unset fields take their documented defaults. Raises `SpecError`."""
    return ResourceConfig(
        device=resources.device or "auto",
        threads=resources.threads if resources.HasField("threads") else None,
        memory_gib=resources.memory_gib if resources.HasField("memory_gib") else None,
        price_per_hour=resources.price_per_hour if resources.HasField("price_per_hour") else None,
    )
