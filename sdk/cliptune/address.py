"""Where the daemon listens, when the user does not say.

In: the environment and the home's `daemon.json`, which a running daemon keeps there. Out: "HOST:PORT".
Called by both clients and the command line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"


def find_address(environ: Mapping[str, str] = os.environ) -> str:
    """CLIPTUNE_ADDRESS; else the daemon of CLIPTUNE_HOME (~/.cliptune); else 127.0.0.1:50051."""
    named = environ.get("CLIPTUNE_ADDRESS", "").strip()
    if named:
        return named
    home = Path(environ.get("CLIPTUNE_HOME") or "~/.cliptune").expanduser()
    try:
        announced = json.loads((home / "daemon.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no daemon of this home, or one that is just starting
        return DEFAULT_ADDRESS
    address = announced.get("grpc") if isinstance(announced, dict) else None
    return address if isinstance(address, str) and address else DEFAULT_ADDRESS
