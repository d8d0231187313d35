"""Which form a data set has, and who reads it.

Enters: what a spec names. Leaves: a `Table`. Called by `dataset`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cliptune.errors import DataError
from cliptune_trainer.data.forms.columns import Columns, Wording
from cliptune_trainer.data.forms.delimited import read_delimited
from cliptune_trainer.data.forms.image_folder import IMAGE_SUFFIXES, read_image_folder
from cliptune_trainer.data.forms.json_lines import read_json_lines
from cliptune_trainer.data.forms.parquet import read_parquet
from cliptune_trainer.data.forms.shards import read_shards
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.table import Table
from cliptune_trainer.spec import DataConfig

_SHARDS: Final = (".tar", ".tar.gz", ".tgz")
_JSON_LINES: Final = (".jsonl", ".ndjson")
_PLAIN: Final = Wording()


def read_table(
    path: str,
    config: DataConfig,
    roots: DataRoots,
    *,
    wording: Wording = _PLAIN,
    cache: Path | None = None,
) -> Table:
    """Reads and checks the rows of a data set of any form.

    Args:
        path: a file, a pattern of shards or parquet files, or a folder.
        config: names the columns.
        roots: folders that may be read.
        wording: of captions made from labels.
        cache: folder where an index of shards is kept.

    Raises:
        DataError: it cannot be read, or has no rows.
        MissingColumnError: a column of the spec is not there.
        PathOutsideRootsError: it, or an image in it, lies outside the roots.
        ConflictError: the package that reads such files is not installed.
    """
    columns = Columns(config, wording)
    lower = path.lower()
    if lower.endswith(_SHARDS):
        return read_shards(path, config, columns, roots, cache)
    if lower.endswith(".parquet"):
        return read_parquet(path, config, columns, roots)
    if lower.endswith(_JSON_LINES):
        return read_json_lines(path, config, columns, roots)
    if lower.endswith(".json"):
        raise DataError(f"{path}: JSON is read an object a line, from a file named .jsonl", file=path)
    folder = roots.table(path)
    if not folder.is_dir():
        return read_delimited(path, config, columns, roots)
    suffixes = {file.suffix.lower() for file in folder.rglob("*")}
    if ".tar" in suffixes:
        return read_shards(path, config, columns, roots, cache)
    if ".parquet" in suffixes:
        return read_parquet(path, config, columns, roots)
    if ".arrow" in suffixes:
        raise DataError(
            f"{folder} was written by save_to_disk (.arrow files): write it with to_parquet instead",
            file=folder,
        )
    if not suffixes.isdisjoint(IMAGE_SUFFIXES):
        return read_image_folder(folder, config, wording, roots)
    raise DataError(f"{folder} holds no .tar shards, no .parquet files and no images", file=folder)
