"""What a job asks for, typed and checked: from the wire's `JobSpec` to frozen dataclasses.

Enters: a `JobSpec` message. Leaves: a `Spec`, every default filled in as `spec.proto` documents it. Called by
`prepare` and `run`. A wrong value is a `SpecError` that names its path and what is allowed. Each part of the
message has a file of its own here.
"""

from __future__ import annotations

from cliptune_trainer.losses.config import LossConfig, Term
from cliptune_trainer.spec.check import wrong
from cliptune_trainer.spec.checkpoint import CheckpointConfig
from cliptune_trainer.spec.data import DataConfig
from cliptune_trainer.spec.evaluation import ClassConfig, EvaluationConfig
from cliptune_trainer.spec.guard import GuardConfig, ProbeConfig
from cliptune_trainer.spec.resources import ResourceConfig
from cliptune_trainer.spec.train import TrainConfig, check_learning_rate
from cliptune_trainer.spec.whole import Spec, from_proto

__all__ = [
    "CheckpointConfig",
    "ClassConfig",
    "DataConfig",
    "EvaluationConfig",
    "GuardConfig",
    "LossConfig",
    "ProbeConfig",
    "ResourceConfig",
    "Spec",
    "Term",
    "TrainConfig",
    "check_learning_rate",
    "from_proto",
    "wrong",
]
