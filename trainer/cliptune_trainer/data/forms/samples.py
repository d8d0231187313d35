"""The samples of tar shards in WebDataset's layout: members that share a name, up to its first dot.

Enters: shards. Leaves: `Sample`s. Called by `shards`. Headers and texts are read, images are not. Where there
are many shards, processes share them; they import neither torch nor Pillow.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Final

from cliptune.errors import DataError
from cliptune_trainer.data.processes import spawned
from cliptune_trainer.data.source import ShardMember

_IMAGES: Final = (
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"),
    *("dcm", "dicom", "fits", "fit", "fts"),
)
# Captions and fields are short; a larger member is none.
MAX_TEXT_BYTES: Final = 1 << 20
# A shard of usual size takes about as long as a process to start.
_SHARDS_PER_PROCESS: Final = 4
_BLOCK: Final = 512


@dataclass(slots=True)
class Sample:
    """Members of one name. `texts` by extension; None where one is too long to be text."""

    shard: Path
    key: str
    image: ShardMember | None = None
    texts: dict[str, bytes | None] = field(default_factory=dict)
    damage: str = ""

    @property
    def label(self) -> str:
        """For a person: the shard and the name."""
        return f"{self.shard.name}/{self.key}"


def read_samples(shards: Sequence[Path], texts: frozenset[str]) -> Iterator[list[Sample]]:
    """The samples of each shard, in the order of their first members; last one that tells of damage, if any.

    Args:
        shards: uncompressed tar files.
        texts: extensions of members whose content is wanted, in lower case.

    Raises:
        DataError: a file is no uncompressed tar file, or cannot be read.
    """
    processes = min(os.cpu_count() or 1, len(shards) // _SHARDS_PER_PROCESS)
    if processes < 2:
        yield from (_samples_of(shard, texts) for shard in shards)
        return
    with spawned(processes) as pool:
        yield from pool.map(_samples_of, shards, repeat(texts))


def _samples_of(shard: Path, texts: frozenset[str]) -> list[Sample]:
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            damage = ""
            try:
                for member in tar:
                    _take(samples, shard, tar, member, texts)
            except (tarfile.TarError, OSError) as error:
                damage = str(error)
            if not damage and _ends_well(tar):
                return list(samples.values())
            last = next(reversed(samples)) if samples else "its beginning"
            told = f"the shard is damaged or cut off after {last}" + (f" ({damage})" if damage else "")
            return [*samples.values(), Sample(shard=shard, key="?", damage=told)]
    except tarfile.TarError as error:
        raise DataError(
            f"{shard} is no tar file that can be read in place ({error}); compressed ones must be unpacked",
            file=shard,
        ) from error
    except OSError as error:
        raise DataError(f"{shard} cannot be read: {error.strerror or error}", file=shard) from error


def _take(
    samples: dict[str, Sample],
    shard: Path,
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    texts: frozenset[str],
) -> None:
    name = member.name.removeprefix("./")
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    # Without an extension it is nothing; names that begin with a dot are a file system's own.
    if not member.isreg() or member.issparse() or not stem or not dot:
        return
    extension = extension.lower()
    if extension not in _IMAGES and extension not in texts:
        return
    sample = samples.setdefault(folder + slash + stem, Sample(shard=shard, key=folder + slash + stem))
    if extension in _IMAGES:
        if sample.image is None:
            sample.image = ShardMember(shard, name, member.offset_data, member.size)
    elif member.size > MAX_TEXT_BYTES:
        sample.texts[extension] = None
    else:
        content = tar.extractfile(member)
        sample.texts[extension] = content.read() if content else None


def _ends_well(tar: tarfile.TarFile) -> bool:
    """tarfile takes a header that it does not understand for the end; a real one is zeros, or nothing."""
    tar.fileobj.seek(tar.offset)
    return not tar.fileobj.read(_BLOCK).strip(b"\0")
