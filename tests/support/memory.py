"""Resident memory of a process and of its children, by `ps`, which every system has."""

from __future__ import annotations

import subprocess


def resident_bytes(pid: int) -> dict[int, int]:
    """Of the process `pid` and of its children: process id → bytes."""
    told = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,rss="], check=True, capture_output=True, text=True)
    rows = [tuple(map(int, line.split())) for line in told.stdout.splitlines()]
    return {own: 1024 * kib for own, parent, kib in rows if pid in (own, parent)}
