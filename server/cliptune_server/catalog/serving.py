"""What a daemon served when it stopped, as references: `serving.json` in its home.

Enters: references. Leaves: the same at the next start. Called by `models.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path

from cliptune.errors import CliptuneError
from cliptune_server.catalog.model_files import PublishedModel
from cliptune_server.catalog.registry import Reference

log = logging.getLogger(__name__)


def read_serving(path: Path) -> list[str]:
    """The references; none, with a line in the log, when the file cannot be read. Blocks."""
    try:
        return [str(reference) for reference in json.loads(path.read_text(encoding="utf-8"))["references"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read, so nothing is served until it is loaded again: %s", path, error)
        return []


def not_loaded(model: PublishedModel, error: CliptuneError, kept: Collection[Reference]) -> str:
    """What a job is told whose model is published and could not be loaded."""
    stays = f"; what is served stays as it was ({', '.join(sorted(map(str, kept)))})" * bool(kept)
    again = f"`cliptune models load {model.key}` tries again"
    return f"{model.key} is published, and not loaded for inference: {error.message}{stays}; {again}"
