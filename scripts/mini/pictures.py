"""The training images: clip art and icons, 128 pixels square on white, with captions and a split by concept.

Enters: the folder of general_clipart and the unpacked icon packages. Leaves: `Picture`s, kept as one file.
Called by `prepare` (which makes them) and by the image steps (which read them).

Concepts are held out, not images: an icon whose name is a held-out concept of general_clipart is left out of
training, whichever package it comes from, and of the other icons' names one in twenty is held out as well.
"""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import PIL.Image

SIDE: Final = 128
# Packages of npm, in the scope @iconify-json: permissive licences only.
ICON_PACKAGES: Final = {
    "fluent-emoji": "MIT",
    "flag": "MIT",
    "meteocons": "MIT",
    "flat-color-icons": "MIT",
    "noto": "Apache-2.0",
}
HELD_OUT_OF: Final = 20
_SKIN: Final = re.compile(r"-(light|medium-light|medium|medium-dark|dark)(-skin-tone)?(?=-|$)|skin-tone")
_REGIONS: Final = (
    'const names = new Intl.DisplayNames(["en"], {type: "region", fallback: "none"});'
    "const name = code => { try { return names.of(code) ?? null } catch { return null } };"
    "console.log(JSON.stringify(JSON.parse(process.argv[1]).map(name)))"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One image with what may be said of it.

    Attributes:
        encoded: a WebP file.
        captions: the first is the one that held-out figures look for.
        split: "train"; "val" and "test" of general_clipart; "icons" for held-out icons.
        origin: the data set or package.
    """

    encoded: bytes
    captions: tuple[str, ...]
    split: str
    origin: str

    @property
    def image(self) -> PIL.Image.Image:
        """RGB, `SIDE` pixels square."""
        return PIL.Image.open(io.BytesIO(self.encoded)).convert("RGB")


def write(pictures: Sequence[Picture], path: Path) -> None:
    """As one uncompressed archive."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        told = [{k: v for k, v in asdict(picture).items() if k != "encoded"} for picture in pictures]
        archive.writestr("pictures.json", json.dumps(told))
        for index, picture in enumerate(pictures):
            archive.writestr(f"{index}.webp", picture.encoded)


def read(path: Path) -> list[Picture]:
    """Inverse of `write`."""
    with zipfile.ZipFile(path) as archive:
        told: list[dict[str, Any]] = json.loads(archive.read("pictures.json"))
        return [
            Picture(
                encoded=archive.read(f"{index}.webp"),
                captions=tuple(one["captions"]),
                split=one["split"],
                origin=one["origin"],
            )
            for index, one in enumerate(told)
        ]


def clipart(folder: Path) -> Iterator[Picture]:
    """general_clipart, with its own splits."""
    for row in _rows(folder):
        concept = _concept(row)
        yield Picture(
            encoded=(folder / row["image"]).read_bytes(),
            captions=(row["caption"], concept, f"a {concept}"),
            split=row["split"],
            origin=f"general_clipart/{row['origin']}",
        )


def icons(packages: Path, clipart_folder: Path) -> Iterator[Picture]:
    """Icons of every package below `packages`, rendered; held-out concepts are not trained on."""
    taken = {_concept(row) for row in _rows(clipart_folder) if row["split"] != "train"}
    for package in ICON_PACKAGES:
        (folder,) = packages.glob(f"iconify-json-{package}-*")
        icon_set = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        regions = _region_names(icon_set["icons"]) if package == "flag" else {}
        for name, icon in icon_set["icons"].items():
            said = captions(package, name, regions)
            if not said or said[0] in taken:
                continue
            yield Picture(
                encoded=_webp(_rendered(icon_set, icon)),
                captions=said,
                split="icons" if zlib.crc32(said[0].encode()) % HELD_OUT_OF == 0 else "train",
                origin=package,
            )


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _concept(row: Mapping[str, str]) -> str:
    return row["group"].removeprefix("emo:")


def captions(package: str, name: str, regions: Mapping[str, str | None]) -> tuple[str, ...]:
    """Empty: the icon is left out. Skin tones say nothing more, and flags come in two shapes."""
    if package == "flag":
        region = regions.get(name)
        return (f"flag: {region}", f"the flag of {region}", region) if region else ()
    if package in ("fluent-emoji", "noto") and _SKIN.search(name):
        return ()
    words = name.removesuffix("-fill").replace("-", " ") if package == "meteocons" else name.replace("-", " ")
    return (words, f"a picture of {words}", f"an icon of {words}", f"a {words}")


def _region_names(names: Mapping[str, Any]) -> dict[str, str | None]:
    """Icon name → English name of the country, by node's Unicode tables; only the 4:3 flags."""
    wide = [name for name in names if name.endswith("-4x3") and len(name) == len("fr-4x3")]
    codes = json.dumps([name[:2].upper() for name in wide])
    answer = subprocess.run(["node", "-e", _REGIONS, codes], check=True, capture_output=True, text=True)
    return dict(zip(wide, json.loads(answer.stdout), strict=True))


def _rendered(icon_set: Mapping[str, Any], icon: Mapping[str, Any]) -> PIL.Image.Image:
    import resvg_py

    width, height = (icon.get(side, icon_set.get(side, 16)) for side in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
        f'width="{width}" height="{height}">'
        f"{icon['body'].replace('currentColor', '#333')}</svg>"
    )
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE)
    image = PIL.Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    image.thumbnail((SIDE, SIDE))
    canvas = PIL.Image.new("RGBA", (SIDE, SIDE), "white")
    canvas.alpha_composite(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return canvas.convert("RGB")


def _webp(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85)
    return file.getvalue()
