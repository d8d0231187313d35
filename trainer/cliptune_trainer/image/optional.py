"""Packages that only some data sets need, imported when the first such row is met.

Enters: a module's name. Leaves: the module, or an error that names the extra to install. Called by readers.
"""

from __future__ import annotations

import importlib
from typing import Any

from cliptune.errors import ConflictError


def needed(module: str, extra: str, what: str) -> Any:
    """A package that reads `what`, imported now that it is needed.

    Raises:
        ConflictError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConflictError(
            f"{what} needs {module.partition('.')[0]}, which is not installed:"
            f" pip install 'cliptune[{extra}]'",
            extra=extra,
        ) from error
