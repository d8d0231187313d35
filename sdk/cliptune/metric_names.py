"""Names of the metrics that an evaluation tells, and which of them can be the main one.

Read by the check of a spec's shape, by the trainer, which measures them, and by what prints them.
"""

from __future__ import annotations

from typing import Final

ACCURACY: Final = "zero_shot/accuracy"
ACCURACY_AT_5: Final = "zero_shot/accuracy@5"
BALANCED_ACCURACY: Final = "zero_shot/balanced_accuracy"
AUROC: Final = "zero_shot/auroc"
AVERAGE_PRECISION: Final = "zero_shot/average_precision"
CALIBRATION_ERROR: Final = "zero_shot/calibration_error"
"""The only one of which less is better."""

RECALLS: Final = (1, 5, 10)
DIRECTIONS: Final = ("image_to_text", "text_to_image")
"""What asks, and what is looked for."""


def recall_name(direction: str, k: int) -> str:
    """Such as "retrieval/image_to_text_recall@1"."""
    return f"retrieval/{direction}_recall@{k}"


def map_name(direction: str) -> str:
    """Such as "retrieval/image_to_text_map"."""
    return f"retrieval/{direction}_map"


MAIN_METRICS: Final = (
    ACCURACY,
    ACCURACY_AT_5,
    BALANCED_ACCURACY,
    AUROC,
    AVERAGE_PRECISION,
    *(recall_name(direction, k) for direction in DIRECTIONS for k in RECALLS),
    *(map_name(direction) for direction in DIRECTIONS),
)
"""More is better of each, so that runs can be compared by any."""
