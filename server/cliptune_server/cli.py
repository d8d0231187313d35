"""`cliptune serve`: flags in, one daemon, its exit status out.

When the ports answer, exactly one line of JSON goes to stdout, for programs that started us; everything else
is log, on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cliptune.cli.verb import Verb

if TYPE_CHECKING:
    from cliptune_server.daemon import Serving

DEFAULT_HOME: Final = "~/.cliptune"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--home",
        type=Path,
        default=Path(os.environ.get("CLIPTUNE_HOME") or DEFAULT_HOME),
        help="folder of all state; one daemon each (default: $CLIPTUNE_HOME or ~/.cliptune)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; there is no authentication (default: %(default)s)",
    )
    parser.add_argument(
        "--grpc-port", type=int, default=50051, help="0: any free port (default: %(default)s)"
    )
    parser.add_argument("--http-port", type=int, default=8000, help="0: any free port (default: %(default)s)")
    parser.add_argument(
        "--device", default="auto", help="of inference: auto, cpu, mps, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of inference (default: it chooses)")
    parser.add_argument(
        "--no-standby",
        dest="standby",
        action="store_false",
        help="keep no second inference process ready: saves memory, and a dead one is replaced later",
    )
    parser.add_argument(
        "--precision",
        default="default",
        choices=("default", "exact", "auto"),
        help="of inference: exact (fp32), or auto, the fastest whose embeddings have a cosine of at least"
        " 0.999 to it (default: exact on a CPU, auto elsewhere)",
    )
    parser.add_argument(
        "--decode",
        default="exact",
        choices=("exact", "fast"),
        help="of JPEG files: as open_clip does, or at a part of their size where that leaves a cosine of at"
        " least 0.999 (default: %(default)s)",
    )
    parser.add_argument(
        "--embedding-cache",
        dest="embedding_cache_bytes",
        type=_size,
        default=64 * 1024 * 1024,
        metavar="SIZE",
        help="memory for embeddings that may be asked for again; 0: none (default: 64MiB)",
    )
    parser.add_argument(
        "--no-yield",
        dest="yield_to_inference",
        action="store_false",
        help="let jobs train on while requests are answered on the same GPU: both get slower",
    )
    parser.add_argument(
        "--data-root",
        dest="data_roots",
        type=Path,
        action="append",
        metavar="FOLDER",
        help="folder that jobs may read data from; repeat for several (default: the working directory)",
    )
    parser.add_argument(
        "--data-quota",
        dest="data_quota_bytes",
        type=_size,
        default=0,
        metavar="SIZE",
        help="what uploaded data sets may take, such as 200GiB (default: no limit but the disk)",
    )
    parser.add_argument(
        "--allow-code",
        dest="code_folders",
        type=Path,
        action="append",
        metavar="FOLDER",
        help="folder whose Python files jobs may run as a loss or a similarity of their own; repeat for"
        " several (default: none)",
    )
    parser.add_argument(
        "--image-host",
        dest="image_hosts",
        action="append",
        metavar="HOST",
        help="host that /v1/embeddings may fetch images from, such as images.example.com or *.example.com;"
        " repeat for several (default: none)",
    )
    parser.add_argument(
        "--private-image-hosts",
        action="store_true",
        help="--image-host may have an address that is not public, and any port",
    )
    parser.add_argument(
        "--default-model",
        default="cliptune-mini",
        metavar="NAME",
        help="pretrained model that is served while nothing else is, or none (default: %(default)s)",
    )
    parser.add_argument(
        "--grace",
        dest="grace_s",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="time for calls in flight and checkpoints at a stop (default: %(default)s)",
    )
    parser.add_argument(
        "--log-level", default="info", choices=("debug", "info", "warning", "error"), help="(default: info)"
    )


def _run(arguments: argparse.Namespace) -> int:
    import asyncio
    import gc

    # A collection while importing finds nothing and costs a fifth of the start.
    gc.disable()
    from cliptune.telemetry import configure_logging, configure_tracing
    from cliptune_server.config import DatasetsConfig, ServerConfig
    from cliptune_server.daemon import Daemon

    gc.freeze()
    gc.enable()
    config = ServerConfig(
        home=arguments.home,
        host=arguments.host,
        grpc_port=arguments.grpc_port,
        http_port=arguments.http_port,
        device=arguments.device,
        threads=arguments.threads,
        standby=arguments.standby,
        precision=arguments.precision,
        decode=arguments.decode,
        embedding_cache_bytes=arguments.embedding_cache_bytes,
        yield_to_inference=arguments.yield_to_inference,
        data_roots=tuple(arguments.data_roots or (Path.cwd(),)),
        code_folders=tuple(arguments.code_folders or ()),
        datasets=DatasetsConfig(quota_bytes=arguments.data_quota_bytes),
        image_hosts=tuple(arguments.image_hosts or ()),
        private_image_hosts=arguments.private_image_hosts,
        default_model="" if arguments.default_model == "none" else arguments.default_model,
        grace_s=arguments.grace_s,
        log_level=arguments.log_level,
    )
    configure_logging(config.log_level, "cliptune-daemon")
    flush_traces = configure_tracing("cliptune-daemon")

    async def serve() -> None:
        await Daemon(config).run(_announce)

    try:
        asyncio.run(serve())
    finally:
        flush_traces()
    return 0


def _size(text: str) -> int:
    """ "200GiB", "1.5 TB" or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 200GiB, 500MB or a number of bytes")
    power = " KMGT".index(match[2].upper() or " ")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit**power)


def _announce(serving: Serving) -> None:
    line = {
        "cliptune": "serving",
        "grpc": serving.grpc,
        "http": serving.http,
        "home": str(serving.home),
        "pid": serving.pid,
    }
    print(json.dumps(line), flush=True)


serve: Final = Verb(
    name="serve",
    summary="run the daemon: fine-tuning jobs, inference and models, over gRPC and HTTP",
    examples=(
        "cliptune serve",
        "cliptune serve --data-root ~/datasets --device cuda:0",
        "cliptune serve --home /srv/cliptune --grpc-port 0 --http-port 0",
    ),
    add_arguments=_add_arguments,
    run=_run,
    extra="server",
)
