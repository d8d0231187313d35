"""Reads a trainer's journal: one `TrainerEvent` a line, in order, as far as it is whole.

Enters: the newest sequence that is known. Leaves: the events after it. Called by `trainer_run.py` where the
link has left a gap and when a trainer has ended. Only ever reads: the file belongs to the trainer, which
may be writing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from cliptune.internal.v1 import trainer_pb2

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalLine:
    """An event and where its line begins."""

    event: trainer_pb2.TrainerEvent
    offset: int


class JournalReader:
    """Remembers how far the journal of one attempt has been read, so that each line is parsed once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read_after(self, sequence: int) -> list[JournalLine]:
        """Whole lines with a greater sequence. Blocks. A torn last line stays for the next call."""
        found: list[JournalLine] = []
        for offset, content in self._new_lines():
            if int(content.get("sequence", 0)) > sequence:
                event = json_format.ParseDict(content, trainer_pb2.TrainerEvent(), ignore_unknown_fields=True)
                found.append(JournalLine(event=event, offset=offset))
        return found

    def rewind(self) -> None:
        """What was read could not be used: the next call begins at the start."""
        self._offset = 0

    def _new_lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset, self._offset = self._offset, self._offset + len(line)
                try:
                    content = json.loads(line)
                except ValueError:
                    log.warning("%s: the line at byte %d is damaged and is left out", self._path, offset)
                    continue
                yield offset, content
