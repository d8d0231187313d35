"""The daemon's end of the link, as small as it can be: a real gRPC server on a real Unix socket."""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from cliptune.internal.v1 import trainer_pb2, trainer_pb2_grpc
from cliptune.v1 import job_pb2

TIMEOUT_S = 90.0


class LinkServer(trainer_pb2_grpc.LinkServiceServicer):
    """Keeps what trainers say; `tell` sends an instruction to the one that is attached."""

    def __init__(self, socket: Path) -> None:
        self.target = f"unix:{socket}"
        self.hellos: list[trainer_pb2.Hello] = []
        self.events: list[trainer_pb2.TrainerEvent] = []
        self._changed = threading.Condition()
        self._outgoing: queue.SimpleQueue[trainer_pb2.Instruction | None] = queue.SimpleQueue()

    def __enter__(self) -> LinkServer:
        self._server = grpc.server(ThreadPoolExecutor(4))
        trainer_pb2_grpc.add_LinkServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.target)
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._outgoing.put(None)
        self._server.stop(0).wait()

    def Attach(  # noqa: N802 - the name is the contract's
        self, request_iterator: Iterator[trainer_pb2.AttachRequest], context: object
    ) -> Iterator[trainer_pb2.AttachResponse]:
        hello = next(request_iterator).hello
        outgoing: queue.SimpleQueue[trainer_pb2.Instruction | None] = queue.SimpleQueue()
        with self._changed:
            self.hellos.append(hello)
            self._outgoing = outgoing
            self._changed.notify_all()

        def read() -> None:
            try:
                for request in request_iterator:
                    with self._changed:
                        self.events.append(request.event)
                        self._changed.notify_all()
            except grpc.RpcError:
                pass  # the trainer, or this server, went away
            finally:
                outgoing.put(None)

        threading.Thread(target=read, daemon=True).start()
        yield trainer_pb2.AttachResponse(welcome=trainer_pb2.Welcome())
        while (instruction := outgoing.get()) is not None:
            yield trainer_pb2.AttachResponse(instruction=instruction)

    def tell(self, **command: object) -> str:
        """Sends a command such as `pause=job_pb2.PauseCommand()`; returns its id."""
        command_id = uuid.uuid4().hex
        self.tell_again(command_id, **command)
        return command_id

    def tell_again(self, command_id: str, **command: object) -> None:
        """Sends a command under a given id."""
        message = job_pb2.JobCommand(**command)  # type: ignore[arg-type]
        self._outgoing.put(trainer_pb2.Instruction(command_id=command_id, command=message))

    def wait_hello(self, number: int = 1) -> None:
        """Until a trainer has attached for the `number`-th time."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.hellos) >= number, TIMEOUT_S), "no trainer came"

    def wait(self, wanted: Callable[[trainer_pb2.TrainerEvent], bool]) -> trainer_pb2.TrainerEvent:
        """Until an event that is wanted has come."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(map(wanted, self.events)), TIMEOUT_S), (
                f"it did not come; {self.events[-5:]}"
            )
            return next(filter(wanted, self.events))

    def wait_step(self, step: int, attempt: int = 1) -> None:
        """Until a step has been reported."""
        self.wait(lambda event: event.attempt == attempt and event.event.progress.step >= step)

    def wait_done(self, command_id: str) -> job_pb2.CommandDone:
        """Until a command has been answered."""
        return self.wait(lambda event: event.event.command.command_id == command_id).event.command
