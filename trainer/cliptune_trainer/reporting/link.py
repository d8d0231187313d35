"""The line to the daemon: events out, instructions in. Fast, but never needed.

Enters: an address and a secret. Leaves: journaled events for the daemon, its instructions for the inbox.
Called by `main`. It lives in a thread of its own, reconnects for ever, and training neither waits for it nor
notices it: what could not be sent is in the journal, where the daemon reads it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from typing import Final

import grpc

from cliptune.internal.v1 import trainer_pb2, trainer_pb2_grpc
from cliptune_trainer.reporting.commands import Inbox
from cliptune_trainer.reporting.journal import Journal

_log = logging.getLogger(__name__)
_OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    # A dead peer on a Unix socket is noticed at once: no keepalive.
)
# Between two connections that the daemon ended (a refusal, a restart).
_PAUSE_S: Final = 0.5
# How long an ending trainer stays to hand over its last events; they are in the journal anyway.
_LINGER_S: Final = 2.0


class Link:
    """A link to `target` ("unix:PATH" or "HOST:PORT"), from `start` to `close`."""

    def __init__(self, target: str, *, job_id: str, secret: str, journal: Journal, inbox: Inbox) -> None:
        self._target, self._job_id, self._secret = target, job_id, secret
        self._journal, self._inbox = journal, inbox
        self._closing = threading.Event()
        self._connected = threading.Event()
        self._lock = threading.Lock()
        self._outgoing: queue.SimpleQueue[trainer_pb2.TrainerEvent | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def start(self) -> None:
        """Begins to connect; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """Hands over what is left if the daemon is there, for two seconds at most, and ends the link."""
        with self._lock:
            self._closing.set()
            self._outgoing.put(None)
        if self._connected.is_set():
            self._thread.join(_LINGER_S)
        self._channel.close()
        self._thread.join(_LINGER_S)

    def _run(self) -> None:
        attach = trainer_pb2_grpc.LinkServiceStub(self._channel).Attach
        told = None
        while not self._closing.is_set():
            try:
                for response in attach(self._requests(), wait_for_ready=True):
                    self._connected.set()
                    told = None
                    if response.WhichOneof("message") == "instruction":
                        self._inbox.put(response.instruction)
            except grpc.RpcError as error:
                status = getattr(error, "code", lambda: None)()
                if status is not told and not self._closing.is_set():
                    _log.info("the link to the daemon is down (%s); training goes on", status)
                told = status
            except ValueError:
                return  # the channel was closed
            self._connected.clear()
            self._journal.detach()
            self._closing.wait(_PAUSE_S)

    def _requests(self) -> Iterator[trainer_pb2.AttachRequest]:
        """Hello, then events as they are journaled, until the link closes."""
        with self._lock:
            # gRPC may still drain the last connection's generator: each has a queue of its own.
            previous, outgoing = self._outgoing, queue.SimpleQueue[trainer_pb2.TrainerEvent | None]()
            self._outgoing = outgoing
            previous.put(None)
            if self._closing.is_set():
                outgoing.put(None)
        last_sequence = self._journal.attach(outgoing.put)
        yield trainer_pb2.AttachRequest(
            hello=trainer_pb2.Hello(
                job_id=self._job_id,
                secret=self._secret,
                attempt=self._journal.attempt,
                last_sequence=last_sequence,
            )
        )
        while (event := outgoing.get()) is not None:
            yield trainer_pb2.AttachRequest(event=event)
