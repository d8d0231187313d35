"""The versions that one bulk stream is answered by: those that its references meant when it used them first.

Enters: the `model` of the stream's items. Leaves: the key of a version, the same for one reference to the end
of the stream, however aliases move meanwhile; so long the version is held in the engine. Made by `router.py`
for each stream.
"""

from __future__ import annotations

from typing import Final, Protocol


class Catalog(Protocol):
    """Knows which models there are."""

    async def resolve(self, reference: str) -> str:
        """ "" (the only one loaded), NAME, NAME:V or NAME@ALIAS → the key "NAME:V" of a loaded model.

        `ModelNotFoundError`, or `ModelStateError` naming how to load. `UnavailableError`: it is being loaded.
        """
        ...

    async def changed(self) -> None:
        """Returns when a model has been loaded, or will not be after all."""
        ...

    def shadow(self, reference: str) -> str | None:
        """Key of the loaded version that gets a copy of a request for this reference, if one does."""
        ...

    def hold(self, key: str) -> None:
        """Keep it in the engine, also when no reference means it any more."""
        ...

    def release(self, key: str) -> None:
        """The end of one `hold`."""
        ...


class Pins:
    """One stream's. `close` at its end."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog: Final = catalog
        self._keys: Final[dict[str, str]] = {}

    async def resolve(self, reference: str) -> str:
        """As the catalog does at first, and from then on the same. A client may go on with the key itself."""
        if reference not in self._keys:
            key = await self._catalog.resolve(reference)
            if reference not in self._keys:  # another lane may have been faster, before an alias moved
                if key not in self._keys:
                    self._catalog.hold(key)
                self._keys[reference] = self._keys[key] = key
        return self._keys[reference]

    def close(self) -> None:
        """Nothing is held any more."""
        for key in set(self._keys.values()):
            self._catalog.release(key)
        self._keys.clear()
