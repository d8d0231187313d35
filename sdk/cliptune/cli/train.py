"""`cliptune train spec.toml`: submit a job and follow it like a local program."""

from __future__ import annotations

import argparse

from cliptune.cli.connection import add_address, add_json, connect, mapping, note, print_json
from cliptune.cli.follow import follow
from cliptune.cli.verb import Verb
from cliptune.lines import plan_lines
from cliptune.spec import load_spec


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", help="TOML, YAML or JSON file with the job's spec")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a field of the spec, such as train.epochs=2; repeat for several",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--validate-only", action="store_true", help="prepare, print the plan, keep nothing")
    how.add_argument("--detach", action="store_true", help="print the job's id and leave")
    add_json(parser, "events (or the job) as JSON lines")
    add_address(parser)


def _run(options: argparse.Namespace) -> int:
    spec = load_spec(options.spec, options.settings)
    with connect(options) as client:
        job = client.create_job(spec, validate_only=options.validate_only)
        if options.validate_only:
            if options.json:
                print_json(mapping(job.message), indent=None)
            elif job.plan is not None:
                print("\n".join(plan_lines(job.plan)))
            if job.error is not None:
                raise job.error
            return 0
        if options.detach:
            if options.json:
                print_json(mapping(job.message), indent=None)
            else:
                print(job.id)
            return 0
        note(f"job {job.id}")
        return follow(client, job.id, as_json=options.json, offer_cancel=True)


train = Verb(
    name="train",
    summary="fine-tune a model: submit a job and follow it",
    examples=(
        "cliptune train spec.toml",
        "cliptune train spec.toml --set train.epochs=2 --set train.learning_rate=1e-4",
        "cliptune train spec.toml --validate-only      # sizes, memory and choices, without training",
        "cliptune train spec.toml --detach             # prints the job's id",
        "",
        "Ctrl-C asks whether to detach (the job goes on) or to cancel it.",
        "exit status: 0 succeeded, 1 failed, 3 cancelled, 130 detached by Ctrl-C",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
