"""`cliptune demo`: the verb; the story is in `story.py`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cliptune.cli.verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "--home",
        type=Path,
        default=Path(".cliptune/demo"),
        metavar="DIR",
        help="home of the demo's daemon; kept, so that `cliptune serve --home DIR` serves the result "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="whole passes over the training images (default: half a one)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Tells the story on stderr and prints its result as one JSON line on stdout."""
    from cliptune_trainer.demo.story import DemoConfig, tell

    config = DemoConfig(home=arguments.home.resolve(), device=arguments.device)
    if arguments.epochs is not None:
        config = config.with_epochs(arguments.epochs)
    print(json.dumps(tell(config)))
    return 0


demo = Verb(
    name="demo",
    summary="fine-tune cliptune-mini on real solar cell images, watch, serve the result, classify",
    examples=("cliptune demo", "cliptune demo --epochs 4 --home /tmp/demo"),
    add_arguments=add_arguments,
    run=run,
    extra="demo",
)
