"""A loss by its name in a spec.

Enters: a name, and where it stands. Leaves: a `LossEntry`. Called by `config`.
"""

from __future__ import annotations

from cliptune.errors import SpecError
from cliptune_model.nearest import nearest
from cliptune_trainer.losses import own
from cliptune_trainer.losses.catalog import LOSSES
from cliptune_trainer.losses.entry import LossEntry
from cliptune_trainer.losses.own import own_entry


def loss_entry(name: str, path: str = "loss.name") -> LossEntry:
    """The loss of that name: the catalogue's, or a user's own.

    Raises:
        SpecError: there is none, the nearest names are offered; or own code that is no loss.
        PathOutsideRootsError: a file whose code may not be run.
    """
    entry = LOSSES.get(name) or own_entry(name, path)
    if entry is None:
        known = [*LOSSES, *own.names()]
        allowed = f"{', '.join(known)}, or FILE.py:NAME"
        raise SpecError(
            f"{path} is {name!r}{nearest(name, known)}; allowed: {allowed}", path=path, allowed=allowed
        )
    return entry
