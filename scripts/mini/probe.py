"""The general probe that is shipped: pictures of everyday things with captions, for the forgetting guard.

Enters: general_clipart and `cards/general-probe.md`. Leaves: `mini/cliptune_mini/general-probe/`, and the
list of checksums anew. Run by `python -m scripts.mini probe`. The same bytes each time.

Its validation split alone is taken: the towers were not trained on it, and the test split stays for judging.
Of a concept there is one picture, so that no two captions fit the same one; of Open Clip Art the sections of
program icons and, by their captions, of flags and signals are left out, which tell little of everyday sight.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from cliptune.embedded import PROBE_FOLDER, PROBE_PAIRS
from scripts.mini import pack

SPLIT: Final = "val"
# Public domain, and Apache-2.0 as the package itself is.
ORIGINS: Final = ("openclipart-svg", "@iconify-json/noto")
MAX_BYTES: Final = 1_000_000
_SECTIONS_LEFT_OUT: Final = frozenset({"computer"})
_SUBJECTS_LEFT_OUT: Final = frozenset({"flag", "signalflag", "semaphore", "led", "united nations member"})
# What is more than these is mostly markup that a title was left with.
_CAPTION: Final = re.compile(r"[A-Za-z0-9 ,()'./-]+")


def run(clipart: Path, target: Path) -> None:
    """The step. Raises ValueError where the file would be larger than is shipped."""
    folder = target / PROBE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (clipart / "captions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(chosen(csv.DictReader(file)))
    content = archive([(row["caption"], (clipart / row["image"]).read_bytes()) for row in rows])
    if len(content) > MAX_BYTES:
        raise ValueError(f"{len(content):,} bytes of general pairs: {MAX_BYTES:,} is what is shipped at most")
    (folder / PROBE_PAIRS).write_bytes(content)
    shutil.copy(pack.CARDS / f"{PROBE_FOLDER}.md", folder / "README.md")
    pack.seal(target)
    print(f"{PROBE_FOLDER}: {len(rows)} pairs, {len(content) / 1e6:.2f} MB", flush=True)


def chosen(rows: Iterator[Mapping[str, str]] | csv.DictReader[str]) -> Iterator[Mapping[str, str]]:
    """One picture of each concept that is held out and free."""
    seen: set[str] = set()
    for row in sorted(rows, key=lambda row: row["image"]):
        words = {word for part in row["caption"].split(",") for word in (part.strip(), *part.split())}
        if (
            row["split"] == SPLIT
            and row["origin"] in ORIGINS
            and row["label"] not in _SECTIONS_LEFT_OUT
            and _SUBJECTS_LEFT_OUT.isdisjoint(words)
            and _CAPTION.fullmatch(row["caption"])
            and row["group"] not in seen
        ):
            seen.add(row["group"])
            yield row


def archive(pairs: list[tuple[str, bytes]]) -> bytes:
    """A tar shard in WebDataset's layout, of captions and WebP files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for place, (caption, image) in enumerate(pairs):
            for extension, content in (("webp", image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{place:04d}.{extension}")
                member.size, member.mode = len(content), 0o644
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()
