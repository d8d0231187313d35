"""`cliptune data ...`: data sets that lie with the daemon: upload, list, look into, delete."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Final

from cliptune.cli.connection import (
    add_address,
    add_json,
    connect,
    mapping,
    moment,
    note,
    print_json,
    print_table,
)
from cliptune.cli.verb import Verb
from cliptune.client import Client
from cliptune.dataset import Dataset, DatasetPreview
from cliptune.errors import InvalidInputError
from cliptune.lines import size

_CELL_CHARS: Final = 40


def _upload(client: Client, options: argparse.Namespace) -> int:
    dataset = client.upload_dataset(
        options.path,
        name=options.name,
        entry=options.entry,
        image_column=options.image_column,
        progress=sys.stderr.isatty() and not options.json,
    )
    if options.json:
        print_json(mapping(dataset.message))
        return 0
    print(f"{dataset.name}: {_what(dataset)}")
    note(f'a job reads it as data.train = "{dataset.reference}"')
    return 0


def _list(client: Client, options: argparse.Namespace) -> int:
    found = client.list_datasets()
    if options.json:
        print_json(mapping(found.message))
        return 0
    rows = [
        (each.name, each.entry or "(all files)", f"{each.files:,}", size(each.bytes), moment(each.created))
        for each in found
    ]
    print_table(("NAME", "ENTRY", "FILES", "SIZE", "CREATED"), rows)
    may = f" of {size(found.quota_bytes)}" if found.quota_bytes else ""
    note(f"{size(found.used_bytes)}{may} used")
    return 0


def _show(client: Client, options: argparse.Namespace) -> int:
    found = client.get_dataset(options.name, samples=options.samples)
    if options.pictures is not None:
        page = _write_pictures(found, options.pictures)
    if options.json:
        print_json(mapping(found.message))
        return 0
    print(f"{found.dataset.name}: {_what(found.dataset)}")
    print(f"created {moment(found.dataset.created)}, sha256 {found.dataset.sha256}")
    if found.rows >= 0:
        print(f"{found.rows:,} rows")
    if found.samples:
        rows = [
            (
                sample.row,
                *(_cell(sample.fields.get(name, "")) for name in found.columns),
                _picture(sample.jpeg),
            )
            for sample in found.samples
        ]
        print_table(("ROW", *(name.upper() for name in found.columns), "PICTURE"), rows)
    if options.pictures is not None:
        note(f"pictures: {page}")
    return 0


def _delete(client: Client, options: argparse.Namespace) -> int:
    client.delete_dataset(options.name)
    return 0


def _what(dataset: Dataset) -> str:
    return f"{dataset.entry or 'all files'}, {dataset.files:,} files, {size(dataset.bytes)}"


def _cell(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _CELL_CHARS else f"{line[: _CELL_CHARS - 1]}…"


def _picture(jpeg: bytes | None) -> str:
    return "-" if jpeg is None else size(len(jpeg))


def _write_pictures(found: DatasetPreview, folder: Path) -> Path:
    """The samples' pictures, and a page that shows them with their rows."""
    figures = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for sample in found.samples:
            fields = "<br>".join(
                f"<b>{escape(name)}</b> {escape(text)}" for name, text in sample.fields.items()
            )
            picture = "<p>no picture</p>"
            if sample.jpeg is not None:
                name = f"{found.dataset.name}-{sample.row}.jpg"
                (folder / name).write_bytes(sample.jpeg)
                picture = f'<img src="{escape(name)}" alt="row {sample.row}">'
            figures.append(f"<figure>{picture}<figcaption>row {sample.row}<br>{fields}</figcaption></figure>")
        page = folder / "index.html"
        page.write_text(
            f'<!doctype html><meta charset="utf-8"><title>{escape(found.dataset.name)}</title><style>'
            "body{display:flex;flex-wrap:wrap;font:13px sans-serif}figure{width:200px}</style>"
            + "\n".join(figures),
            encoding="utf-8",
        )
    except OSError as error:
        raise InvalidInputError(f"{folder} cannot be written: {error.strerror}", path=folder) from error
    return page


def _samples(text: str) -> int:
    count = int(text)
    if not 0 <= count <= 64:
        raise argparse.ArgumentTypeError(f"{count} is not between 0 and 64")
    return count


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(
        name: str, summary: str, run: Callable[[Client, argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=summary, description=summary)
        add_json(sub)
        add_address(sub)
        sub.set_defaults(action_run=run)
        return sub

    upload = action("upload", "bring a folder, or a table with its images, to the daemon", _upload)
    upload.add_argument("path", help="a folder, or a CSV, TSV or JSON-lines file whose images lie below it")
    upload.add_argument("--name", default="", help="default: the folder's or the table's")
    upload.add_argument(
        "--entry", default="", help="what a job reads of a folder: a table, a shard pattern, a folder in it"
    )
    upload.add_argument(
        "--image-column", default="image", help="of a table given as PATH (default: %(default)s)"
    )
    action("list", "list data sets", _list)
    show = action("show", "show a data set with sample rows", _show)
    show.add_argument("name")
    show.add_argument("--samples", type=_samples, default=8, help="rows, at most 64 (default: %(default)s)")
    show.add_argument(
        "--pictures", type=Path, metavar="DIR", help="save the samples' pictures and a page of them there"
    )
    delete = action("delete", "remove a data set that no job uses, or what was uploaded of one", _delete)
    delete.add_argument("name")


def _run(options: argparse.Namespace) -> int:
    with connect(options) as client:
        status: int = options.action_run(client, options)
        return status


data = Verb(
    name="data",
    summary="upload data sets to the daemon, list, show and delete them",
    examples=(
        "cliptune data upload ./solar-cells               # a folder",
        "cliptune data upload cells.csv --name cells      # a table and the images that it names",
        "cliptune data show cells --pictures /tmp/cells   # sample rows, and a page of pictures",
        "cliptune data delete cells",
        "",
        'a job reads an uploaded data set as data.train = "dataset:cells"',
        "an upload that was broken off goes on where it was when it is called again",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
