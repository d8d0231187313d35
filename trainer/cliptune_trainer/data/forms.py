"""Which form a data set has, and who reads it.

Enters: what a spec names. Leaves: a `Table`. Called by `dataset`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from cliptune.errors import DataError
from cliptune_trainer.data.columns import Columns
from cliptune_trainer.data.delimited import read_delimited
from cliptune_trainer.data.image_folder import holds_images, read_image_folder
from cliptune_trainer.data.json_lines import read_json_lines
from cliptune_trainer.data.parquet import read_parquet
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.shards import read_shards
from cliptune_trainer.data.table import Table
from cliptune_trainer.spec import DataConfig

_SHARDS: Final = (".tar", ".tar.gz", ".tgz")
_JSON_LINES: Final = (".jsonl", ".ndjson")
_TABLES: Final = (".csv", ".tsv", ".tab", *_JSON_LINES)


def read_table(
    path: str,
    config: DataConfig,
    roots: DataRoots,
    *,
    label_names: Mapping[str, str] | None = None,
    cache: Path | None = None,
) -> Table:
    """Reads and checks the rows of a data set of any form.

    Args:
        path: a file, a pattern of shards or parquet files, or a folder.
        config: names the columns.
        roots: folders that may be read.
        label_names: what labels are called in captions made from them.
        cache: folder where an index of shards is kept.

    Raises:
        DataError: it cannot be read, or has no rows.
        MissingColumnError: a column of the spec is not there.
        PathOutsideRootsError: it, or an image in it, lies outside the roots.
        ConflictError: the package that reads such files is not installed.
    """
    names = label_names or {}
    columns = Columns(config, names)
    lower = path.lower()
    if lower.endswith(_SHARDS):
        return read_shards(path, config, columns, roots, cache)
    if lower.endswith(".parquet"):
        return read_parquet(path, config, columns, roots)
    if lower.endswith(_JSON_LINES):
        return read_json_lines(path, config, columns, roots)
    folder = roots.table(path)
    if not folder.is_dir():
        return read_delimited(path, config, columns, roots)
    if _any(folder.rglob("*.tar")):
        return read_shards(path, config, columns, roots, cache)
    if _any(folder.rglob("*.parquet")):
        return read_parquet(path, config, columns, roots)
    if _any(folder.rglob("*.arrow")):
        raise DataError(
            f"{folder} was written by save_to_disk (.arrow files): write it with to_parquet instead",
            file=folder,
        )
    if holds_images(folder):
        return read_image_folder(folder, config, names, roots)
    tables = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _TABLES)
    hint = f"; data.train may be a table in it: {', '.join(tables[:5])}" if tables else ""
    raise DataError(
        f"{folder} holds no .tar shards, no .parquet files, and no folders of images{hint}", file=folder
    )


def _any(found: Iterator[Path]) -> bool:
    return next(found, None) is not None
