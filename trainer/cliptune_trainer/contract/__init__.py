"""Users' own losses and similarities, tried out before a job waits for a device.

Enters: the job's losses and its model's similarity. Leaves: a `Choice` for each that is a user's own, or a
`SpecError` that says which promises it breaks. Called by preparation.
"""

from __future__ import annotations

from cliptune_model import own_code
from cliptune_model.choice import Choice
from cliptune_model.similarity import SIMILARITIES, Similarity
from cliptune_model.similarity.named import GROUP
from cliptune_trainer.contract.of_loss import try_loss
from cliptune_trainer.contract.of_similarity import try_similarity
from cliptune_trainer.contract.report import Report
from cliptune_trainer.losses.catalog import LOSSES
from cliptune_trainer.losses.config import LossConfig
from cliptune_trainer.losses.own import own_loss

__all__ = ["Report", "try_loss", "try_own_code", "try_similarity"]


def try_own_code(loss: LossConfig, similarity: Similarity) -> list[Choice]:
    """What was found of each; cliptune's own ones are tried out by its tests.

    Raises:
        SpecError: one of them breaks a promise; the message has a line for each promise.
    """
    choices = []
    if similarity.name not in SIMILARITIES:
        own = own_code.find(GROUP, similarity.name, path="model.similarity")
        origin = own.origin if own else "made by hand"
        choices.append(try_similarity(similarity).choice("own similarity", origin))
    for term in loss.terms:
        if term.name not in LOSSES:
            own = own_loss(term.name, f"{term.path}.name")
            origin = own.origin if own else "made by hand"
            report = try_loss(
                term.entry().function,
                similarity,
                parameters=term.parameters,
                needs=loss.needs,
                path=f"{term.path}.name",
                reference=term.name,
            )
            choices.append(report.choice("own loss", origin))
    return choices
