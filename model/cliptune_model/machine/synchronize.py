"""Waiting for a device, by its name."""

from __future__ import annotations

import torch


def synchronize(device: str) -> None:
    """Wait until the device has done all that was asked of it; nothing to wait for on the CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()
