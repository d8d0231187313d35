"""Users' own code as it was when a job was prepared: a run, and every resume, computes with the same.

Enters: the job's losses and similarity. Leaves: `own-code.json` in the job's folder, or a `ConflictError`
where the code has changed since. Called by preparation and by `run`.
"""

from __future__ import annotations

import json
from pathlib import Path

from cliptune.durable import write_atomically
from cliptune.errors import ConflictError
from cliptune_model import own_code
from cliptune_model.own_code import OwnCode
from cliptune_model.similarity import SIMILARITIES
from cliptune_model.similarity.named import GROUP
from cliptune_trainer.losses.catalog import LOSSES
from cliptune_trainer.losses.config import LossConfig
from cliptune_trainer.losses.own import own_loss


def own_code_of(loss: LossConfig, similarity: str) -> dict[str, OwnCode]:
    """What is a user's own, by the path of the spec's field that names it.

    Args:
        loss: of the spec.
        similarity: name of the model's, or of the spec's; "" for none.

    Raises:
        SpecError, PathOutsideRootsError: it cannot be had.
    """
    found = {}
    if similarity and similarity not in SIMILARITIES:
        found["model.similarity"] = own_code.find(GROUP, similarity, path="model.similarity")
    for term in loss.terms:
        if term.name not in LOSSES:
            found[f"{term.path}.name"] = own_loss(term.name, f"{term.path}.name")
    return {path: own for path, own in found.items() if own is not None}


def remember_own_code(file: Path, loss: LossConfig, similarity: str) -> None:
    """Writes what it is made of now, if there is some."""
    known = {path: own.origin for path, own in own_code_of(loss, similarity).items()}
    if known:
        write_atomically(file, json.dumps(known, indent=2).encode())


def check_own_code(file: Path, loss: LossConfig, similarity: str) -> None:
    """Raises `ConflictError` where it is not what was prepared; a job without own code has no record."""
    if not file.exists():
        return
    known: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    for path, own in own_code_of(loss, similarity).items():
        before = known.get(path, own.origin)
        if before != own.origin:
            raise ConflictError(
                f"{path}: the job was prepared with {before}, and now there is {own.origin}: put it back as"
                " it was, or submit a new job"
            )
