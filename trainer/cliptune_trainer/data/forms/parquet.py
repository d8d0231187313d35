"""Reading a Hugging Face data set's folder: parquet files with image bytes, or paths of images.

Enters: a ".parquet" file, a pattern, or a folder of them. Leaves: a `Table`, its images named by file and
row; rows are numbered through all files. Called by `forms`. Captions and labels are read, images are not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from cliptune.errors import DataError
from cliptune_trainer.data.forms.columns import SPLITS, Columns, UnusableRow, Value, value_of
from cliptune_trainer.data.forms.file_names import find_files
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.source import ImageSource, ParquetCell
from cliptune_trainer.data.table import BadRow, Pair, Table
from cliptune_trainer.image.optional import needed
from cliptune_trainer.spec import DataConfig

_SPLIT: Final = re.compile(rf"(?:^|[-_./])({'|'.join(SPLITS)})(?=[-_./]|\d|$)", re.IGNORECASE)
_BATCH_ROWS: Final = 4096


def read_parquet(path: str, config: DataConfig, columns: Columns, roots: DataRoots) -> Table:
    """Reads every row but its image.

    Raises:
        DataError: a file cannot be read, there are no rows, or the image column holds no images.
        MissingColumnError: a column of the spec is not in a file.
        PathOutsideRootsError: a file, or an image that one names, lies outside the roots.
        ConflictError: pyarrow is not installed.
    """
    parquet = needed("pyarrow.parquet", "parquet", "reading parquet files")
    files = find_files(path, ".parquet", roots)
    splits = _splits(files) if not config.split_column else {}
    digest = hashlib.sha256()
    pairs: list[Pair] = []
    bad: list[BadRow] = []
    row = 0
    for file in files:
        try:
            status = file.stat()
            digest.update(f"{file}\n{status.st_size}\n{status.st_mtime_ns}\n".encode())
            with parquet.ParquetFile(file) as opened:
                for place, found in enumerate(_rows(opened, file, config, columns, roots)):
                    row += 1
                    # Paths inside parquet files are seldom unique: the place is.
                    reference = f"{file.name}/{place}"
                    try:
                        if found.image is None:
                            raise UnusableRow("no image")
                        split = splits.get(file, "")
                        pairs += columns.pairs(row, found.image, reference, found.fields, split=split)
                    except UnusableRow as unusable:
                        bad.append(BadRow(row=row, reason=f"{file.name}, row {place + 1}: {unusable}"))
        except (OSError, ValueError) as error:  # pyarrow's own are of these
            raise DataError(f"{file} cannot be read: {error}", file=file) from error
    if not row:
        raise DataError(f"{path} has no rows", file=path)
    return Table(
        path=Path(path),
        sha256=digest.hexdigest(),
        pairs=tuple(pairs),
        bad=tuple(bad),
        names_split=bool(splits or config.split_column),
    )


class _Row(NamedTuple):
    """A row's image, if it has one, and its texts by column."""

    image: ImageSource | None
    fields: dict[str, Value]


def _rows(opened: Any, file: Path, config: DataConfig, columns: Columns, roots: DataRoots) -> Iterator[_Row]:
    schema = opened.schema_arrow
    columns.check(schema.names, file)
    paths = _path_column(opened, file, config.image_column)
    texts = [name for name in {*columns.wanted.values(), config.caption_column} if name in schema.names]
    names = _class_names(schema, texts)
    image_root = roots.checked(Path(config.image_root)) if config.image_root else file.parent
    row = 0
    wanted = [*texts, paths] if paths else texts
    for batch in opened.iter_batches(batch_size=_BATCH_ROWS, columns=wanted, use_threads=False):
        values = batch.to_pydict()
        for place in range(batch.num_rows):
            image: ImageSource | None = None
            if not paths:
                image = ParquetCell(file, config.image_column, row)
            elif named := _path_of(values[config.image_column][place]):
                image = roots.checked(image_root / named)
            found = {name: value_of(_named(values[name][place], names.get(name))) for name in texts}
            yield _Row(image, {name: value for name, value in found.items() if value is not None})
            row += 1


def _path_column(opened: Any, file: Path, column: str) -> str:
    """Where the paths of images are; "": the column holds their bytes. Raises DataError."""
    held = opened.schema_arrow.field(column).type
    kind = str(held).removeprefix("large_")
    if kind.startswith("struct"):
        members = {held.field(place).name for place in range(held.num_fields)}
        if "bytes" in members and not ("path" in members and _all_null(opened, f"{column}.bytes")):
            return ""
        if "path" in members:
            return f"{column}.path"
    elif kind in ("binary", "string"):
        return column if kind == "string" else ""
    raise DataError(
        f"{file}: column {column!r} holds {held}; images are bytes, {{bytes, path}} or paths", file=file
    )


def _path_of(value: object) -> str:
    found = value.get("path") if isinstance(value, dict) else value
    return str(found or "")


def _all_null(opened: Any, column: str) -> bool:
    """Whether the file's statistics say that a column holds nothing: images are then named by their paths."""
    for group in range(opened.metadata.num_row_groups):
        chunks = opened.metadata.row_group(group)
        for place in range(chunks.num_columns):
            chunk = chunks.column(place)
            if chunk.path_in_schema == column:
                known = chunk.statistics
                if known is None or not known.has_null_count or known.null_count < chunk.num_values:
                    return False
                break
        else:
            return False
    return True


def _class_names(schema: Any, texts: Sequence[str]) -> dict[str, list[str]]:
    """Column → names of the classes that its numbers mean, where the data set says so."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    found = {column: _names_of(features.get(column)) for column in texts}
    return {column: names for column, names in found.items() if names}


def _names_of(feature: Any) -> list[str] | None:
    """Of a ClassLabel, or of a list of such."""
    if isinstance(feature, list):
        return _names_of(feature[0]) if feature else None
    if not isinstance(feature, dict):
        return None
    return list(feature["names"]) if "names" in feature else _names_of(feature.get("feature"))


def _named(value: object, names: list[str] | None) -> object:
    """A class's number as its name; -1 means none."""
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(entry, names) for entry in value]
    if isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return value


def _splits(files: Sequence[Path]) -> dict[Path, str]:
    """The split that each file's path names, when all name one, and not all the same."""
    found = {}
    for file in files:
        named = _SPLIT.findall("/".join(file.parts[-3:]))
        if not named:
            return {}
        found[file] = SPLITS[named[-1].lower()]
    return found if len(set(found.values())) > 1 else {}
