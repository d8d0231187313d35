"""What the model can do on held-out rows. `evaluate` measures; the loop calls it."""

from cliptune_trainer.evaluation.split import EvaluationInterrupted, Measurement, evaluate

__all__ = ["EvaluationInterrupted", "Measurement", "evaluate"]
