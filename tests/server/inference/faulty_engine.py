"""The real engine on a device that fails when the test says so.

A hook before every module's forward looks for a file beside the socket: "hang" blocks the device for ever,
"fail" makes it raise, as a lost GPU does, and "slow" blocks it until the file is gone.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import torch

from cliptune_server.engine.__main__ import main

FAULTS = Path(sys.argv.pop(1))


def fault(module: torch.nn.Module, arguments: Any) -> None:
    if (FAULTS / "hang").exists():
        (FAULTS / "hang").unlink()
        threading.Event().wait()
    while (FAULTS / "slow").exists():
        threading.Event().wait(0.05)
    if (FAULTS / "fail").exists():
        raise RuntimeError("device-side error")


torch.nn.modules.module.register_module_forward_pre_hook(fault)

if __name__ == "__main__":
    sys.exit(main())
