"""The verbs `cliptune doctor` and `cliptune adapters`."""

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


def _add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="what an adapter is, and which base it belongs to")
    show.add_argument("adapter", type=Path, help="its folder")
    merge = actions.add_parser("merge", help="a whole model, with the adapter in its weights")
    merge.add_argument("adapter", type=Path, help="its folder")
    merge.add_argument("into", type=Path, help="a new folder, which plain open_clip loads")
    merge.add_argument(
        "--base", help="where its base is now, as model.name of a spec (default: where it was)"
    )
    merge.add_argument(
        "--pretrained", default="", help="of an architecture: open_clip's tag or a weights file"
    )


def _run_adapters(arguments: argparse.Namespace) -> int:
    from cliptune.errors import ConflictError
    from cliptune_model.adapters import describe_adapter, load_adapted
    from cliptune_model.exported import export_model
    from cliptune_model.manifest import read_manifest
    from cliptune_model.source import ModelSource

    described = describe_adapter(arguments.adapter)
    attached = described.attached
    if arguments.action == "show":
        config = attached.config
        targets = sorted({target for layer in attached.layers for target in layer.wanted(config)})
        print(f"{config.kind} of rank {config.rank} in {len(attached.layers)} layers: {', '.join(targets)}")
        print(f"base: {attached.base.told}")
        return 0
    if arguments.into.exists():
        raise ConflictError(f"{str(arguments.into)!r} is there already: name a new folder")
    base = ModelSource(name=arguments.base, pretrained=arguments.pretrained) if arguments.base else None
    clip = load_adapted(arguments.adapter, base=base)
    export_model(clip, arguments.into, read_manifest(arguments.adapter))
    print(f"{attached.base.told} with the adapter in its weights: {arguments.into}")
    return 0


adapters: Final = Verb(
    name="adapters",
    summary="show an adapter, or put it into the weights of its base",
    examples=(
        "cliptune adapters show ./my-adapter",
        "cliptune adapters merge ./my-adapter ./merged",
        "cliptune adapters merge ./my-adapter ./merged --base local-dir:/models/base",
    ),
    add_arguments=_add_adapter_arguments,
    run=_run_adapters,
    extra="model",
)
