"""Users' own losses and similarities, tried out before a job waits for a device.

Enters: the job's losses and its model's similarity. Leaves: a `Choice` for each that is a user's own, or a
`SpecError` that says which promises it breaks. Called by preparation.
"""

from __future__ import annotations

from cliptune_model.choice import Choice
from cliptune_model.similarity import Similarity
from cliptune_trainer.contract.of_loss import try_loss
from cliptune_trainer.contract.of_similarity import try_similarity
from cliptune_trainer.contract.record import check_own_code, own_code_of, remember_own_code
from cliptune_trainer.contract.report import Report
from cliptune_trainer.losses.config import LossConfig

__all__ = [
    "Report",
    "check_own_code",
    "remember_own_code",
    "try_loss",
    "try_own_code",
    "try_similarity",
]


def try_own_code(loss: LossConfig, similarity: Similarity) -> list[Choice]:
    """What was found of each; cliptune's own ones are tried out by its tests.

    Raises:
        SpecError: one of them breaks a promise; the message has a line for each promise.
    """
    found = own_code_of(loss, similarity.name)
    choices = []
    if (own := found.get("model.similarity")) is not None:
        choices.append(try_similarity(similarity).choice("own similarity", own.origin))
    for term in loss.terms:
        path = f"{term.path}.name"
        if (own := found.get(path)) is not None:
            report = try_loss(
                term.entry().function,
                similarity,
                parameters=term.parameters,
                needs=loss.needs,
                path=path,
                reference=term.name,
            )
            choices.append(report.choice("own loss", own.origin))
    return choices
