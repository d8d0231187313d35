"""Images and texts a second through the daemon, beside a bare open_clip loop over the same model and cores.

Callers of ours ask for one item at a time over gRPC, 1, 8 or 32 at once. The peer has no network and no
queue: it decodes, preprocesses and runs batches of just that size in this process, with one thread and with
as many as there are cores, of which the better counts. JPEG files of 256 × 256 pixels, photos of 640 × 480,
captions of a few words. Both may use all cores; ours shares them with its callers.

With `--litserve PYTHON` (an interpreter that has litserve, torch and open_clip) LitServe with the same
weights and open_clip's eager forward, asked for the same photos over HTTP by as many callers, is another
peer.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import torch

from bench.litserve_peer import litserve
from bench.photos import photo
from bench.record import Row, gpu, report
from bench.served_model import MODEL, served_model
from bench.turns import medians
from cliptune import AsyncClient
from cliptune_model.clip import Clip
from cliptune_model.machine.device import choose_threads
from cliptune_model.pixels import decode_image
from tests.support.images import COLOURS, SHAPES, caption, jpeg

CONCURRENCY = (1, 8, 32)
JPEG = jpeg(size=256)
PHOTO = photo(0)
FILES = {"images": JPEG, "photos": PHOTO}
TEXT = caption(next(iter(COLOURS)), SHAPES[0])


async def _ask(address: str, kind: str, callers: int, window_s: float) -> float:
    async with AsyncClient(address) as client:
        answered = 0
        began = time.perf_counter()

        async def caller() -> None:
            nonlocal answered
            while time.perf_counter() - began < window_s:
                if kind in FILES:
                    await client.embed_images([FILES[kind]], model=MODEL)
                else:
                    await client.embed_texts([TEXT], model=MODEL)
                answered += 1

        await asyncio.gather(*(caller() for _ in range(callers)))
        return answered / (time.perf_counter() - began)


def ours(address: str, kind: str, callers: int, window_s: float) -> float:
    """Items a second, until the last answer."""
    return asyncio.run(_ask(address, kind, callers, window_s))


@torch.inference_mode()
def bare(clip: Clip, kind: str, batch: int, window_s: float, threads: int) -> float:
    """Items a second of the loop that one would write by hand."""
    torch.set_num_threads(threads)
    done = 0
    began = time.perf_counter()
    while time.perf_counter() - began < window_s:
        if kind in FILES:
            images_BCHW = torch.stack([clip.preprocess(decode_image(FILES[kind])) for _ in range(batch)])
            vectors_BD = clip.encode_images(images_BCHW.to(clip.device))
        else:
            vectors_BD = clip.encode_texts(clip.tokenize([TEXT] * batch).to(clip.device))
        torch.nn.functional.normalize(vectors_BD, dim=-1).cpu().numpy()
        done += batch
    return done / (time.perf_counter() - began)


async def _ask_litserve(url: str, callers: int, window_s: float) -> float:
    limits = httpx.Limits(max_connections=callers)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600) as client:
        answered = 0
        began = time.perf_counter()

        async def caller() -> None:
            nonlocal answered
            while time.perf_counter() - began < window_s:
                answer = await client.post("/predict", files={"image": ("x.jpg", PHOTO)})
                answer.raise_for_status()
                answered += 1

        await asyncio.gather(*(caller() for _ in range(callers)))
        return answered / (time.perf_counter() - began)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32", help="architecture (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--window", dest="window_s", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--kinds", nargs="+", default=[*FILES, "texts"], choices=[*FILES, "texts"])
    parser.add_argument("--callers", nargs="+", type=int, default=CONCURRENCY)
    parser.add_argument("--litserve", default="", metavar="PYTHON", help="interpreter that has litserve")
    parser.add_argument("--device", default="cpu", help="of both sides (default: %(default)s)")
    parser.add_argument("--precision", default="exact", help="ours: exact or auto; the bare loop is fp32")
    parser.add_argument("--decode", default="exact", help="ours: exact or fast")
    arguments = parser.parse_args()
    threads = int(choose_threads(None).value)
    window_s: float = arguments.window_s
    rows = []
    with ExitStack() as stack:
        daemon, clip = stack.enter_context(
            served_model(
                arguments.model,
                threads=threads,
                device=arguments.device,
                flags=("--precision", arguments.precision, "--decode", arguments.decode),
            )
        )
        other = ""
        if arguments.litserve:
            folder: Path = daemon.home / "models" / MODEL / "1"
            other = stack.enter_context(litserve(arguments.litserve, folder, threads=threads))
        for kind in arguments.kinds:
            for many in arguments.callers:
                sides: dict[str, Callable[[], float]] = {
                    "ours": partial(ours, daemon.grpc, kind, many, window_s),
                    "one thread": partial(bare, clip, kind, many, window_s, 1),
                    "all threads": partial(bare, clip, kind, many, window_s, threads),
                }
                if kind == "photos" and other:
                    sides["litserve"] = lambda many=many: asyncio.run(  # type: ignore[misc]
                        _ask_litserve(other, many, window_s)
                    )
                found = medians(sides, arguments.repetitions)
                if "litserve" in found:
                    rows.append(
                        Row(
                            case=f"{arguments.model} {kind}, {many} at once",
                            ours=found["ours"],
                            peer=found["litserve"],
                            peer_name="LitServe, open_clip",
                            unit=f"{kind}/s",
                        )
                    )
                rows.append(
                    Row(
                        case=f"{arguments.model} {kind}, {many} at once",
                        ours=found["ours"],
                        peer=max(found["one thread"], found["all threads"]),
                        peer_name=f"open_clip, batches of {many}",
                        unit=f"{kind}/s",
                    )
                )
    on_gpu = arguments.device.startswith("cuda")
    report("serving", rows, device=gpu(torch.cuda.get_device_name()) if on_gpu else None)


if __name__ == "__main__":
    main()
