"""A study from its first trial to its last: asks the search, submits jobs, listens, tells the search.

Enters: the job's folder and an inbox. Leaves: an event for each trial's end, and the report; or, told to
leave, nothing that cannot be taken up again. Called by `main`. One thread decides; what trials and the daemon
say reaches it through one queue.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeAlias

from optuna.trial import Trial

from cliptune.errors import CliptuneError, InternalError, InvalidInputError, JobStateError
from cliptune.evaluation import Evaluation
from cliptune.internal.v1 import trainer_pb2
from cliptune.job import JobEvent, JobState, StateChange
from cliptune.v1 import spec_pb2
from cliptune_trainer.job import JobFolder
from cliptune_trainer.reporting.commands import Inbox, command_name
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.spec.tune import TuneConfig, tune_config
from cliptune_trainer.training.hold import Ending
from cliptune_trainer.tuning.report import write_report
from cliptune_trainer.tuning.search import CANCELLED, COMPLETE, FAILED, PRUNED, Search
from cliptune_trainer.tuning.settings import trial_spec
from cliptune_trainer.tuning.space_file import STUDY_FILE, read_space
from cliptune_trainer.tuning.trial import TrialJob

# A study none of whose trials works is not worth more of them.
_MOST_FAILURES: Final = 3


@dataclass(frozen=True, slots=True)
class _Submitted:
    number: int
    job_id: str


@dataclass(frozen=True, slots=True)
class _Happened:
    number: int
    event: JobEvent


@dataclass(frozen=True, slots=True)
class _Refused:
    number: int
    error: CliptuneError


_Item: TypeAlias = _Submitted | _Happened | _Refused | trainer_pb2.Instruction


@dataclass(slots=True)
class _Active:
    """A trial under way."""

    trial: Trial
    job: TrialJob
    settings: dict[str, str]
    began_s: float
    job_id: str = ""
    evaluations: int = 0
    value: float | None = None
    final: bool = field(default=False)
    """`value` is of the trained model."""
    outcome: str = ""
    """As what it was told to end early."""
    error: CliptuneError | None = None


class StudyRun:
    """One attempt of a study. `run` it once."""

    def __init__(self, job: JobFolder, reporter: Reporter, inbox: Inbox) -> None:
        if job.home is None:
            raise InvalidInputError(f"{job.path} is not in a daemon's home, whose jobs a study's trials are")
        self._folder, self._home, self._reporter, self._inbox = job, job.home, reporter, inbox
        self._spec: spec_pb2.JobSpec = job.message()
        self._config: TuneConfig = tune_config(self._spec.tune)
        epochs = job.layers().spec.train.epochs
        self._search = Search(job.study / STUDY_FILE, self._config, read_space(job.study), epochs)
        self._items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._active: dict[int, _Active] = {}
        self._began_s = time.monotonic()
        self._earlier_s = self._search.spent_s
        self._stopping = ""
        """The outcome of the trials that still run when the study stops them."""
        self._errors: list[CliptuneError] = []

    def run(self) -> Ending:
        """Searches to the end, or until told to leave.

        Raises:
            CliptuneError: the first trials all failed, with the error of the first.
        """
        threading.Thread(target=self._listen, name="instructions", daemon=True).start()
        for trial in self._search.under_way():
            self._begin(trial)
        while True:
            while self._may_begin():
                self._begin(self._search.ask())
            if not self._active:
                return self._finish()
            item = self._next()
            if item is None:
                self._stop_trials(CANCELLED, "the budget is spent")
            elif isinstance(item, trainer_pb2.Instruction):
                if ending := self._obey(item):
                    return ending
            else:
                self._take_in(item)

    # --- what is next

    @property
    def _spent_s(self) -> float:
        return self._earlier_s + time.monotonic() - self._began_s

    def _may_begin(self) -> bool:
        if self._stopping or len(self._active) >= self._config.parallel:
            return False
        config, tried = self._config, self._search.tried()
        if config.max_trials is not None and self._search.count >= config.max_trials:
            return False
        if len(self._errors) >= _MOST_FAILURES and self._search.best() is None:
            return False
        if config.budget_s is None:
            return True
        whole = [trial.seconds for trial in tried if trial.outcome == COMPLETE]
        # One that would not come to its end teaches nothing; the first is always tried.
        return not tried or self._spent_s + (sum(whole) / len(whole) if whole else 0.0) <= config.budget_s

    def _next(self) -> _Item | None:
        """What happens next; None when the budget is spent first."""
        if self._config.budget_s is None or self._stopping:
            return self._items.get()
        try:
            return self._items.get(timeout=max(0.0, self._config.budget_s - self._spent_s))
        except queue.Empty:
            return None

    def _listen(self) -> None:
        while True:
            self._items.put(self._inbox.wait())

    # --- trials

    def _begin(self, trial: Trial) -> None:
        number, settings = trial.number, self._search.settings(trial)
        job = TrialJob(
            self._home,
            trial_spec(self._spec, number, settings),
            f"{self._folder.job_id}/trial/{number}",
            on_submitted=lambda job_id: self._items.put(_Submitted(number, job_id)),
            on_event=lambda event: self._items.put(_Happened(number, event)),
            on_refused=lambda error: self._items.put(_Refused(number, error)),
        )
        self._active[number] = _Active(trial=trial, job=job, settings=settings, began_s=time.monotonic())
        told = ", ".join(f"{path} = {value}" for path, value in settings.items())
        self._reporter.milestone(f"trial {number}: {told}")
        job.start()

    def _take_in(self, item: _Submitted | _Happened | _Refused) -> None:
        active = self._active.get(item.number)
        if active is None:
            return
        match item:
            case _Submitted(job_id=job_id):
                active.job_id = job_id
                self._search.remember_job(active.trial, job_id)
            case _Refused(error=error):
                self._end(item.number, active, FAILED, error)
            case _Happened(event=event):
                if isinstance(event.body, Evaluation):
                    self._judge(item.number, active, event)
                elif isinstance(event.body, StateChange) and event.body.state.final:
                    self._end_by_state(item.number, active, event.body)

    def _judge(self, number: int, active: _Active, event: JobEvent) -> None:
        """Takes an evaluation in; a trial that promises nothing is told to end."""
        evaluation = event.body
        if not isinstance(evaluation, Evaluation) or evaluation.occasion in ("before", "requested"):
            return
        metric = self._config.metric or event.message.evaluation.main_metric
        value = evaluation.metrics.get(metric)
        if value is None:
            found = ", ".join(sorted(evaluation.metrics)) or "none"
            active.outcome = FAILED
            active.error = InvalidInputError(f"no evaluation has {metric!r}; it has: {found}")
            active.job.cancel()
            return
        self._search.metric = metric
        active.evaluations += 1
        active.value, active.final = value, evaluation.occasion == "after"
        if active.final or active.outcome:
            return
        if not self._search.worth_going_on(active.trial, active.evaluations, value):
            active.outcome = PRUNED
            active.job.cancel()

    def _end_by_state(self, number: int, active: _Active, change: StateChange) -> None:
        if change.state == JobState.SUCCEEDED and active.final:
            return self._end(number, active, COMPLETE)
        if change.state == JobState.SUCCEEDED and active.error is None:
            nothing = InvalidInputError("the trial measured nothing: a study needs validation rows")
            return self._end(number, active, FAILED, nothing)
        if change.state == JobState.CANCELLED:
            return self._end(number, active, active.outcome or CANCELLED, active.error)
        error = active.error or change.error or InternalError(change.reason or "it gave no reason")
        return self._end(number, active, FAILED, error)

    def _end(self, number: int, active: _Active, outcome: str, error: CliptuneError | None = None) -> None:
        del self._active[number]
        active.job.leave()
        if error is not None:
            self._errors.append(error)
        seconds = time.monotonic() - active.began_s
        best = self._search.tell(active.trial, outcome, active.value, seconds)
        self._search.spent_s = self._spent_s
        self._reporter.trial(
            number,
            active.job_id,
            active.settings,
            outcome=outcome,
            value=active.value,
            best=best,
            error=error,
        )

    def _stop_trials(self, outcome: str, why: str) -> None:
        self._stopping = outcome
        self._reporter.milestone(f"{why}: {len(self._active)} trials that still run are cancelled")
        for active in self._active.values():
            active.outcome = active.outcome or outcome
            active.job.cancel()

    # --- the end

    def _finish(self) -> Ending:
        self._search.spent_s = self._spent_s
        best = self._search.best()
        if best is None:
            if self._errors:
                raise self._errors[0]
            raise InvalidInputError(
                "no trial came to its end within the budget: allow more time, or less epochs"
            )
        for path in write_report(self._folder, self._spec, self._search):
            self._reporter.milestone(f"written: {path}")
        told = ", ".join(f"{path} = {value}" for path, value in best.settings.items())
        self._reporter.milestone(f"the best is trial {best.number} with {best.value:.4g}: {told}")
        return Ending(outcome=trainer_pb2.OUTCOME_SUCCEEDED)

    def _obey(self, instruction: trainer_pb2.Instruction) -> Ending | None:
        """Carries out an instruction; returns the attempt's end if that was asked for."""
        name = command_name(instruction)
        if name == "suspend":
            return self._leave(trainer_pb2.OUTCOME_SUSPENDED)
        done = partial(self._reporter.command_done, instruction.command_id, name)
        if name == "pause":
            for active in self._active.values():
                active.job.pause()
            done()
            return self._leave(trainer_pb2.OUTCOME_PAUSED)
        if name == "cancel":
            for active in self._active.values():
                active.job.cancel()
            while self._active:
                item = self._items.get()
                if not isinstance(item, trainer_pb2.Instruction):
                    self._take_in(item)
            if self._search.best() is not None:
                write_report(self._folder, self._spec, self._search)
            done()
            return Ending(outcome=trainer_pb2.OUTCOME_CANCELLED)
        done(JobStateError(f"a study cannot {name or 'do what was asked'}; its trials can", state="RUNNING"))
        return None

    def _leave(self, outcome: trainer_pb2.Outcome.ValueType) -> Ending:
        """Trials stay with the daemon; the next attempt finds them again."""
        for active in self._active.values():
            active.job.leave()
        self._search.spent_s = self._spent_s
        return Ending(outcome=outcome)


def run_study(job: JobFolder, reporter: Reporter, inbox: Inbox) -> Ending:
    """Runs the study of a job's folder. Raises a `CliptuneError` for one that cannot go on."""
    return StudyRun(job, reporter, inbox).run()
