"""What the model can do on held-out rows. `evaluate` measures; the loop calls it."""

from __future__ import annotations

from cliptune_trainer.evaluation.measure import evaluate
from cliptune_trainer.evaluation.measurement import (
    EvaluationInterrupted,
    Measurement,
)

__all__ = ["EvaluationInterrupted", "Measurement", "evaluate"]
