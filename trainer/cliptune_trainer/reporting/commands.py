"""What the trainer was told and has not done yet.

Enters: instructions of the daemon (through the link) and SIGTERM or SIGINT. Leaves: the same, one at a time,
to the loop, which asks between two steps. An instruction that comes twice is done once.
"""

from __future__ import annotations

import queue
import signal
from collections import deque
from types import FrameType
from typing import Final

from cliptune.internal.v1 import trainer_pb2

# These end the attempt, so a long evaluation gives way to them.
_ENDING: Final = ("pause", "cancel", "suspend")


class Inbox:
    """Instructions in the order of their arrival; `put` and `suspend` may be called from any thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[trainer_pb2.Instruction] = queue.SimpleQueue()
        self._known: set[str] = set()
        # What of the queue ends the attempt. Appends are atomic, so a signal may fall anywhere.
        self._endings: deque[str] = deque()

    def put(self, instruction: trainer_pb2.Instruction) -> None:
        """Adds an instruction, unless its id was seen before."""
        if instruction.command_id:
            if instruction.command_id in self._known:
                return
            self._known.add(instruction.command_id)
        if command_name(instruction) in _ENDING:
            self._endings.append(instruction.command_id)
        self._queue.put(instruction)

    def suspend(self) -> None:
        """Asks for a checkpoint and an end: the machine or the daemon is stopping."""
        self._endings.append("")
        self._queue.put(trainer_pb2.Instruction(suspend=trainer_pb2.Suspend()))

    @property
    def end_wanted(self) -> bool:
        """Whether an instruction that ends this attempt is waiting."""
        return bool(self._endings)

    def next(self, wait_s: float = 0.0) -> trainer_pb2.Instruction | None:
        """The oldest instruction, or None when none comes within `wait_s`."""
        try:
            taken = self._queue.get(timeout=wait_s) if wait_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None
        return self._taken(taken)

    @property
    def waiting(self) -> bool:
        """Whether there is an instruction."""
        return not self._queue.empty()

    def wait(self) -> trainer_pb2.Instruction:
        """The oldest instruction, however long it takes to come."""
        return self._taken(self._queue.get())

    def _taken(self, instruction: trainer_pb2.Instruction) -> trainer_pb2.Instruction:
        if command_name(instruction) in _ENDING:
            self._endings.popleft()
        return instruction

    def suspend_on_signals(self) -> None:
        """From here on SIGTERM and SIGINT mean `suspend`. Main thread only."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            # SimpleQueue.put may interrupt itself, so this is safe wherever the signal falls.
            self.suspend()

        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)


def command_name(instruction: trainer_pb2.Instruction) -> str:
    """ "pause", "resume", ..., or "suspend"."""
    if instruction.WhichOneof("instruction") == "suspend":
        return "suspend"
    return instruction.command.WhichOneof("command") or ""
