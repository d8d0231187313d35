"""Reading a folder with a folder of images for each class.

Enters: a folder: CLASS/NAME.png, or SPLIT/CLASS/NAME.png with folders named train, val or test. Leaves: a
`Table`; captions come from the class's name, rows are numbered in the order of the paths. Called by `forms`.
Images are named here, not opened.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Final

from cliptune.errors import DataError, SpecError
from cliptune_trainer.data.forms.columns import SPLITS, Columns, UnusableRow, Wording
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.table import BadRow, Pair, Table
from cliptune_trainer.spec import DataConfig

IMAGE_SUFFIXES: Final = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".dcm", ".dicom", ".fits", ".fit", ".fts"),
)
_LABEL: Final = "label"


def read_image_folder(folder: Path, config: DataConfig, wording: Wording, roots: DataRoots) -> Table:
    """Finds the images. Hidden files and folders are left out; links are followed within the roots.

    Raises:
        SpecError: a group or split column is named: a folder has none.
        DataError: there is but one class.
        PathOutsideRootsError: a link leads outside the roots.
    """
    for name, column in (("group_column", config.group_column), ("split_column", config.split_column)):
        if column:
            raise SpecError(
                f"data.{name} is {column!r}, but {folder} is a folder of images, which has no columns: write"
                " a table for it",
                path=f"data.{name}",
                allowed="nothing, for a folder of images",
            )
    columns = Columns(replace(config, label_column=_LABEL), wording, captions_from_labels=True)
    top = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    names_split = bool(top) and all(child.name.lower() in SPLITS for child in top)
    digest = hashlib.sha256()
    pairs: list[Pair] = []
    bad: list[BadRow] = []
    row = 0
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        split, inner = (parts[0], parts[1:]) if names_split else ("", parts)
        if any(part.startswith(".") for part in parts) or file.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        image = roots.checked(file)
        if len(inner) < 2 or not image.is_file():
            continue  # beside the class folders
        status = image.stat()
        reference = "/".join(parts)
        digest.update(f"{reference}\n{status.st_size}\n{status.st_mtime_ns}\n".encode())
        row += 1
        try:
            pairs += columns.pairs(row, image, reference, {_LABEL: [inner[0]]}, split=split)
        except UnusableRow as unusable:
            bad.append(BadRow(row=row, reason=f"{reference}: {unusable}"))
    classes = sorted({pair.label for pair in pairs})
    if len(classes) < 2:
        raise DataError(
            f"{folder} is read as a folder with a folder of images for each class, and holds"
            f" {len(classes)} of them ({', '.join(classes) or 'none'}); if a table names the images,"
            " data.train is that table",
            file=folder,
        )
    return Table(
        path=folder,
        sha256=digest.hexdigest(),
        pairs=tuple(pairs),
        bad=tuple(bad),
        names_split=names_split,
    )
