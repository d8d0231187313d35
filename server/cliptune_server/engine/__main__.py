"""The engine's `main`: puts the parts together, listens, and knows when to end.

    python -m cliptune_server.engine --socket unix:/tmp/e.sock --device cpu --threads 2

Prints one JSON line on stdout when it listens. SIGTERM: answers what it has accepted, then ends. End of
stdin: the daemon has gone, and with it whoever waits for an answer; it ends at once. Started by
`engine_process.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import grpc
import torch

from cliptune.errors import CliptuneError
from cliptune.internal.v1 import engine_pb2_grpc
from cliptune.telemetry import LEVELS, configure_logging, configure_tracing
from cliptune_model.acceleration.fidelity import PRECISIONS
from cliptune_model.attention import AttentionPlan
from cliptune_model.image_reader import DECODES
from cliptune_model.machine.device import choose_proven_device, choose_threads
from cliptune_model.machine.hardware import host
from cliptune_model.machine.policy import prepare_process
from cliptune_model.machine.rules import choose_serving_attention
from cliptune_server.engine.admission import Admission, AdmissionLimits
from cliptune_server.engine.batcher import Batcher, BatcherConfig
from cliptune_server.engine.cache import DEFAULT_BYTES, EmbeddingCache
from cliptune_server.engine.decode import Decoder
from cliptune_server.engine.embedding import Embedder
from cliptune_server.engine.expectation import Expectation
from cliptune_server.engine.inference import Inference
from cliptune_server.engine.models import ModelSet
from cliptune_server.engine.progress import Progress
from cliptune_server.engine.service import Border, EngineServicer

_SERVICE: Final = "cliptune-engine"
_MESSAGE_BYTES: Final = 256 * 1024 * 1024
# Larger batches gain nothing on a CPU and much on a GPU.
_CPU_BATCH_ITEMS: Final = 64
_GPU_BATCH_ITEMS: Final = 256
# The daemon kills an engine that takes longer than the daemon's own grace.
_DRAIN_S: Final = 600.0
_PR_SET_PDEATHSIG: Final = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs an engine until it is told to end. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="cliptune_server.engine", description="One device's inference.")
    parser.add_argument("--socket", required=True, help="address to listen on: unix:PATH")
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of the forward")
    parser.add_argument("--message-bytes", type=int, default=_MESSAGE_BYTES, help="largest message")
    parser.add_argument(
        "--cache-bytes", type=int, default=DEFAULT_BYTES, help="embeddings that are remembered; 0: none"
    )
    parser.add_argument("--precision", default="default", choices=("default", *PRECISIONS), help="of towers")
    parser.add_argument("--decode", default="exact", choices=DECODES, help="of JPEG files")
    parser.add_argument("--home", type=Path, default=None, help="where cliptune doctor keeps its proofs")
    parser.add_argument("--log-level", default="info", choices=LEVELS)
    options = parser.parse_args(arguments)

    _end_with_parent()
    faulthandler.enable()
    configure_logging(options.log_level, _SERVICE)
    flush_traces = configure_tracing(_SERVICE)
    # open_clip tells each step of building a model on the root logger itself.
    logging.getLogger().addFilter(lambda record: record.levelno >= logging.WARNING)
    try:
        # Read by torch at its first use of the device.
        prepare_process(options.device, host())
        device, proofs = choose_proven_device(options.device, options.home)
        threads = int(choose_threads(options.threads).value)
        plan = AttentionPlan(mode=choose_serving_attention(proofs).value)
        cache = EmbeddingCache(options.cache_bytes)
        models = partial(
            ModelSet,
            device=device.value,
            attention=plan,
            cache=cache,
            precision=_precision(options.precision, device.value),
            decode=options.decode,
            proofs=proofs,
        )
        asyncio.run(serve(options.socket, device.value, threads, options.message_bytes, models, cache))
    except CliptuneError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 2
    finally:
        flush_traces()
    return 0


async def serve(
    address: str,
    device: str,
    threads: int,
    message_bytes: int,
    make_models: Callable[..., ModelSet],
    cache: EmbeddingCache,
) -> None:
    """Serves until SIGTERM or SIGINT. `make_models` lacks the parts that are made here."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    on_cpu = device == "cpu"
    batch_items = _CPU_BATCH_ITEMS if on_cpu else _GPU_BATCH_ITEMS
    progress = Progress()
    # On a CPU forwards and decoding share the cores; beside a GPU decoding has them to itself.
    decoder = Decoder(threads=max(1, threads // 2) if on_cpu else threads, progress=progress)

    def exact_arithmetic() -> None:
        torch.set_num_threads(threads)
        torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]

    batcher = Batcher(
        progress=progress, threads=exact_arithmetic, config=BatcherConfig(max_items=batch_items)
    )
    models = make_models(batcher=batcher, decoder=decoder, decoded_ahead=2 * batch_items)
    expectation = Expectation(batcher, (decoder.image_stage, decoder.text_stage))
    admission = Admission(AdmissionLimits(total_bytes=2 * message_bytes), expectation.backlog_s)
    embedder = Embedder(
        batcher=batcher, decoder=decoder, admission=admission, expectation=expectation, cache=cache
    )
    inference = Inference(models=models, embedder=embedder, admission=admission)
    servicer = EngineServicer(
        inference=inference,
        models=models,
        batcher=batcher,
        progress=progress,
        decoder=decoder,
        admission=admission,
        cache=cache,
    )

    sizes = [(f"grpc.max_{way}_message_length", message_bytes) for way in ("send", "receive")]
    server = grpc.aio.server(interceptors=[Border()], options=sizes)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    batcher.start()
    await server.start()
    _announce({"address": address, "pid": os.getpid(), "device": device, "threads": threads})
    _end_with_stdin()

    await stop.wait()
    await server.stop(grace=_DRAIN_S)
    await batcher.close()
    decoder.close()
    models.close()


def _precision(wanted: str, device: str) -> str:
    """Exact where nothing else is asked for on a CPU: vectors then equal open_clip's and the trainer's."""
    return ("exact" if device == "cpu" else "auto") if wanted == "default" else wanted


def _announce(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    # Nobody reads any further: what a library prints must not fill the pipe.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def _end_with_stdin() -> None:
    """The daemon holds the other end: it closes when the daemon ends, however that happens."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os._exit(0)

    threading.Thread(target=wait, name="stdin", daemon=True).start()


def _end_with_parent() -> None:
    """Linux kills an engine whose daemon ends, also one that is stopped or hangs in its interpreter."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    # All is answered and flushed; the interpreter's teardown of torch would hold up a stop by a second.
    os._exit(status)
