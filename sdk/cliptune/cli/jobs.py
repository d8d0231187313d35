"""`cliptune jobs ...`: look at fine-tuning jobs and steer them."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from cliptune.cli.connection import (
    add_address,
    add_json,
    connect,
    mapping,
    moment,
    print_json,
    print_table,
)
from cliptune.cli.follow import follow
from cliptune.cli.verb import Verb
from cliptune.client import Client
from cliptune.evaluation_lines import (
    CLASS_HEAD,
    METRIC_HEAD,
    class_rows,
    general_lines,
    interval_rows,
)
from cliptune.job import CommandReceipt, Job, JobState
from cliptune.lines import plan_lines
from cliptune.progress import progress_numbers
from cliptune.study import TRIAL_HEAD, trial_rows


def _list(client: Client, options: argparse.Namespace) -> int:
    jobs = client.list_jobs(options.state, limit=options.limit)
    if options.json:
        print_json([mapping(job.message) for job in jobs])
    else:
        rows = [(job.id, job.state, _done(job), moment(job.created), job.model or "-") for job in jobs]
        print_table(("ID", "STATE", "STEPS", "CREATED", "MODEL"), rows)
    return 0


def _show(client: Client, options: argparse.Namespace) -> int:
    job = client.get_job(options.job)
    if options.json:
        print_json(mapping(job.message))
        return 0
    print(f"{job.id}  {job.state}" + (f": {job.state_reason}" if job.state_reason else ""))
    if job.error is not None:
        print(f"{type(job.error).__name__}: {job.error.message}")
    print(f"created {moment(job.created)}, started {moment(job.started)}, finished {moment(job.finished)}")
    if job.queue_position:
        print(f"place in the queue: {job.queue_position}")
    if job.plan is not None:
        print("\n".join(plan_lines(job.plan)))
    if job.trials:
        print_table(TRIAL_HEAD, trial_rows(job.trials))
    if job.progress is not None:
        print(progress_numbers(job.progress))
    _print_evaluation(job)
    if job.model:
        print(f"model {job.model}")
    return 0


def _watch(client: Client, options: argparse.Namespace) -> int:
    return follow(client, options.job, after=options.after, as_json=options.json)


def _report(client: Client, options: argparse.Namespace) -> int:
    report = client.job_report(options.job)
    if options.json:
        print_json(dict(report.figures))
    else:
        print(report.save(options.output or f"{options.job}.html"))
    return 0


def _delete(client: Client, options: argparse.Namespace) -> int:
    client.delete_job(options.job)
    return 0


def _command(
    send: Callable[[Client, argparse.Namespace], CommandReceipt],
) -> Callable[[Client, argparse.Namespace], int]:
    def run(client: Client, options: argparse.Namespace) -> int:
        job = send(client, options).job
        if options.json:
            print_json(mapping(job.message))
        else:
            print(f"{job.id}  {job.state}")
        return 0

    return run


def _evaluate(client: Client, options: argparse.Namespace) -> int:
    job = client.evaluate_job(options.job).job
    if options.json:
        print_json(mapping(job.message))
        return 0
    print(f"{job.id}  {job.state}")
    _print_evaluation(job)
    return 0


def _print_evaluation(job: Job) -> None:
    evaluation = job.evaluation
    if evaluation is None:
        return
    print(f"evaluation ({evaluation.occasion}) at step {evaluation.step}, {evaluation.samples} images:")
    print_table(METRIC_HEAD, interval_rows(evaluation))
    if evaluation.classes:
        print_table(CLASS_HEAD, class_rows(evaluation))
    for line in general_lines(evaluation):
        print(line)
    guarded = (evaluation.guard.picture,) if evaluation.guard and evaluation.guard.picture else ()
    for path in (*evaluation.pictures, *guarded):
        print(f"picture /v1/jobs/{job.id}/{path}")


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is not positive")
    return count


def _done(job: Job) -> str:
    if job.progress is None:
        return "-"
    return f"{job.progress.step}/{job.progress.total_steps}"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(
        name: str, summary: str, run: Callable[[Client, argparse.Namespace], int], *, of_job: bool = True
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=summary, description=summary)
        if of_job:
            sub.add_argument("job", help="the job's id")
        add_json(sub)
        add_address(sub)
        sub.set_defaults(action_run=run)
        return sub

    listing = action("list", "list jobs, newest first", _list, of_job=False)
    states = [state.value for state in JobState if state is not JobState.UNKNOWN]
    listing.add_argument(
        "--state", action="append", default=[], type=str.upper, choices=states, help="only jobs in this state"
    )
    listing.add_argument("--limit", type=_count, help="at most so many")
    action("show", "show a job with its plan, progress and metrics", _show)
    watching = action("watch", "follow a job's events, from the first or from any number on", _watch)
    watching.add_argument(
        "--after", type=int, default=0, metavar="NUMBER", help="only events with a greater number"
    )
    report = action("report", "save a finished job's report, a page that is readable on its own", _report)
    report.add_argument("--output", metavar="FILE", help="where to (default: JOB.html)")
    action("pause", "checkpoint and release the device", _command(lambda c, o: c.pause_job(o.job)))
    action("resume", "queue a paused job again", _command(lambda c, o: c.resume_job(o.job)))
    action("cancel", "end a job; its last checkpoint stays", _command(lambda c, o: c.cancel_job(o.job)))
    action("checkpoint", "save a checkpoint now", _command(lambda c, o: c.checkpoint_job(o.job)))
    action("evaluate", "evaluate now and print the metrics", _evaluate)
    rate = action(
        "set-lr",
        "change the peak learning rate of a running job",
        _command(lambda c, o: c.set_learning_rate(o.job, o.learning_rate)),
    )
    rate.add_argument("learning_rate", type=float, help="such as 1e-5")
    giving_way = action(
        "yield",
        "leave the device to inference for a while",
        _command(lambda c, o: c.yield_to_inference(o.job, o.seconds)),
    )
    giving_way.add_argument("seconds", type=float, help="at most 60; 0 ends it")
    action("delete", "remove a job that has ended, with its checkpoints", _delete)


def _run(options: argparse.Namespace) -> int:
    with connect(options) as client:
        status: int = options.action_run(client, options)
        return status


jobs = Verb(
    name="jobs",
    summary="list, show, watch and steer fine-tuning jobs",
    examples=(
        "cliptune jobs list --state RUNNING",
        "cliptune jobs watch cells-7f3a --after 120",
        "cliptune jobs pause cells-7f3a",
        "cliptune jobs set-lr cells-7f3a 1e-5",
        "cliptune jobs yield cells-7f3a 30",
        "cliptune jobs show cells-7f3a --json",
        "cliptune jobs report cells-7f3a --output cells.html",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
