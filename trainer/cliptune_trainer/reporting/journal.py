"""The journal of an attempt: every event, one JSON line each, on disk before anyone is told.

Enters: public events and the final word. Leaves: lines in `journal/NNNN.jsonl`, and the same events to a
listener (the link). Called through `Reporter`. A kill at any point leaves whole lines and at most one torn
one, which the next opening cuts off. When the disk is full, lines wait in memory, in order, for the next
attempt to write.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from google.protobuf import json_format

from cliptune.durable import is_disk_full
from cliptune.internal.v1 import trainer_pb2
from cliptune.v1 import job_pb2

Listener = Callable[[trainer_pb2.TrainerEvent], None]


class Journal:
    """Journal of one attempt; safe for use by several threads."""

    def __init__(self, path: Path, attempt: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.attempt = attempt
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._size, self._sequence = _recover(path)
        os.ftruncate(self._file, self._size)
        self._waiting: deque[trainer_pb2.TrainerEvent] = deque()
        self._sent_early = 0
        self._listener: Listener | None = None

    @property
    def pending(self) -> int:
        """Events that could not be written yet."""
        return len(self._waiting)

    def append(self, body: job_pb2.JobEvent | trainer_pb2.Finished, *, regardless: bool = False) -> None:
        """Numbers an event, writes it and those that wait before it, and tells the listener of what was
        written.

        Args:
            body: a public event or the attempt's last word.
            regardless: tell the listener even if nothing can be written: how a full disk is told of.
        """
        with self._lock:
            event = trainer_pb2.TrainerEvent(attempt=self.attempt, sequence=self._sequence + 1)
            event.time.GetCurrentTime()
            if isinstance(body, trainer_pb2.Finished):
                event.finished.CopyFrom(body)
            else:
                event.event.CopyFrom(body)
            self._sequence += 1
            self._waiting.append(event)
            self._write_waiting()
            if regardless:
                self._tell_early()
            if isinstance(body, trainer_pb2.Finished) and not self._waiting:
                os.fsync(self._file)

    def flush(self) -> None:
        """Tries again to write what waits."""
        with self._lock:
            self._write_waiting()

    def attach(self, listener: Listener) -> int:
        """Tells `listener` of every event from here on; returns the sequence of the newest one on disk.

        What had to be told of without being written is told again.
        """
        with self._lock:
            self._listener = listener
            written = self._sequence - len(self._waiting)
            early, self._sent_early = self._sent_early, 0
            if early:
                self._tell_early()
            return written

    def detach(self) -> None:
        """Ends `attach`."""
        with self._lock:
            self._listener = None

    def close(self) -> None:
        """Closes the file. Call once, last."""
        os.close(self._file)

    def _write_waiting(self) -> None:
        while self._waiting:
            event = self._waiting[0]
            line = json.dumps(json_format.MessageToDict(event, preserving_proto_field_name=True))
            if not self._write((line + "\n").encode()):
                return
            self._waiting.popleft()
            if self._sent_early:
                self._sent_early -= 1
            elif self._listener is not None:
                self._listener(event)

    def _write(self, line: bytes) -> bool:
        """Whole or not at all."""
        written = 0
        try:
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._size + written)
        except OSError as error:
            if not is_disk_full(error):
                raise
            os.ftruncate(self._file, self._size)
            return False
        self._size += len(line)
        return True

    def _tell_early(self) -> None:
        """All that waits, in order: a listener accepts no gap."""
        if self._listener is None:
            # Told when it attaches.
            self._sent_early = len(self._waiting)
            return
        for event in list(self._waiting)[self._sent_early :]:
            self._listener(event)
        self._sent_early = len(self._waiting)


def _recover(path: Path) -> tuple[int, int]:
    """Bytes of the whole lines in a journal, and the sequence of the last one."""
    lines = path.read_bytes().splitlines(keepends=True)
    while lines:
        try:
            if lines[-1].endswith(b"\n"):
                return sum(map(len, lines)), int(json.loads(lines[-1])["sequence"])
        except ValueError:
            pass  # a power cut can leave a line of zeros
        lines.pop()
    return 0, 0
