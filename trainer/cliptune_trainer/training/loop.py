"""A run of a job, top to bottom: data → towers → loss → step → events → checkpoint → evaluation → export.

Enters: the job's folder and an inbox. Leaves: events, checkpoints, and a finished model, or a checkpoint to
go on from. Called by `main`. Between two steps the training is a pure function of what a checkpoint holds;
whatever it is told, it does there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Final

import torch

from cliptune.errors import (
    CancelledError,
    CliptuneError,
    DiskFullError,
    InvalidInputError,
)
from cliptune.internal.v1 import trainer_pb2
from cliptune.tracing import tracer
from cliptune_model.clip import Clip
from cliptune_model.proven_sizes import ProvenSize
from cliptune_trainer.data.dataset import Dataset
from cliptune_trainer.data.loading.known import KnownFeatures
from cliptune_trainer.data.loading.loader import Batch, Loader
from cliptune_trainer.data.table import Pair
from cliptune_trainer.guard.general import Probe
from cliptune_trainer.guard.guard import Guard
from cliptune_trainer.job import JobFolder
from cliptune_trainer.losses.entry import BIAS
from cliptune_trainer.losses.temperature import begin
from cliptune_trainer.plan.decide import Decisions
from cliptune_trainer.plan.per_size import Executions
from cliptune_trainer.reporting.commands import Inbox
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.schedule import PeakHistory, Schedule
from cliptune_trainer.spec import Spec, check_learning_rate
from cliptune_trainer.steps.logit_bias import calibrate, needs_calibration
from cliptune_trainer.training.checkpoint import (
    TrainingState,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from cliptune_trainer.training.examiner import Examiner
from cliptune_trainer.training.export import export
from cliptune_trainer.training.hold import Ending, attempt_write, hold
from cliptune_trainer.training.orders import Orders
from cliptune_trainer.training.outcomes import Outcomes, UnderWay
from cliptune_trainer.training.pace import Pace
from cliptune_trainer.training.place import Place
from cliptune_trainer.training.stepper import Stepper

_log = logging.getLogger(__name__)
# Rows that go bad while training are told one by one up to here.
_MAX_ROW_NOTICES: Final = 10
_OPTIMIZER: Final = "optimizer/"


class Training:
    """A job between its first step and its export. `run` it once.

    Args:
        job: the job's folder.
        spec: the job.
        dataset: its rows.
        clip: the model, on its device, with the weights of `state` if there is one.
        decisions: what the spec left open.
        executions: how a step is computed, at each size of images.
        state: the checkpoint to go on from; None: from the first step.
        reporter: takes the events.
        inbox: gives the instructions.
        linked: a daemon may speak through the inbox, so that it is worth waiting for its word.
        teacher: the model as the first step found it, for objectives that need it.
        probe: what the guard measures general knowledge by; None: nothing is guarded.
        known: features of frozen towers.
    """

    def __init__(
        self,
        *,
        job: JobFolder,
        spec: Spec,
        dataset: Dataset,
        clip: Clip,
        decisions: Decisions,
        executions: Executions,
        state: TrainingState | None,
        reporter: Reporter,
        inbox: Inbox,
        linked: bool,
        teacher: Clip | None = None,
        probe: Probe | None = None,
        known: KnownFeatures | None = None,
    ) -> None:
        self._job, self._spec, self._dataset, self._clip = job, spec, dataset, clip
        self._decisions, self._reporter, self._inbox, self._linked = decisions, reporter, inbox, linked
        self._precision, self._sizes = executions.common.precision, decisions.sizes
        self._total_steps = decisions.total_steps
        counters = state.counters if state else {}
        self._place = Place(
            spec,
            total_steps=decisions.total_steps,
            steps_per_epoch=decisions.steps_per_epoch,
            measurable=bool(len(dataset.validation)),
            state=state,
        )
        self._metrics: dict[str, float] = counters.get("metrics", {})
        self._initial_peak = float(counters.get("initial_peak", decisions.learning_rate))
        self._peaks = PeakHistory(job.learning_rates, self._initial_peak)
        self._schedule = Schedule(
            shape=spec.train.schedule,
            total_steps=self._total_steps,
            warmup_fraction=spec.train.warmup_fraction,
        )
        if state is None:
            begin(clip.model, spec.loss)
        self._stepper = Stepper(
            spec,
            clip,
            executions,
            batch_size=decisions.batch_size,
            learning_rate=decisions.learning_rate,
            reporter=reporter,
            teacher=teacher,
        )
        self._guard = Guard(spec, clip, job, probe=probe, reporter=reporter, resumed=state is not None)
        # On CUDA the host is a step ahead of the device, which so never waits for it.
        self._runs_ahead = clip.device.type == "cuda"
        self._under_way: UnderWay | None = None
        self._orders = Orders(inbox, reporter, self)
        self._loader = Loader(
            dataset.train,
            clip,
            augmentation=spec.data.augment,
            sizes=decisions.sizes,
            exact=decisions.exact_decode,
            known=known,
            needs=spec.loss.needs,
            batch_size=decisions.batch_size,
            seed=spec.train.seed,
            workers=decisions.workers,
            max_bad=int(spec.data.max_bad_fraction * len(dataset.train)),
            bad_rows=counters.get("bad_rows", ()),
            on_bad_row=self._on_bad_row,
            on_workers_lost=self._on_workers_lost,
        )
        self._pace = Pace(decisions.batch_size, decisions.sizes)
        self._outcomes = Outcomes(
            reporter,
            self._pace,
            clip.device,
            total_steps=self._total_steps,
            steps_per_epoch=decisions.steps_per_epoch,
            every_steps=spec.train.progress_every_steps,
            counters=counters,
        )
        self._examine = Examiner(
            job=job,
            spec=spec,
            dataset=dataset,
            clip=clip,
            decisions=decisions,
            reporter=reporter,
            guard=self._guard,
            interrupted=lambda: inbox.end_wanted,
        )
        self._examine.proven = tuple(ProvenSize(**entry) for entry in counters.get("proven_sizes", ()))
        self._epoch_span = ExitStack()
        torch.manual_seed(spec.train.seed)
        if state:
            self._restore(state)

    def run(self) -> Ending:
        """Trains to the end, or until told to stop."""
        self._clip.model.train()
        if (error := attempt_write(self._guard.begin)) and (ending := self._hold(error, self._guard.begin)):
            return ending
        with self._loader, self._epoch_span:
            batches = self._loader.batches(self._place.step, self._total_steps)
            while True:
                if self._inbox.waiting or self._place.standstill_due():
                    self.settle()
                if ending := self._orders.obey():
                    return ending
                if (occasion := self._place.evaluation_due()) and not self._evaluate(occasion):
                    continue  # it gave way to an instruction
                if self._place.checkpoint_due() and (ending := self._save_or_hold()):
                    return ending
                if self._place.at_end:
                    break
                self._begin_step()
                self._launch(next(batches))
        if told := self._stepper.told():
            self._reporter.notice("loss-weights", told, warning=False)
        return self._export()

    def _learning_rate(self) -> float:
        return self._peaks.at(self._place.step) * self._schedule.share(self._place.step)

    def _begin_step(self) -> None:
        self._pace.resume()
        if self._place.epoch_begins:
            self._epoch_span.close()
            attributes = {"epoch": self._place.epoch}
            span = tracer().start_as_current_span("train.epoch", attributes=attributes)
            self._epoch_span.enter_context(span)

    def _launch(self, batch: Batch) -> None:
        step, learning_rate = self._place.step, self._learning_rate()
        look = self._sizes.at(step)
        self._stepper.turn_to(look)
        if step == 0 and BIAS in self._spec.loss.needs and needs_calibration(self._clip):
            bias = calibrate(self._clip, batch, self._stepper.micro_batch_size)
            told = f"logit bias {bias:.4g}: the model was trained without one; set from the first batch"
            self._reporter.notice("logit-bias-calibrated", told, warning=False)
        probing = step < self._spec.train.probe_fraction * self._total_steps
        flight = self._stepper.launch(batch, learning_rate, probing=probing)
        self.settle()  # the step before
        self._place.step += 1
        self._guard.step_done(self._place.step, learning_rate)
        self._under_way = UnderWay(
            flight=flight,
            step=self._place.step,
            learning_rate=learning_rate,
            micro_batch_size=self._stepper.micro_batch_size,
            image_size=look.size[0],
        )
        if not self._runs_ahead:
            self.settle()

    def settle(self) -> None:
        """Waits for the step that is under way, and tells of it."""
        done, self._under_way = self._under_way, None
        if done is not None:
            self._outcomes.tell(done)

    # -- evaluation
    # ------------------------------------------------------------------------------------------------

    def _evaluate(self, occasion: str) -> bool:
        """Measures and tells; False when it gave way to an instruction that ends the attempt."""
        metrics = self._examine(self._place.step, occasion)
        if metrics is None:
            return False
        if occasion != "requested":
            self._place.evaluation_done()
            self._metrics = metrics
        return True

    # -- checkpoints and export
    # ------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint and tells of it."""
        with tracer().start_as_current_span("checkpoint", attributes={"step": self._place.step}):
            size_bytes = save_checkpoint(
                self._job.checkpoints,
                self._clip,
                self._state(),
                keep=self._spec.checkpoint.keep,
                job_id=self._job.job_id,
            )
        self._place.save_done()
        self._reporter.checkpoint(self._place.step, size_bytes)

    def _save_or_hold(self) -> Ending | None:
        error = attempt_write(self.save)
        return self._hold(error, self.save) if error else None

    def _hold(self, error: DiskFullError, write: Callable[[], None]) -> Ending | None:
        if not self._linked:
            raise error
        return hold(self._inbox, self._reporter, error, write=write, save=self.save)

    def _state(self) -> TrainingState:
        values, tensors = random_state(self._clip.device)
        stepper = self._stepper.state()
        guard_values, guard_tensors = self._guard.state()
        return TrainingState(
            step=self._place.step,
            counters={
                **self._place.state(),
                "metrics": self._metrics,
                "proven_sizes": [asdict(entry) for entry in self._examine.proven],
                "initial_peak": self._initial_peak,
                "bad_rows": sorted(self._loader.bad_rows),
                "threads": torch.get_num_threads(),
                "random": values,
                **stepper.values,
                **self._outcomes.state(),
                **guard_values,
            },
            tensors={_OPTIMIZER + name: tensor for name, tensor in stepper.tensors.items()}
            | guard_tensors
            | tensors,
        )

    def _restore(self, state: TrainingState) -> None:
        optimizer = {
            name.removeprefix(_OPTIMIZER): tensor
            for name, tensor in state.tensors.items()
            if name.startswith(_OPTIMIZER)
        }
        self._stepper.restore(state.counters, optimizer)
        self._guard.restore(state.counters, state.tensors)
        restore_random_state(self._clip.device, state.counters["random"], state.tensors)

    def _export(self) -> Ending:
        if not self._spec.publishes:
            return Ending(outcome=trainer_pb2.OUTCOME_SUCCEEDED)
        with tracer().start_as_current_span("export"):
            error = attempt_write(self._write_export)
        if error and (ending := self._hold(error, self._write_export)):
            return ending
        export_path = self._job.export.relative_to(self._job.path).as_posix()
        return Ending(outcome=trainer_pb2.OUTCOME_SUCCEEDED, export_path=export_path)

    def _write_export(self) -> None:
        self._clip.model.eval()
        with self._guard.counted():
            export(
                self._job,
                self._clip,
                precision=self._precision,
                metrics=self._metrics,
                matryoshka_dims=self._spec.loss.matryoshka_dims,
                adapter_alone=self._spec.adapter_alone,
                serving_size=self._sizes.target,
                proven_sizes=self._examine.proven,
                guard=self._guard.record,
            )

    # -- what it can be told
    # ---------------------------------------------------------------------------------------

    @property
    def saved(self) -> bool:
        """The newest checkpoint is of this step."""
        return self._place.saved

    def hold(self, error: DiskFullError) -> Ending | None:
        """Stands still because the disk has no room for a checkpoint; None: there was room again."""
        return self._hold(error, self.save)

    def evaluate_now(self) -> CliptuneError | None:
        """Measures because someone asked; returns why it could not."""
        if not len(self._dataset.validation):
            return InvalidInputError("the job has no validation rows to evaluate on")
        if not self._evaluate("requested"):
            return CancelledError("the evaluation gave way to the end of the run")
        return None

    def set_learning_rate(self, learning_rate: float) -> CliptuneError | None:
        """Changes the peak from this step on; returns why it could not."""
        try:
            check_learning_rate(learning_rate, "learning_rate")
        except CliptuneError as error:
            return error
        return attempt_write(lambda: self._peaks.change(self._place.step, learning_rate))

    # -- what the loader finds
    # -------------------------------------------------------------------------------------

    def _on_bad_row(self, pair: Pair, reason: str) -> None:
        if len(self._loader.bad_rows) <= _MAX_ROW_NOTICES:
            self._reporter.notice("image-unreadable", f"row {pair.row}: {reason}; other rows take its place")
        else:
            _log.info("row %d: %s", pair.row, reason)

    def _on_workers_lost(self) -> None:
        self._reporter.notice("workers-lost", "the loader's processes died; images are read in threads now")
