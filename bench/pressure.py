"""More than it can do: goodput and latency at three times the load, and beside bulk that never ends.

One daemon on the CPU, images of 256 × 256. First its peak: 32 callers that ask again when they are answered.
Then callers that come at three times that rate, whether others are answered or not, each with a deadline:
goodput is what was answered in time. Then one caller that asks for one image at a time while a bulk stream
has more than the daemon can do; its 99th percentile stands beside the time of two batches.

The callers share the cores with the daemon: a model so small that asking costs as much as answering measures
them, and not it.
"""

from __future__ import annotations

import argparse
import asyncio
import time

import numpy as np

from bench.record import Row, report
from bench.served_model import MODEL, served_model
from cliptune import AsyncClient, CliptuneError
from cliptune_model.machine.device import choose_threads
from tests.support.images import jpeg

JPEG = jpeg(size=256)
CALLERS = 32
OVERLOAD = 3.0


async def peak(address: str, window_s: float) -> float:
    """Images a second of callers that wait for their answers."""
    async with AsyncClient(address) as client:
        answered = 0
        began = time.perf_counter()

        async def caller() -> None:
            nonlocal answered
            while time.perf_counter() - began < window_s:
                await client.embed_images([JPEG], model=MODEL)
                answered += 1

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return answered / (time.perf_counter() - began)


async def overload(
    address: str, rate: float, deadline_s: float, window_s: float
) -> tuple[float, float, dict[str, int]]:
    """Images a second answered in time, the 99th percentile of their latency in s, and other outcomes."""
    took: list[float] = []
    outcomes: dict[str, int] = {}

    async with AsyncClient(address, attempts=1) as client:

        async def caller() -> None:
            began = time.perf_counter()
            try:
                await client.embed_images([JPEG], model=MODEL, timeout_s=deadline_s)
            except CliptuneError as error:
                name = type(error).__name__
                outcomes[name] = outcomes.get(name, 0) + 1
            else:
                took.append(time.perf_counter() - began)

        began = time.perf_counter()
        callers = []
        for number in range(int(rate * window_s)):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            callers.append(asyncio.create_task(caller()))
        await asyncio.gather(*callers)
        seconds = time.perf_counter() - began
    in_time = sum(took_s <= deadline_s for took_s in took)
    return in_time / seconds, float(np.quantile(took, 0.99)) if took else float("inf"), outcomes


async def beside_bulk(address: str, requests: int) -> tuple[float, float]:
    """The 99th percentile of interactive latency, and the longest forward that one of them was in, in s."""
    async with AsyncClient(address) as client, AsyncClient(address) as other:

        async def bulk() -> None:
            while True:
                await other.embed_many([JPEG] * 256, "images", model=MODEL, max_in_flight=128)

        saturating = asyncio.create_task(bulk())
        await asyncio.sleep(5.0)
        took: list[float] = []
        forwards: list[float] = []
        for _ in range(requests):
            began = time.perf_counter()
            answer = await client.embed_images([JPEG], model=MODEL)
            took.append(time.perf_counter() - began)
            if answer.profile is not None:
                forwards.append(answer.profile.forward_s)
        saturating.cancel()
        await asyncio.gather(saturating, return_exceptions=True)
    return float(np.quantile(took, 0.99)), max(forwards)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32", help="architecture (default: %(default)s)")
    parser.add_argument("--window", dest="window_s", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--deadline", dest="deadline_s", type=float, default=3.0, metavar="SECONDS")
    parser.add_argument("--requests", type=int, default=40, help="beside bulk (default: %(default)s)")
    arguments = parser.parse_args()
    threads = int(choose_threads(None).value)
    with served_model(arguments.model, threads=threads) as (daemon, _):
        asyncio.run(peak(daemon.grpc, 3.0))
        best = asyncio.run(peak(daemon.grpc, arguments.window_s / 2))
        goodput, p99_s, outcomes = asyncio.run(
            overload(daemon.grpc, OVERLOAD * best, arguments.deadline_s, arguments.window_s)
        )
        interactive_s, batch_s = asyncio.run(beside_bulk(daemon.grpc, arguments.requests))
    print(f"not answered in time: {outcomes}")
    name = arguments.model
    report(
        "pressure",
        [
            Row(
                case=f"{name}, goodput at {OVERLOAD:g} times the peak's load",
                ours=goodput,
                peer=best,
                peer_name="its peak",
                unit="images/s",
            ),
            Row(
                case=f"{name}, p99 of what was answered then",
                ours=1e3 * p99_s,
                peer=1e3 * arguments.deadline_s,
                peer_name="the deadline",
                unit="ms",
            ),
            Row(
                case=f"{name}, interactive p99 beside a bulk stream",
                ours=1e3 * interactive_s,
                peer=2e3 * batch_s,
                peer_name="two batches",
                unit="ms",
            ),
        ],
    )


if __name__ == "__main__":
    main()
