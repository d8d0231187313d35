"""The state machine: pure, so every case is a table."""

from __future__ import annotations

import itertools

import pytest

from cliptune.errors import InternalError, InvalidInputError, JobStateError
from cliptune.internal.v1 import trainer_pb2
from cliptune.v1 import job_pb2, spec_pb2
from cliptune.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_PAUSED,
    JOB_STATE_PREPARING,
    JOB_STATE_QUEUED,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
    JOB_STATE_UNSPECIFIED,
)
from cliptune_server.training.job import (
    CRASH_NOTICE,
    FINAL_STATES,
    Ending,
    Entry,
    JobRecord,
    State,
    check_command,
    check_transition,
    command_name,
    judge,
)

COMMANDS = ("pause", "resume", "cancel", "checkpoint", "evaluate", "set_learning_rate", "yield_to_inference")


def record(state: State, *, crashes: int = 0, max_retries: int | None = None) -> JobRecord:
    spec = spec_pb2.JobSpec(name="x", resources=spec_pb2.ResourceSpec(max_retries=max_retries))
    return JobRecord(message=job_pb2.Job(id="x", state=state, spec=spec), crashes=crashes)


def ending(outcome: trainer_pb2.Outcome.ValueType | None = None, *, wanted: str = "") -> Ending:
    finished = None if outcome is None else trainer_pb2.Finished(outcome=outcome)
    return Ending(finished=finished, how="killed by SIGKILL", log_end="last words", wanted=wanted)


@pytest.mark.parametrize(
    ("state", "allowed"),
    [
        (JOB_STATE_PREPARING, {"cancel"}),
        (JOB_STATE_QUEUED, {"pause", "cancel"}),
        (
            JOB_STATE_RUNNING,
            {"pause", "cancel", "checkpoint", "evaluate", "set_learning_rate", "yield_to_inference"},
        ),
        (JOB_STATE_PAUSED, {"resume", "cancel"}),
        (JOB_STATE_SUCCEEDED, set()),
        (JOB_STATE_FAILED, set()),
        (JOB_STATE_CANCELLED, set()),
    ],
)
def test_each_state_allows_its_commands_and_refuses_the_others_by_name(
    state: State, allowed: set[str]
) -> None:
    for name in COMMANDS:
        if name in allowed:
            check_command(state, name, holding=False)
        else:
            with pytest.raises(JobStateError) as refused:
                check_command(state, name, holding=False)
            assert refused.value.metadata["state"] == job_pb2.JobState.Name(state)[len("JOB_STATE_") :]


def test_a_trainer_that_waits_for_room_on_the_disk_can_be_paused_for_good() -> None:
    check_command(JOB_STATE_PAUSED, "pause", holding=True)


def test_an_ended_job_changes_no_more() -> None:
    for old, new in itertools.product(FINAL_STATES, job_pb2.JobState.values()):
        with pytest.raises(InternalError):
            check_transition(old, new)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_learning_rate_that_is_no_positive_number_is_refused(rate: float) -> None:
    command = job_pb2.JobCommand(set_learning_rate=job_pb2.SetLearningRateCommand(learning_rate=rate))
    with pytest.raises(InvalidInputError, match="learning rate"):
        command_name(command)


@pytest.mark.parametrize("state", [JOB_STATE_SUCCEEDED, JOB_STATE_FAILED, JOB_STATE_CANCELLED])
def test_a_command_to_a_job_that_has_ended_is_told_so(state: State) -> None:
    name = job_pb2.JobState.Name(state).removeprefix("JOB_STATE_")
    with pytest.raises(JobStateError, match=rf"pause is not possible: the job has ended \({name}\)"):
        check_command(state, "pause", holding=False)


@pytest.mark.parametrize("seconds", [-0.1, 60.5, float("nan"), float("inf")])
def test_a_job_yields_for_a_minute_at_most(seconds: float) -> None:
    command = job_pb2.JobCommand(yield_to_inference=job_pb2.YieldToInferenceCommand(seconds=seconds))
    with pytest.raises(InvalidInputError, match="0 to 60 s"):
        command_name(command)


def test_a_command_without_content_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no command"):
        command_name(job_pb2.JobCommand())


@pytest.mark.parametrize(
    ("outcome", "wanted", "state"),
    [
        (trainer_pb2.OUTCOME_PREPARED, "", JOB_STATE_QUEUED),
        (trainer_pb2.OUTCOME_SUCCEEDED, "", JOB_STATE_SUCCEEDED),
        (trainer_pb2.OUTCOME_SUCCEEDED, "cancel", JOB_STATE_SUCCEEDED),
        (trainer_pb2.OUTCOME_FAILED, "", JOB_STATE_FAILED),
        (trainer_pb2.OUTCOME_CANCELLED, "cancel", JOB_STATE_CANCELLED),
        (trainer_pb2.OUTCOME_PAUSED, "pause", JOB_STATE_PAUSED),
        (trainer_pb2.OUTCOME_PAUSED, "cancel", JOB_STATE_CANCELLED),
        (trainer_pb2.OUTCOME_SUSPENDED, "", JOB_STATE_QUEUED),
        (trainer_pb2.OUTCOME_SUSPENDED, "cancel", JOB_STATE_CANCELLED),
        (None, "", JOB_STATE_QUEUED),
        (None, "cancel", JOB_STATE_CANCELLED),
        (None, "pause", JOB_STATE_PAUSED),
        (None, "suspend", JOB_STATE_QUEUED),
    ],
)
def test_the_state_after_a_run_follows_from_its_last_word(
    outcome: trainer_pb2.Outcome.ValueType | None, wanted: str, state: State
) -> None:
    verdict = judge(record(JOB_STATE_RUNNING), ending(outcome, wanted=wanted))
    assert verdict.state == state
    assert verdict.publish == (state == JOB_STATE_SUCCEEDED)
    assert verdict.crashed == (outcome is None and wanted in ("", "pause"))


@pytest.mark.parametrize(("max_retries", "limit"), [(None, 2), (0, 0), (5, 5)])
def test_crashes_beyond_the_retries_fail_the_job_with_the_end_of_its_log(
    max_retries: int | None, limit: int
) -> None:
    for crashes in range(limit):
        verdict = judge(record(JOB_STATE_RUNNING, crashes=crashes, max_retries=max_retries), ending())
        assert verdict.state == JOB_STATE_QUEUED
    verdict = judge(record(JOB_STATE_RUNNING, crashes=limit, max_retries=max_retries), ending())
    assert verdict.state == JOB_STATE_FAILED
    assert verdict.error is not None
    assert "last words" in verdict.error.message
    assert "SIGKILL" in verdict.reason


def test_a_crashed_preparation_is_run_again_and_then_fails() -> None:
    assert judge(record(JOB_STATE_PREPARING), ending()).state == JOB_STATE_UNSPECIFIED
    assert judge(record(JOB_STATE_PREPARING, crashes=2), ending()).state == JOB_STATE_FAILED


def test_the_ticket_is_the_creation_until_a_resume_moves_the_job_to_the_end() -> None:
    job = JobRecord(message=job_pb2.Job(id="x"))
    job.message.created.FromNanoseconds(100)

    def enter(state: State, at_ns: int) -> None:
        event = job_pb2.JobEvent(state=job_pb2.StateChange(state=state))
        event.time.FromNanoseconds(at_ns)
        job.apply(Entry(event=event))

    enter(JOB_STATE_PREPARING, 100)
    enter(JOB_STATE_QUEUED, 200)
    assert job.ticket_ns == 100
    enter(JOB_STATE_RUNNING, 300)
    enter(JOB_STATE_QUEUED, 400)
    assert job.ticket_ns == 100
    enter(JOB_STATE_PAUSED, 500)
    enter(JOB_STATE_QUEUED, 600)
    assert job.ticket_ns == 600


def test_crashes_are_counted_from_the_events() -> None:
    job = JobRecord(message=job_pb2.Job(id="x"))
    for code in (CRASH_NOTICE, "rows-skipped", CRASH_NOTICE):
        job.apply(Entry(event=job_pb2.JobEvent(notice=job_pb2.Notice(code=code))))
    assert job.crashes == 2
