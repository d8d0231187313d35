"""What the client verbs share: the address option, the client behind it, and how answers are printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from cliptune.client import Client


def add_address(parser: argparse.ArgumentParser) -> None:
    """`--address`, for every verb that talks to a daemon."""
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="of the daemon's gRPC (default: $CLIPTUNE_ADDRESS, else the daemon of $CLIPTUNE_HOME)",
    )


def add_json(parser: argparse.ArgumentParser, what: str = "JSON") -> None:
    """`--json`, for programs that read the answer."""
    parser.add_argument("--json", action="store_true", help=f"print {what}")


def connect(options: argparse.Namespace) -> Client:
    """The client for `--address`; it connects at its first call."""
    return Client(options.address)


def mapping(message: Message) -> dict[str, Any]:
    """A message in its JSON form, with the names of the contract."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def print_json(content: object, *, indent: int | None = 2) -> None:
    """To stdout; `indent=None`: one line."""
    print(json.dumps(content, indent=indent, ensure_ascii=False), flush=True)


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as they need to be, to stdout."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        padded = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(padded.rstrip())


def note(text: str) -> None:
    """A line for the person, not for the pipe: to stderr."""
    print(text, file=sys.stderr, flush=True)


def moment(time: datetime | None) -> str:
    """A time in the local zone, to the second; "-" for none."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S") if time is not None else "-"
