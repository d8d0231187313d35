"""A whole job: the parts of a spec together.

Enters: a `JobSpec` message. Leaves: a `Spec`. Called by `prepare` and `run`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cliptune.v1 import spec_pb2
from cliptune_model.adapters.config import AdapterConfig
from cliptune_model.source import ModelSource
from cliptune_trainer.losses.config import LossConfig
from cliptune_trainer.spec.adapter import ALONE, MERGED, adapter_config, published_form
from cliptune_trainer.spec.check import wrong
from cliptune_trainer.spec.checkpoint import CheckpointConfig, checkpoint_config
from cliptune_trainer.spec.data import DataConfig, data_config
from cliptune_trainer.spec.evaluation import EvaluationConfig, evaluation_config
from cliptune_trainer.spec.guard import GuardConfig, guard_config
from cliptune_trainer.spec.loss import loss_config
from cliptune_trainer.spec.model import model_source
from cliptune_trainer.spec.resources import ResourceConfig, resources_config
from cliptune_trainer.spec.train import TrainConfig, train_config
from cliptune_trainer.spec.tune import TuneConfig, tune_config


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """A whole job, checked. `domain`: whose recipe is in it already; empty: none."""

    name: str
    model: ModelSource
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    domain: str = ""
    publishes: bool = True
    adapter: AdapterConfig | None = None
    form: str = MERGED
    guard: GuardConfig = field(default_factory=GuardConfig)
    tune: TuneConfig | None = None
    """A search: the job is a study."""

    def __post_init__(self) -> None:
        if self.train.freeze_image and self.train.freeze_text:
            raise wrong("train.freeze", "both towers", "one of them, as nothing would be left to train")
        if self.adapter is not None and self.train.probe_fraction:
            raise wrong(
                "train.probe_fraction",
                f"{self.train.probe_fraction:g}",
                "0 beside an adapter, which leaves the model's own projections as they are",
            )

    @property
    def adapter_alone(self) -> bool:
        """What is published is the adapter, not the whole model."""
        return self.form == ALONE


def from_proto(message: spec_pb2.JobSpec) -> Spec:
    """The typed form of a `JobSpec`; unset fields take their documented defaults. Raises `SpecError`."""
    adapter = adapter_config(message.adapter)
    return Spec(
        name=message.name,
        model=model_source(message.model),
        data=data_config(message.data),
        train=train_config(message.train),
        loss=loss_config(message.loss),
        evaluation=evaluation_config(message.evaluation),
        checkpoint=checkpoint_config(message.checkpoint),
        resources=resources_config(message.resources),
        domain=message.domain,
        publishes=not message.publish.skip,
        adapter=adapter,
        form=published_form(message.publish.form, adapter),
        guard=guard_config(message.guard),
        tune=tune_config(message.tune) if message.HasField("tune") else None,
    )
