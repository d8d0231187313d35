"""A look into data sets of every form, and into those that are made to hurt, by the real process."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from PIL import Image

from cliptune.errors import InvalidInputError
from cliptune.v1 import data_pb2
from cliptune_server.datasets.preview import Previews
from cliptune_server.datasets.stored import StoredDataset
from cliptune_server.sampler.rows import look
from cliptune_server.sampler.spread import spread
from tests.server.datasets.house import open_datasets, upload
from tests.support import images

TABLE = "image,caption,odd\n" + "".join(f"p/{i}.png,a cell {i},\n" for i in range(20))
PICTURES = {f"p/{i}.png": images.png(seed=i, size=24) for i in range(20)}
MALICIOUS = (
    "image,caption\n"
    "p/good.png,a whole one\n"
    "p/cut.jpg,half of one\n"
    "../../../../etc/hostname,another's file\n"
    "/etc/hostname,another's file\n"
    "p/bomb.png,claims 50000 × 50000 pixels\n"
    f"p/none.png,not there: {'a long story ' * 500}\n"
    "p/nul\0.png,no path\n"
    "p/scan.dcm,only the trainer reads it\n"
    "p/deep.png,16 bits\n"
)


def deep_png() -> bytes:
    return images.encoded(Image.new("I;16", (8, 8), 40_000), "PNG")


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@asynccontextmanager
async def preview_of(
    tmp_path: Path, files: dict[str, bytes], entry: str = "", samples: int | None = None
) -> AsyncIterator[data_pb2.GetDatasetResponse]:
    async with open_datasets(tmp_path / "data") as datasets:
        await upload(datasets, "cells", files, entry)
        yield await datasets.get(data_pb2.GetDatasetRequest(name="cells", samples=samples))


async def test_rows_of_a_table_are_spread_over_it_and_have_small_pictures(tmp_path: Path) -> None:
    async with preview_of(tmp_path, {"t.csv": TABLE.encode(), **PICTURES}, samples=4) as found:
        assert list(found.columns) == ["image", "caption", "odd"]
        assert found.rows == 20
        assert [sample.row for sample in found.samples] == [1, 5, 9, 13]
        for sample in found.samples:
            assert dict(sample.fields)["caption"] == f"a cell {sample.row - 1}"
            with Image.open(io.BytesIO(sample.image.encoded)) as picture:
                assert (picture.format, picture.size) == ("JPEG", (24, 24))


async def test_hostile_files_cost_their_own_picture_alone_and_nothing_outside_is_read(tmp_path: Path) -> None:
    files = {
        "t.csv": MALICIOUS.encode(),
        "p/good.png": images.png(),
        "p/cut.jpg": images.truncated_jpeg(),
        "p/bomb.png": images.header_only_png(50_000, 50_000),
        "p/scan.dcm": b"\0" * 128 + b"DICM",
        "p/deep.png": deep_png(),
    }
    async with preview_of(tmp_path, files, samples=64) as found:
        pictured = {sample.fields["image"] for sample in found.samples if sample.image.encoded}
        assert found.rows == len(found.samples) == 9
        assert pictured == {"p/good.png", "p/deep.png"}


FORMS: dict[str, tuple[dict[str, bytes], str, list[str], int, dict[str, str]]] = {
    "tsv in a folder": (
        {"x/t.tsv": b"text\tfile\na cell\tp/a.png\n", "x/p/a.png": images.png()},
        "",
        ["text", "file"],
        1,
        {"text": "a cell", "file": "p/a.png"},
    ),
    "JSON lines": (
        {
            "t.jsonl": b'{"image": "p/a.png", "n": 3}\n\n{"image": "p/a.png", "tags": ["x"]}\n',
            "p/a.png": images.png(),
        },
        "",
        ["image", "n", "tags"],
        2,
        {"image": "p/a.png", "n": "3", "tags": ""},
    ),
    "image folder": (
        {"cat/1.png": images.png(), "dog/2.png": images.png(), "about.txt": b"x"},
        "",
        ["image", "label"],
        2,
        {"image": "cat/1.png", "label": "cat"},
    ),
    "a folder in it": (
        {"train/cat/1.png": images.png(), "val/dog/2.png": images.png()},
        "train",
        ["image", "label"],
        1,
        {"image": "cat/1.png", "label": "cat"},
    ),
    "shards": (
        {
            f"s/{i}.tar": tar_of(
                {"a/7.jpg": images.jpeg(), "a/7.txt": b"a cell", "a/7.json": b'{"label": "c"}'}
            )
            for i in range(2)
        },
        "s/{0..1}.tar",
        ["image", "caption", "label"],
        -1,
        {"image": "a/7.jpg", "caption": "a cell", "label": "c"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
async def test_every_form_shows_its_columns_and_a_first_row(tmp_path: Path, form: str) -> None:
    files, entry, columns, rows, first = FORMS[form]
    async with preview_of(tmp_path, files, entry) as found:
        assert list(found.columns) == columns
        assert found.rows == rows
        assert dict(found.samples[0].fields) == first
        assert found.samples[0].image.encoded[:2] == b"\xff\xd8"


def test_parquet_shows_the_image_bytes_that_it_holds(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs cliptune[parquet]")
    import pyarrow.parquet as parquet

    rows = [
        {"image": {"bytes": images.png(seed=i), "path": f"{i}.png"}, "text": f"cell {i}"} for i in range(3)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    found = look(tmp_path, "", 2)
    assert (found.columns, found.rows) == (("image", "text"), 3)
    assert [dict(row.fields) for row in found.samples] == [
        {"image": "0.png", "text": "cell 0"},
        {"image": "1.png", "text": "cell 1"},
    ]
    assert found.samples[0].picture is not None
    assert found.samples[0].picture() == images.png(seed=0)


@pytest.mark.parametrize("content", [b"\xff\xfe not text", b"", b'image\n"' + b"x" * 200_000])
async def test_a_table_that_cannot_be_read_leaves_the_data_set_without_rows(
    tmp_path: Path, content: bytes
) -> None:
    async with preview_of(tmp_path, {"t.csv": content}) as found:
        assert found.dataset.name == "cells"
        assert found.rows in (-1, 0)
        assert not found.samples


async def test_no_more_samples_than_64(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="samples is 65; allowed: 0 to 64"):
        async with preview_of(tmp_path, {"t.csv": b"image\n"}, samples=65):
            pass


FIRST_FRAME = data_pb2.GetDatasetResponse(columns=["image"], rows=1, samples=[data_pb2.SampleRow(row=1)])
BROKEN = {
    "killed after the first frame": (
        f"import os, struct, sys; b = {FIRST_FRAME.SerializeToString()!r}; "
        "sys.stdout.buffer.write(struct.pack('>I', len(b)) + b); sys.stdout.flush(); os.kill(os.getpid(), 9)",
        1,
    ),
    "hung": ("import signal; signal.pause()", -1),
    "talks without end": (
        "import sys\nwhile True: sys.stdout.buffer.write(b'\\0\\0\\xff\\xff' + b'x' * 65535)",
        -1,
    ),
}


@pytest.mark.parametrize("how", BROKEN)
async def test_a_process_that_breaks_costs_what_it_had_not_told_yet(tmp_path: Path, how: str) -> None:
    script, rows = BROKEN[how]
    previews = Previews((sys.executable, "-c", script), limit_s=2.0)
    dataset = StoredDataset(name="cells", created_ns=1, files=1, bytes=1, entry="", sha256="x", upload_id="y")
    found = await previews.of(dataset, tmp_path, 8)
    assert found.dataset.name == "cells"
    assert found.rows == rows


async def test_code_among_the_files_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = b"raise SystemExit('imported')\n"
    files = {"t.csv": TABLE.encode(), "json.py": code, "cliptune/__init__.py": code, **PICTURES}
    async with open_datasets(tmp_path / "data") as datasets:
        await upload(datasets, "cells", files, "t.csv")
        monkeypatch.chdir(tmp_path / "data" / "cells" / "files")
        found = await datasets.get(data_pb2.GetDatasetRequest(name="cells"))
        assert found.rows == 20


@pytest.mark.parametrize("total", [0, 1, 3, 4, 5, 100, 1001])
def test_a_spread_begins_with_the_first_and_leaves_gaps_of_at_most_twice_the_even_ones(total: int) -> None:
    chosen, count = spread(iter(range(total)), 4)
    assert count == total
    assert len(chosen) == min(4, total)
    numbers = [number for number, _ in chosen]
    assert [item + 1 for _, item in chosen] == numbers
    if numbers:
        assert numbers[0] == 1
        gaps = [after - before for before, after in zip(numbers, [*numbers[1:], total + 1], strict=True)]
        assert max(gaps) <= max(1, 2.5 * total / 4)
    assert json.dumps(numbers)
