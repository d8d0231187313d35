"""`cliptune tune spec.toml`: search for better settings, as a study that the daemon runs."""

from __future__ import annotations

import argparse
import re
from typing import Final

from cliptune.cli.connection import add_address, add_json, connect, mapping, note, print_json
from cliptune.cli.follow import follow
from cliptune.cli.verb import Verb
from cliptune.client import Client
from cliptune.errors import InvalidInputError
from cliptune.job import JobState
from cliptune.spec import load_spec
from cliptune.v1 import spec_pb2

_UNITS_S: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")
_RANGE: Final = re.compile(
    r"(?P<low>[^.:,]+(?:\.\d[^.:,]*)?)\.\.(?P<high>[^:,]+)(?P<flags>(?::(?:log|int))*)"
)


def seconds_of(text: str) -> float:
    """ "90", "45s", "10m", "1.5h", "2d" in seconds. `InvalidInputError`."""
    found = _DURATION.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise InvalidInputError(f"{text!r} is no time span above 0, such as 90s, 10m or 1.5h", value=text)
    return float(found[1]) * _UNITS_S[found[2]]


def parameter_of(text: str) -> spec_pb2.TuneParameter:
    """ "PATH=LOW..HIGH[:log][:int]" or "PATH=A,B,...". `InvalidInputError` for another form."""
    path, equals, rest = text.partition("=")
    parameter = spec_pb2.TuneParameter(path=path.strip())
    wrong = InvalidInputError(
        f"the parameter {text!r} does not have the form PATH=LOW..HIGH, PATH=LOW..HIGH:log or PATH=A,B,C",
        value=text,
    )
    if not equals or not parameter.path or not rest.strip():
        raise wrong
    if ".." not in rest:
        parameter.values.extend(value.strip() for value in rest.split(","))
        return parameter
    found = _RANGE.fullmatch(rest.strip())
    if found is None:
        raise wrong
    try:
        parameter.low, parameter.high = float(found["low"]), float(found["high"])
    except ValueError:
        raise wrong from None
    parameter.log, parameter.integer = "log" in found["flags"], "int" in found["flags"]
    return parameter


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", help="TOML, YAML or JSON file with a job's spec")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--budget", metavar="TIME", help="of the wall clock, such as 10m or 2h")
    parser.add_argument("--trials", type=int, metavar="N", help="at most; default 20 without a budget")
    parser.add_argument(
        "--parameter",
        dest="parameters",
        action="append",
        default=[],
        metavar="PATH=LOW..HIGH[:log]",
        help="what varies: a range, or values as loss.name=infonce,sigmoid; default: learning rate, weight"
        " decay and the loss's parameters",
    )
    parser.add_argument("--metric", help="default: evaluation.main_metric")
    parser.add_argument("--minimize", action="store_true", help="a smaller metric is better")
    parser.add_argument("--parallel", type=int, metavar="N", help="trials on the queue at once; default 1")
    parser.add_argument("--seed", type=int, help="of what is drawn; default 0")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--validate-only", action="store_true", help="prepare, print the plan, keep nothing")
    how.add_argument("--detach", action="store_true", help="print the study's id and leave")
    add_json(parser, "events (or the study) as JSON lines")
    add_address(parser)


def study_spec(options: argparse.Namespace) -> spec_pb2.JobSpec:
    """The spec with the search that the arguments ask for, over the file's own. `InvalidInputError`."""
    spec = load_spec(options.spec, options.settings)
    tune = spec.tune
    tune.SetInParent()
    if options.parameters:
        tune.ClearField("parameters")
        tune.parameters.extend(parameter_of(text) for text in options.parameters)
    if options.budget:
        tune.budget_seconds = seconds_of(options.budget)
    if options.trials is not None:
        tune.max_trials = _at_least_one("--trials", options.trials)
    if options.parallel is not None:
        tune.parallel = _at_least_one("--parallel", options.parallel)
    if options.seed is not None:
        if options.seed < 0:
            raise InvalidInputError(f"--seed is {options.seed}; allowed: 0 and more")
        tune.seed = options.seed
    if options.metric:
        tune.metric = options.metric
    tune.minimize = tune.minimize or options.minimize
    return spec


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise InvalidInputError(f"{name} is {value}; allowed: 1 and more")
    return value


def _run(options: argparse.Namespace) -> int:
    spec = study_spec(options)
    with connect(options) as client:
        job = client.create_job(spec, validate_only=options.validate_only)
        if options.json and (options.validate_only or options.detach):
            print_json(mapping(job.message), indent=None)
        elif options.validate_only and job.plan is not None:
            for made in job.plan.decisions:
                if made.subject == "tune":
                    print(f"{made.choice}: {made.reason}")
        elif options.detach:
            print(job.id)
        if job.error is not None:
            raise job.error
        if options.validate_only or options.detach:
            return 0
        note(f"study {job.id}")
        status = follow(client, job.id, as_json=options.json, offer_cancel=True)
        if not options.json:
            _print_best(client, job.id)
        return status


def _print_best(client: Client, job_id: str) -> None:
    job = client.get_job(job_id)
    best = next((trial for trial in reversed(job.trials) if trial.best), None)
    if best is None or best.value is None or job.state != JobState.SUCCEEDED:
        return
    print(f"best: trial {best.number}, {best.value:.4f}")
    for path, value in sorted(best.settings.items()):
        print(f"  --set {path}={value}")


tune = Verb(
    name="tune",
    summary="search for better settings: a study whose trials are jobs",
    examples=(
        "cliptune tune spec.toml --budget 10m",
        "cliptune tune spec.toml --trials 30 --parameter train.learning_rate=1e-6..1e-4:log",
        "cliptune tune spec.toml --parameter loss.name=infonce,multi_positive,sigmoid",
        "cliptune tune spec.toml --budget 2h --detach     # prints the study's id; it needs no client",
        "",
        "The best settings are in the job's folder as study/best.toml, to run with `cliptune train`.",
        "exit status: 0 succeeded, 1 failed, 3 cancelled, 130 detached by Ctrl-C",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
