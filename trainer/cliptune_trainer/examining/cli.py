"""`cliptune eval`: the verb; what it does is in `over_sizes.py`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cliptune.cli.connection import add_address, add_json, connect, note, print_json, print_table
from cliptune.cli.verb import Verb
from cliptune.domains import layered
from cliptune.errors import InvalidInputError
from cliptune.spec import read_mapping, spec_from_mapping, with_paths_from, with_settings
from cliptune.sweep import SWEEP_HEAD, sweep_rows, sweep_summary
from cliptune.v1 import spec_pb2

_EXAMPLE_SIZES = "96,128,160,224,288"


def _sides(text: str) -> list[int]:
    try:
        return [int(side) for side in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of pixels, as {_EXAMPLE_SIZES}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "model",
        help="a published model (NAME, NAME:VERSION, NAME@ALIAS), a folder, hf-hub:ORG/REPO, or a name as in"
        " a spec",
    )
    parser.add_argument(
        "--data", metavar="FILE", help="rows to measure on, as data.train of a spec; all of them"
    )
    parser.add_argument(
        "--spec", metavar="FILE", help="a job's spec: its data (the validation rows), classes and prompts"
    )
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="of the spec, such as data.label_column=label; repeat for several",
    )
    parser.add_argument(
        "--resolutions",
        type=_sides,
        default=[],
        metavar="PIXELS,...",
        help=f"image sizes, such as {_EXAMPLE_SIZES} (default: the model's own)",
    )
    parser.add_argument("--latency-budget-ms", type=float, metavar="MS", help="tell the best size within it")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write resolutions.json and resolutions.png there"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda (default: %(default)s)")
    add_json(parser)
    add_address(parser)


def run(options: argparse.Namespace) -> int:
    """Measures, and prints a table or JSON."""
    message = _spec(options)
    from cliptune_trainer.examining.over_sizes import keep, measure, source_of

    folder = ""
    if source_of(options.model) is None:  # a published one: the daemon knows where it lies
        with connect(options) as client:
            folder = client.get_model(options.model).path
    sweep = measure(message, folder or options.model, device=options.device, on_remark=note)
    if options.output is not None:
        keep(sweep, options.model, options.output)
        note(f"{options.output}: resolutions.json, resolutions.png")
    if options.json:
        print_json(sweep.to_mapping())
        return 0
    print(f"{options.model}: {sweep.main_metric}")
    print_table(SWEEP_HEAD, sweep_rows(sweep))
    print(sweep_summary(sweep))
    return 0


def _spec(options: argparse.Namespace) -> spec_pb2.JobSpec:
    """The spec that says what is measured; its shape is checked."""
    if (options.spec is None) == (options.data is None):
        raise InvalidInputError("give rows with --data, or a job's spec with --spec")
    mapping: dict[str, Any] = {"name": "eval", "data": {"train": options.data}}
    folder = Path.cwd()
    if options.spec is not None:
        mapping, folder = read_mapping(options.spec), Path(options.spec).absolute().parent
    mapping = with_settings(mapping, options.settings)
    mapping.setdefault("name", "eval")
    mapping["model"] = {"name": "any"}  # the model is the argument
    evaluation = mapping.setdefault("evaluation", {})
    if options.resolutions:
        evaluation["resolutions"] = options.resolutions
    if options.latency_budget_ms is not None:
        evaluation["latency_budget_ms"] = options.latency_budget_ms
    spec = with_paths_from(folder, spec_from_mapping(mapping))
    if options.data is not None:  # all rows are measured
        spec.data.validation, spec.data.leakage, spec.data.duplicates = spec.data.train, "notice", "notice"
        spec.data.split_column = ""
    return layered(spec).spec


verb = Verb(
    name="eval",
    summary="measure a model over image sizes: metric, speed, memory, robustness",
    examples=(
        f"cliptune eval cells@prod --spec cells.toml --resolutions {_EXAMPLE_SIZES}",
        "cliptune eval ./export --data cells.csv --set data.label_column=label --resolutions 128,224 \\",
        "    --latency-budget-ms 20 --output sweep",
    ),
    add_arguments=add_arguments,
    run=run,
    extra="trainer",
)
