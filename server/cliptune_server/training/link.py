"""The daemon's end of the link that trainers dial: it makes events and commands fast, the journal stays true.

Enters: `AttachRequest` messages of trainers on the home's unix socket. Leaves: their events to a `LinkPeer`
(`jobs.py`), and the daemon's instructions to them. A trainer proves itself by its job's secret. A trainer
that dials again replaces its former connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final, Protocol

import grpc
import grpc.aio

from cliptune.errors import CliptuneError, wire_status
from cliptune.internal.v1 import trainer_pb2, trainer_pb2_grpc

log = logging.getLogger(__name__)

_STOP_GRACE_S: Final = 0.5


class LinkPeer(Protocol):
    """Who listens to trainers."""

    def link_secret(self, job_id: str) -> str | None:
        """The secret of a job that may have a trainer."""
        ...

    async def trainer_attached(self, hello: trainer_pb2.Hello, attachment: Attachment) -> None:
        """Reads the journal up to where the trainer says it is. `ConflictError` for a launch that is over."""
        ...

    async def trainer_sent(self, job_id: str, event: trainer_pb2.TrainerEvent) -> None:
        """Takes an event that is in the journal already."""
        ...

    def trainer_detached(self, job_id: str, attachment: Attachment) -> None:
        """The connection is gone; the trainer may well live."""
        ...


class Attachment:
    """A connected trainer, as far as sending to it goes."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[trainer_pb2.Instruction | None] = asyncio.Queue()

    def send(self, instruction: trainer_pb2.Instruction) -> None:
        """Hands an instruction over; whether it arrives is told by the event that acknowledges it."""
        self._waiting.put_nowait(instruction)

    def close(self) -> None:
        """Ends the connection from our side."""
        self._waiting.put_nowait(None)

    async def instructions(self) -> AsyncIterator[trainer_pb2.Instruction]:
        """Everything sent, until closed."""
        while (instruction := await self._waiting.get()) is not None:
            yield instruction


class LinkService(trainer_pb2_grpc.LinkServiceServicer):
    """gRPC server on a unix socket, for the trainers of one home."""

    def __init__(self, socket_path: Path) -> None:
        self.address: Final = f"unix:{socket_path}"
        self._socket_path = socket_path
        self._peer: LinkPeer | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self, peer: LinkPeer) -> None:
        """Begins to listen; a socket left by a killed daemon is replaced."""
        self._peer = peer
        self._server = grpc.aio.server()
        trainer_pb2_grpc.add_LinkServiceServicer_to_server(self, self._server)
        await asyncio.to_thread(self._socket_path.unlink, missing_ok=True)
        self._server.add_insecure_port(self.address)
        await self._server.start()
        await asyncio.to_thread(self._socket_path.chmod, 0o600)

    async def stop(self) -> None:
        """Hangs up; trainers go on and dial again until somebody listens."""
        if self._server is not None:
            await self._server.stop(_STOP_GRACE_S)
            self._server = None

    async def Attach(  # noqa: N802
        self,
        request_iterator: AsyncIterator[trainer_pb2.AttachRequest],
        context: grpc.aio.ServicerContext[trainer_pb2.AttachRequest, trainer_pb2.AttachResponse],
    ) -> AsyncIterator[trainer_pb2.AttachResponse]:
        """One trainer's connection: Hello, Welcome, then events in and instructions out."""
        peer = self._peer
        assert peer is not None  # the server starts with one
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be Hello")
        hello = first.hello
        secret = peer.link_secret(hello.job_id)
        # Compared also where there is no such job: the time taken tells nothing.
        if not hmac.compare_digest((secret or "-" * 64).encode(), hello.secret.encode()) or secret is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong secret or unknown job")
        attachment = Attachment()
        try:
            await peer.trainer_attached(hello, attachment)
        except CliptuneError as error:
            await context.abort(wire_status(error).grpc, error.message)
        receiving = asyncio.create_task(self._receive(peer, hello.job_id, request_iterator, attachment))
        try:
            yield trainer_pb2.AttachResponse(welcome=trainer_pb2.Welcome())
            async for instruction in attachment.instructions():
                yield trainer_pb2.AttachResponse(instruction=instruction)
        finally:
            receiving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await receiving
            peer.trainer_detached(hello.job_id, attachment)

    async def _receive(
        self,
        peer: LinkPeer,
        job_id: str,
        requests: AsyncIterator[trainer_pb2.AttachRequest],
        attachment: Attachment,
    ) -> None:
        try:
            async for request in requests:
                if request.WhichOneof("message") == "event":
                    await peer.trainer_sent(job_id, request.event)
        except (grpc.aio.AioRpcError, grpc.RpcError, asyncio.CancelledError) as error:
            log.debug("the link of %s is gone: %r", job_id, error)
        finally:
            attachment.close()
