"""Batch plans that were found before: `<home>/plans/`, one file a question.

Enters: everything that a plan depends on, as JSON values. Leaves: the plan, if the same question was answered
before. Called by preparation and by `run`. What cannot be read or written is as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cliptune.durable import write_atomically

_log = logging.getLogger(__name__)

FORMAT: Final = 1
FOLDER: Final = "plans"
_MOST_FILES: Final = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedPlan:
    """What a plan comes down to."""

    micro_batch_size: int
    checkpointing: bool
    attention: str
    block_bytes: int
    estimated_bytes: int
    probed: bool


class PlanCache:
    """Plans of one home. Without a home nothing is kept."""

    def __init__(self, home: Path | None) -> None:
        self._folder = None if home is None else home / FOLDER

    def get(self, question: Mapping[str, Any]) -> CachedPlan | None:
        """The answer to the very same question."""
        if self._folder is None:
            return None
        path = self._path(self._folder, question)
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            if told["format"] != FORMAT or told["question"] != dict(question):
                return None
            return CachedPlan(**told["plan"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s cannot be read (%r): the plan is made anew", path, error)
            return None

    def put(self, question: Mapping[str, Any], plan: CachedPlan) -> None:
        """Keeps an answer; the oldest are dropped when there are many."""
        if self._folder is None:
            return
        content = {
            "format": FORMAT,
            "question": dict(question),
            "plan": {name: getattr(plan, name) for name in CachedPlan.__dataclass_fields__},
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(self._folder, question), json.dumps(content, indent=1).encode())
            files = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for old in files[: max(0, len(files) - _MOST_FILES)]:
                old.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("the batch plan cannot be kept: %r", error)

    @staticmethod
    def _path(folder: Path, question: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        return folder / f"{digest[:24]}.json"
