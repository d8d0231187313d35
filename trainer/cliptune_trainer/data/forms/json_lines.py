"""Reading JSON lines of image-caption pairs: an object a line, whose fields are the columns.

Enters: a file and the names of its columns. Leaves: a `Table`; a row's number is its line's. Called by
`forms`. A field may be a list: several captions of an image, or several labels. Images are named here, not
opened.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cliptune.errors import DataError
from cliptune_trainer.data.forms.columns import Columns, UnusableRow, Value, value_of
from cliptune_trainer.data.forms.delimited import read_file
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.table import BadRow, Pair, Table
from cliptune_trainer.spec import DataConfig


def read_json_lines(path: str, config: DataConfig, columns: Columns, roots: DataRoots) -> Table:
    """Reads and checks every line.

    Raises:
        DataError: the file cannot be read or has no rows.
        MissingColumnError: no row has a column of the spec.
        PathOutsideRootsError: the file, or an image in it, lies outside the roots.
    """
    file = roots.table(path)
    content = read_file(file)
    image_root = roots.checked(Path(config.image_root)) if config.image_root else file.parent
    pairs: list[Pair] = []
    bad: list[BadRow] = []
    objects = 0
    for row, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json_fields(line)
            objects += 1
            image = fields.get(config.image_column, "")
            if not isinstance(image, str) or not image:
                columns.note(fields)
                raise UnusableRow("no image")
            pairs += columns.pairs(row, roots.checked(image_root / image), image, fields)
        except UnusableRow as unusable:
            bad.append(BadRow(row=row, reason=str(unusable)))
    if not pairs and not bad:
        raise DataError(f"{file} has no rows", file=file)
    if objects:
        columns.check_seen(file)
    return Table(
        path=file,
        sha256=hashlib.sha256(content).hexdigest(),
        pairs=tuple(pairs),
        bad=tuple(bad),
        names_split=bool(config.split_column),
    )


def json_fields(line: bytes) -> dict[str, Value]:
    """The texts, numbers and lists of them in a JSON object. Raises UnusableRow."""
    try:
        loaded = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UnusableRow("not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise UnusableRow(f"not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise UnusableRow("no object")
    found = {name: value_of(value) for name, value in loaded.items()}
    return {name: value for name, value in found.items() if value is not None}
