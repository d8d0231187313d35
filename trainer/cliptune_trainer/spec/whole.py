"""A whole job: the parts of a spec together.

Enters: a `JobSpec` message. Leaves: a `Spec`. Called by `prepare` and `run`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cliptune.v1 import spec_pb2
from cliptune_model.source import ModelSource
from cliptune_trainer.losses.config import LossConfig
from cliptune_trainer.spec.checkpoint import CheckpointConfig, checkpoint_config
from cliptune_trainer.spec.data import DataConfig, data_config
from cliptune_trainer.spec.evaluation import EvaluationConfig, evaluation_config
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
    tune: TuneConfig | None = None
    """A search: the job is a study."""


def from_proto(message: spec_pb2.JobSpec) -> Spec:
    """The typed form of a `JobSpec`; unset fields take their documented defaults. Raises `SpecError`."""
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
        tune=tune_config(message.tune) if message.HasField("tune") else None,
    )
