"""Much at once: bulk streams of JPEG files and of raw pixels at the model's size, and one image alone.

A bulk stream of files stands beside the bare forward, in batches of just that size; one of raw pixels beside
the same stream to a daemon that remembers its embeddings: decoding aside, that is what the transport can do
at most. Callers are processes of their own. One image alone, from the request to the answer, stands beside a
bare forward of one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from bench.record import Row, gpu, report
from bench.served_model import MODEL, served_model
from bench.turns import seconds
from cliptune import Client
from cliptune_model.clip import Clip
from cliptune_model.machine.device import choose_threads
from tests.support.images import jpeg

ITEMS = {"JPEG files": "file", "raw pixels": "pixels"}


def item(kind: str, side: int) -> bytes | np.ndarray:
    """One image of the kind, of the model's own size."""
    if kind == "file":
        return jpeg(size=side)
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def streamed(address: str, kind: str, side: int, count: int) -> int:
    """One caller's bulk stream of so many images; how many were answered."""
    one = item(kind, side)
    with Client(address) as client:
        items = (one for _ in range(count))
        return sum(1 for _ in client.embed_stream(items, "images", model=MODEL, max_in_flight=256))


def rate(
    address: str, kind: str, side: int, count: int, callers: ProcessPoolExecutor, processes: int
) -> float:
    """Images a second of all callers together, after a short stream that warms everything up."""
    for many in (max(1, count // 10), count):
        began_s = time.perf_counter()
        streams = [callers.submit(streamed, address, kind, side, many) for _ in range(processes)]
        answered = sum(stream.result() for stream in streams)
        took_s = time.perf_counter() - began_s
    return answered / took_s


def alone_s(address: str, side: int, repetitions: int) -> float:
    """Median seconds of one image of raw pixels, with nobody else there."""
    one = item("pixels", side)
    with Client(address) as client:

        def ask() -> None:
            client.embed_images([one], model=MODEL)

        for _ in range(3):
            ask()
        return statistics.median(seconds(ask)() for _ in range(repetitions))


@torch.inference_mode()
def forward_s(clip: Clip, batch: int, repetitions: int) -> float:
    """Median seconds of the bare forward, copies to and from the device included."""
    images = torch.randn(batch, 3, *clip.image_size)

    def forward() -> None:
        torch.nn.functional.normalize(clip.encode_images(images.to(clip.device)), dim=-1).cpu()

    for _ in range(3):
        forward()
    return statistics.median(seconds(forward)() for _ in range(repetitions))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32", help="architecture (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="exact", help="exact or auto; the bare forward is fp32")
    parser.add_argument("--decode", default="exact", help="exact or fast")
    parser.add_argument("--images", type=int, default=200, help="of each stream (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="of the bare forward (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    threads = int(choose_threads(None).value)
    torch.set_num_threads(threads)
    flags = ("--precision", arguments.precision, "--decode", arguments.decode)
    found: dict[str, float] = {}
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.callers, mp_context=spawned) as callers:
        for cached in (False, True):
            memory = ("--embedding-cache", "64MiB") if cached else ()
            with served_model(
                arguments.model, threads=threads, device=arguments.device, flags=(*flags, *memory)
            ) as (daemon, clip):
                side = clip.image_size[0]
                for name, kind in ITEMS.items():
                    case = f"{name}, remembered" if cached else name
                    found[case] = rate(daemon.grpc, kind, side, arguments.images, callers, arguments.callers)
                if not cached:
                    found["one"] = alone_s(daemon.grpc, side, arguments.repetitions)
                    found["bare one"] = forward_s(clip, 1, arguments.repetitions)
                    found["bare"] = arguments.batch / forward_s(clip, arguments.batch, arguments.repetitions)
    case = f"{arguments.model} {{}}, {arguments.precision}, {arguments.callers} callers"
    bare = f"bare forward, batches of {arguments.batch}"
    on_gpu = arguments.device.startswith("cuda")
    report(
        "bulk",
        [
            Row(
                case=case.format("JPEG files"),
                ours=found["JPEG files"],
                peer=found["bare"],
                peer_name=bare,
                unit="images/s",
            ),
            Row(
                case=case.format("raw pixels"),
                ours=found["raw pixels"],
                peer=found["raw pixels, remembered"],
                peer_name="the same, remembered: no forward",
                unit="images/s",
            ),
            Row(
                case=case.format("raw pixels"),
                ours=found["raw pixels"],
                peer=found["bare"],
                peer_name=bare,
                unit="images/s",
            ),
            Row(
                case=case.format("one image of raw pixels, p50"),
                ours=1e3 * found["one"],
                peer=1e3 * found["bare one"],
                peer_name="bare forward of one",
                unit="ms",
            ),
        ],
        device=gpu(torch.cuda.get_device_name()) if on_gpu else None,
    )


if __name__ == "__main__":
    main()
