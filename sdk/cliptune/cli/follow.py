"""Follows a job on the screen: a live bar on a terminal, plain lines or JSON lines otherwise.

Called by `train` and `jobs watch`. Ctrl-C leaves the job alone unless the user says otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

from cliptune.cli.connection import mapping, note, print_json
from cliptune.client import Client
from cliptune.errors import ConflictError
from cliptune.job import JobEvent, JobState
from cliptune.lines import describe
from cliptune.progress import JobDisplay

# Of `train` and `jobs watch`, by the state in which the job ended.
EXIT_STATUS: Final = {JobState.SUCCEEDED: 0, JobState.FAILED: 1, JobState.CANCELLED: 3}
DETACHED: Final = 130


def follow(
    client: Client, job_id: str, *, after: int = 0, as_json: bool = False, offer_cancel: bool = False
) -> int:
    """Shows events until the job ends; the exit status says how it did. Ctrl-C ends the showing.

    `offer_cancel`: on a terminal, the first Ctrl-C asks whether to detach, cancel or go on.
    """
    while True:
        shown = _show(client, job_id, after, as_json)
        if not shown.interrupted:
            return EXIT_STATUS.get(client.get_job(job_id).state, 1)
        after = shown.last_number
        asked = offer_cancel and sys.stdin.isatty() and sys.stderr.isatty()
        answer = _ask(job_id) if asked else "d"
        if answer == "d":
            note(f"detached: the job goes on; cliptune jobs watch {job_id}")
            return DETACHED
        if answer == "c":
            try:
                client.cancel_job(job_id)
            except ConflictError as error:  # it ended in the meantime: how, its events say
                note(error.message)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shown:
    """How far the showing came: to the job's end, or to Ctrl-C."""

    last_number: int
    interrupted: bool


def _show(client: Client, job_id: str, after: int, as_json: bool) -> _Shown:
    display: AbstractContextManager[object]
    show: Callable[[JobEvent], None]
    if as_json:
        display, show = nullcontext(), _json_line
    elif sys.stderr.isatty():
        display = live = JobDisplay()
        show = live.show
    else:
        display, show = nullcontext(), _text_lines
    try:
        with display:
            for event in client.watch_job(job_id, after=after):
                show(event)
                after = event.number
    except KeyboardInterrupt:
        return _Shown(last_number=after, interrupted=True)
    return _Shown(last_number=after, interrupted=False)


def _ask(job_id: str) -> str:
    """What to do with the job: "d", "c" or "" (go on). A second Ctrl-C detaches."""
    try:
        print(f"\njob {job_id} is running: [d]etach, [c]ancel, or Enter to go on? ", end="", file=sys.stderr)
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower()[:1]
    except KeyboardInterrupt:
        return "d"


def _text_lines(event: JobEvent) -> None:
    for line in describe(event):
        print(line, flush=True)


def _json_line(event: JobEvent) -> None:
    print_json(mapping(event.message), indent=None)
