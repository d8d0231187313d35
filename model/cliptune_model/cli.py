"""The verb `cliptune doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Final

from cliptune.cli.verb import Verb

# Choices whose value is a number of bytes.
_BYTES: Final = ("memory_budget",)
_COLOURS: Final = {"ok": "green", "warn": "yellow", "fail": "red"}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N (default: auto)")
    parser.add_argument("--home", type=Path, help="default: $CLIPTUNE_HOME, or ~/.cliptune")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def _run(arguments: argparse.Namespace) -> int:
    from cliptune_model.doctor import Check, Diagnosis

    home = arguments.home or Path(os.environ.get("CLIPTUNE_HOME") or "~/.cliptune")
    diagnosis = Diagnosis(home.expanduser(), arguments.device)
    found: list[Check] = []
    if arguments.json:
        found.extend(diagnosis.checks())
        ok = all(check.status != "fail" for check in found)
        told = {
            "ok": ok,
            "machine": dataclasses.asdict(diagnosis.machine),
            "checks": [dataclasses.asdict(check) for check in found],
            "choices": [dataclasses.asdict(choice) for choice in diagnosis.choices],
        }
        print(json.dumps(told))
        return 0 if ok else 1

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "status", "reason")
    console = Console()
    with console.status("looking ...") as status:
        for check in diagnosis.checks():
            found.append(check)
            status.update(f"{check.name} done ...")
            colour = _COLOURS[check.status]
            table.add_row(check.name, f"[{colour}]{check.status}[/{colour}]", escape(check.reason))
    console.print(table)
    if diagnosis.choices:
        chosen = Table("choice", "value", "reason")
        for choice in diagnosis.choices:
            value = f"{int(choice.value) / 2**30:.1f} GiB" if choice.subject in _BYTES else choice.value
            chosen.add_row(choice.subject, value, escape(choice.reason))
        console.print(chosen)
    failed = [check.name for check in found if check.status == "fail"]
    console.print(f"[red]failed: {', '.join(failed)}[/red]" if failed else "[green]all is well[/green]")
    return 1 if failed else 0


doctor: Final = Verb(
    name="doctor",
    summary="check this machine, prove that it computes rightly, and show what is chosen for it and why",
    examples=("cliptune doctor", "cliptune doctor --device mps", "cliptune doctor --json"),
    add_arguments=_add_arguments,
    run=_run,
    extra="model",
)
