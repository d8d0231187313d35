"""What one request costs on its way: gRPC and REST beside the bare forward pass, and calls that do nothing.

One caller, one text or one image, a tiny model, so that the way is most of it. The call that does nothing is
a health check, beside the same check of a bare server with the same libraries.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import grpc
import httpx
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.bare_server import bare_server
from bench.record import Row, report
from bench.served_model import MODEL, served_model
from bench.turns import medians, seconds
from cliptune import Client
from cliptune_model.pixels import decode_image
from tests.support.images import jpeg

TEXT = "a red circle"
IMAGE = jpeg(size=256)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cliptune-tiny-vit", help="architecture (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    check = health_pb2.HealthCheckRequest()
    with (
        served_model(arguments.model, threads=1) as (daemon, clip),
        bare_server() as bare,
        Client(daemon.grpc) as client,
        httpx.Client(base_url=daemon.url) as rest,
        httpx.Client(base_url=f"http://{bare['http']}") as bare_rest,
        grpc.insecure_channel(daemon.grpc) as channel,
        grpc.insecure_channel(bare["grpc"]) as bare_channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        bare_health = health_pb2_grpc.HealthStub(bare_channel)

        @torch.inference_mode()
        def forward() -> None:
            torch.nn.functional.normalize(clip.encode_texts(clip.tokenize([TEXT])), dim=-1).numpy()

        @torch.inference_mode()
        def forward_image() -> None:
            image_1CHW = clip.preprocess(decode_image(IMAGE))[None]
            torch.nn.functional.normalize(clip.encode_images(image_1CHW), dim=-1).numpy()

        sides: dict[str, Callable[[], object]] = {
            "forward": forward,
            "forward image": forward_image,
            "grpc image": lambda: client.embed_images([IMAGE], model=MODEL),
            "grpc": lambda: client.embed_texts([TEXT], model=MODEL),
            "rest": lambda: rest.post(
                "/v1/embeddings", json={"model": MODEL, "input": TEXT}
            ).raise_for_status(),
            "grpc nothing": lambda: health.Check(check),
            "bare grpc nothing": lambda: bare_health.Check(check),
            "rest nothing": lambda: rest.get("/healthz").raise_for_status(),
            "bare rest nothing": lambda: bare_rest.get("/healthz").raise_for_status(),
        }
        timed = {side: seconds(do) for side, do in sides.items()}
        found_s = medians(timed, arguments.repetitions, warm=20)

    def row(case: str, ours: str, peer: str, peer_name: str) -> Row:
        return Row(
            case=case, ours=1e3 * found_s[ours], peer=1e3 * found_s[peer], peer_name=peer_name, unit="ms"
        )

    report(
        "latency",
        [
            row("embed a text over gRPC", "grpc", "forward", "open_clip in this process"),
            row("embed an image over gRPC", "grpc image", "forward image", "open_clip in this process"),
            row("embed a text over REST", "rest", "forward", "open_clip in this process"),
            row("embed a text over gRPC", "grpc", "rest", "ours over REST"),
            row("nothing over gRPC", "grpc nothing", "bare grpc nothing", "grpc.aio alone"),
            row("nothing over REST", "rest nothing", "bare rest nothing", "FastAPI and uvicorn alone"),
        ],
    )


if __name__ == "__main__":
    main()
