"""The verb `cliptune doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Final

from cliptune.cli.verb import Verb

_COLOURS: Final = {"ok": "green", "warn": "yellow", "fail": "red"}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N (default: auto)")
    parser.add_argument("--home", type=Path, help="default: $CLIPTUNE_HOME, or ~/.cliptune")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def _run(arguments: argparse.Namespace) -> int:
    from cliptune_model.doctor import Check, diagnose

    home = arguments.home or Path(os.environ.get("CLIPTUNE_HOME") or "~/.cliptune")
    found: list[Check] = []
    if arguments.json:
        found.extend(diagnose(home.expanduser(), arguments.device))
        ok = all(check.status != "fail" for check in found)
        print(json.dumps({"ok": ok, "checks": [dataclasses.asdict(check) for check in found]}))
        return 0 if ok else 1

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "status", "reason")
    console = Console()
    with console.status("looking ...") as status:
        for check in diagnose(home.expanduser(), arguments.device):
            found.append(check)
            status.update(f"{check.name} done ...")
            colour = _COLOURS[check.status]
            table.add_row(check.name, f"[{colour}]{check.status}[/{colour}]", escape(check.reason))
    console.print(table)
    failed = [check.name for check in found if check.status == "fail"]
    console.print(f"[red]failed: {', '.join(failed)}[/red]" if failed else "[green]all is well[/green]")
    return 1 if failed else 0


doctor: Final = Verb(
    name="doctor",
    summary="check this machine: versions, device, home, daemon, and proofs that it computes rightly",
    examples=("cliptune doctor", "cliptune doctor --device mps", "cliptune doctor --json"),
    add_arguments=_add_arguments,
    run=_run,
    extra="model",
)
