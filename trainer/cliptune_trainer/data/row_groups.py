"""Images inside parquet files, read in any order.

Enters: a file, a column and a row. Leaves: the cell's bytes. Called by `source.ParquetCell` in threads and in
decoding processes. A parquet file is compressed a row group at a time, so a cell costs its whole group:
groups read last are kept, within bounds. Files written for images have about a hundred rows in a group.
"""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cliptune_trainer.image.optional import needed

# Of each process that decodes. A data set that is smaller is read from its files once.
_MAX_KEPT_BYTES: Final = 256 << 20
_MAX_OPEN: Final = 64


@dataclass(frozen=True, slots=True)
class _Opened:
    """A file and the first row of each of its groups, last the number of rows."""

    file: Any
    starts: list[int]


class RowGroups:
    """The groups read last, for any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, _Opened] = OrderedDict()
        self._groups: OrderedDict[tuple[Path, str, int], Any] = OrderedDict()
        self.kept_bytes = 0

    def cell(self, file: Path, column: str, row: int) -> bytes:
        """Bytes of a cell that holds bytes, or {bytes, path}. Raises OSError."""
        with self._lock:
            try:
                opened = self._open(file)
                group = bisect.bisect_right(opened.starts, row) - 1
                if group >= len(opened.starts) - 1:
                    raise OSError(f"{file.name} has {opened.starts[-1]} rows")
                cells = self._group(file, opened, column, group)
                content = cells[row - opened.starts[group]].as_py()
            except OSError:
                raise
            except (ValueError, KeyError, TypeError) as error:  # pyarrow's own are of these
                raise OSError(f"{file.name} cannot be read: {error}") from error
        if content is None:
            raise OSError(f"{file.name}, row {row + 1}: the cell is empty")
        return bytes(content)

    def _open(self, file: Path) -> _Opened:
        opened = self._files.get(file)
        if opened is None:
            parquet = needed("pyarrow.parquet", "parquet", "reading parquet files")
            reader = parquet.ParquetFile(file)
            starts = [0]
            for group in range(reader.metadata.num_row_groups):
                starts.append(starts[-1] + reader.metadata.row_group(group).num_rows)
            opened = self._files[file] = _Opened(reader, starts)
            if len(self._files) > _MAX_OPEN:
                self._files.popitem(last=False)[1].file.close()
        self._files.move_to_end(file)
        return opened

    def _group(self, file: Path, opened: _Opened, column: str, group: int) -> Any:
        """A group's column of bytes; those used longest ago make room for it."""
        key = (file, column, group)
        cells = self._groups.get(key)
        if cells is None:
            whole = opened.file.read_row_group(group, columns=[column], use_threads=False).column(0)
            cells = whole.combine_chunks()
            if hasattr(cells.type, "get_field_index") and cells.type.num_fields:
                cells = cells.field("bytes")
            self._groups[key] = cells
            self.kept_bytes += cells.nbytes
            while self.kept_bytes > _MAX_KEPT_BYTES and len(self._groups) > 1:
                self.kept_bytes -= self._groups.popitem(last=False)[1].nbytes
        self._groups.move_to_end(key)
        return cells


row_groups: Final = RowGroups()
