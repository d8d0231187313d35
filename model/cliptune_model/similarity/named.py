"""Similarities by name.

Enters: the name and parameters of a spec or a manifest. Leaves: a `Similarity`. Called by `clip.build`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cliptune.errors import CliptuneError, SpecError
from cliptune_model import own_code
from cliptune_model.nearest import nearest
from cliptune_model.own_code import OwnCode
from cliptune_model.similarity.base import Similarity
from cliptune_model.similarity.directions import Angular, Cosine
from cliptune_model.similarity.lengths import Dot, Mahalanobis, SquaredEuclidean
from cliptune_model.similarity.lorentz import Lorentz

SIMILARITIES: Final[dict[str, type[Similarity]]] = {
    kind.name: kind for kind in (Cosine, Dot, SquaredEuclidean, Angular, Mahalanobis, Lorentz)
}
DEFAULT: Final = Cosine.name
GROUP: Final = "cliptune.similarities"
_PATH: Final = "model.similarity"


def similarity_for(name: str, dim: int, parameters: Mapping[str, float] | None = None) -> Similarity:
    """A new similarity, its learned parameters at their start.

    Args:
        name: a key of `SIMILARITIES`, or a user's own: an entry point of the group `cliptune.similarities`,
        or
            "FILE.py:NAME" where that is allowed.
        dim: D.
        parameters: by name; what is not given takes its default.

    Raises:
        SpecError: unknown name or parameter, the nearest offered; a value out of its bounds; own code that
        does
            not load or makes no `Similarity`.
        PathOutsideRootsError: a file whose code may not be run.
    """
    kind = SIMILARITIES.get(name)
    if kind is not None:
        return kind(dim, parameters)
    own = own_code.find(GROUP, name, path=_PATH)
    if own is None:
        known = [*SIMILARITIES, *own_code.names(GROUP)]
        allowed = ", ".join(known)
        raise SpecError(
            f"{_PATH} is {name!r}{nearest(name, known)}; allowed: {allowed}, or FILE.py:NAME",
            path=_PATH,
            allowed=allowed,
        )
    return _own(own, dim, parameters)


def _own(own: OwnCode, dim: int, parameters: Mapping[str, float] | None) -> Similarity:
    try:
        made = own.value(dim, parameters)
    except CliptuneError:
        raise
    except Exception as error:  # anything may go wrong in it
        why = (str(error).strip().splitlines() or [""])[0]
        raise SpecError(
            f"{_PATH}: {own.reference} cannot be made for {dim} dimensions: {type(error).__name__}: {why}",
            path=_PATH,
            allowed="a class or function that takes (dim, parameters)",
        ) from error
    if not isinstance(made, Similarity):
        allowed = "a subclass of cliptune_model.similarity.Similarity, or a function that makes one"
        raise SpecError(
            f"{_PATH}: {own.reference} makes a {type(made).__name__}; allowed: {allowed}",
            path=_PATH,
            allowed=allowed,
        )
    made.name, made.sha256 = own.reference, own.sha256
    return made
