from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from cliptune.errors import DataError, MissingColumnError, PathOutsideRootsError
from cliptune.internal.v1 import trainer_pb2
from cliptune_model.clip import Clip
from cliptune_trainer.data.dataset import Dataset, read_dataset
from cliptune_trainer.data.forms import samples as samples_module
from cliptune_trainer.data.forms.file_names import find_files
from cliptune_trainer.data.loading.loader import Batch, Loader
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.source import ShardMember
from cliptune_trainer.image.augment import NAMED
from cliptune_trainer.spec import DataConfig
from tests.trainer.conftest import MakeJob

ANYWHERE = DataRoots()


def write_shard(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def samples(tiles: Path, rows: range) -> dict[str, bytes]:
    """Members of some tiles, captions in .txt for even rows and in .json for odd ones."""
    members: dict[str, bytes] = {}
    for row in rows:
        colour = ["red", "green", "blue"][row % 3]
        caption = f"a {colour} tile, number {row % 2}"
        members[f"part/{row:04d}.png"] = (tiles / f"{row}.png").read_bytes()
        fields = {"label": colour, "module": f"m{row // 5}", **({"caption": caption} if row % 2 else {})}
        members[f"part/{row:04d}.json"] = json.dumps(fields).encode()
        if row % 2 == 0:
            members[f"part/{row:04d}.txt"] = caption.encode()
    return members


@pytest.fixture
def shards(tiles: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        write_shard(folder / f"tiles-{number:02d}.tar", samples(tiles, range(20 * number, 20 * number + 20)))
    return folder


def read(train: str | Path, **options: object) -> Dataset:
    return read_dataset(DataConfig(train=str(train), **options), ANYWHERE, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "tiles-{00..02}.tar", "tiles-0{0,1,2}.tar", "*.tar", "tiles-0?.tar"])
def test_shards_are_named_by_folder_braces_or_pattern(shards: Path, name: str) -> None:
    wanted = [shards / f"tiles-{number:02d}.tar" for number in range(3)]
    assert find_files(str(shards / name), ".tar", ANYWHERE) == wanted
    inside = DataRoots([shards.parent])
    assert find_files(f"shards/{name}", ".tar", inside) == wanted


def test_shards_hold_the_rows_that_a_table_of_the_same_files_holds(
    shards: Path, tiles: Path, clip: Clip
) -> None:
    columns = {"label_column": "label", "group_column": "module"}
    from_shards = read(shards, **columns)
    from_table = read(tiles / "tiles.csv", **columns)
    for one, other in zip(from_shards.train.pairs, from_table.train.pairs, strict=True):
        assert (one.row, one.caption, one.label) == (other.row, other.caption, other.label)
        assert one.group == other.group
        assert one.image.read_bytes() == other.image.read_bytes()
    assert from_shards.labels == ["blue", "green", "red"]
    assert {str(pair.image) for pair in from_shards.validation.pairs}.isdisjoint(
        str(pair.image) for pair in from_shards.train.pairs
    )

    def load(dataset: Dataset, workers: int, first: int = 0) -> list[Batch]:
        with Loader(
            dataset.train, clip, batch_size=8, seed=2, augmentation=NAMED["crop"], workers=workers
        ) as loader:
            return list(loader.batches(first, 9))

    wanted = load(from_table, 0)
    for got in (load(from_shards, 0), load(from_shards, 1), [*wanted[:4], *load(from_shards, 0, first=4)]):
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one.images_B3HW[:], other.images_B3HW[:])
            assert torch.equal(one.tokens_BL, other.tokens_BL)


def test_many_shards_are_read_by_processes_to_the_same_rows(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = read(shards)
    monkeypatch.setattr(samples_module, "_SHARDS_PER_PROCESS", 1)
    together = read(shards)
    assert together.train.pairs == alone.train.pairs
    assert together.validation.pairs == alone.validation.pairs
    (shards / "tiles-01.tar").write_bytes(b"no tar file")
    with pytest.raises(DataError, match=r"tiles-01\.tar"):
        read(shards)


def test_samples_that_cannot_be_used_are_named_and_skipped(tiles: Path, tmp_path: Path) -> None:
    good = samples(tiles, range(8))
    image = (tiles / "0.png").read_bytes()
    bad = {
        "a.txt": b"no image beside it",
        "b.png": image,  # no caption
        "c.png": image[:200],
        "c.txt": b"a tile that is cut off",
        "d.png": image,
        "d.txt": b"\xff\xfe",
        "e.png": image,
        "e.json": b"[1, 2",
        "no-extension": b"is nobody's",
        "._d.png": b"is the file system's own",
    }
    dataset = read(write_shard(tmp_path / "mixed.tar", {**good, **bad}), max_bad_fraction=0.5)
    assert len(dataset.train) + len(dataset.validation) == 8
    reasons = [
        "mixed.tar/a: no image",
        "mixed.tar/b: caption: the text is empty",
        "c.png: the image is corrupt or truncated",
        "mixed.tar/d: .txt is not UTF-8 text",
        "mixed.tar/e: .json is not JSON",
    ]
    assert len(dataset.bad) == len(reasons)
    for row, (found, reason) in enumerate(zip(dataset.bad, reasons, strict=True), start=9):
        assert f", row {row}: {reason}" in found


@pytest.mark.parametrize(
    ("damage", "bad_rows"),
    [("cut in an image", {30, 31}), ("cut in a header", {30}), ("a header of noise", {30})],
)
def test_a_damaged_shard_gives_the_rows_before_the_damage_and_is_named(
    shards: Path, damage: str, bad_rows: set[int]
) -> None:
    whole = read(shards)
    rows = whole.train.pairs + whole.validation.pairs
    victim = next(pair.image for pair in rows if pair.row == 30)
    assert isinstance(victim, ShardMember)
    content = bytearray(victim.shard.read_bytes())
    if damage == "cut in an image":
        del content[victim.offset + 100 :]
    elif damage == "cut in a header":
        del content[victim.offset - 300 :]
    else:
        content[victim.offset - 512 : victim.offset] = os.urandom(512)
    victim.shard.write_bytes(content)
    dataset = read(shards, max_bad_fraction=0.1)
    kept = {pair.row for pair in dataset.train.pairs + dataset.validation.pairs}
    # The shard after it is whole: twenty rows more.
    assert kept == set(range(1, max(bad_rows) + 21)) - bad_rows
    assert any("damaged or cut off" in reason and "tiles-01.tar" in reason for reason in dataset.bad)


@pytest.mark.parametrize(
    "content",
    [b"", b"no tar at all" * 100, gzip.compress(b"\0" * 1024)],
    ids=["empty", "no tar", "compressed"],  # the compressed bytes hold the time
)
def test_what_is_no_tar_file_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["none-*.tar", "none.tar", "{2..1}.tar", "empty"])
def test_shards_that_are_not_there_are_a_data_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        read(tmp_path / name)


def test_a_column_that_no_sample_has_names_those_that_they_have(shards: Path) -> None:
    with pytest.raises(MissingColumnError) as caught:
        read(shards, label_column="kind")
    assert caught.value.metadata["found"] == "caption, label, module, txt"
    assert caught.value.metadata["path"] == "data.label_column"


def test_shards_outside_the_roots_are_refused_and_not_looked_for(shards: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.tar").symlink_to(shards / "tiles-00.tar")
    roots = DataRoots([inside])
    for name in (shards, shards / "*.tar", shards / "none-*.tar", "link.tar", "*.tar", "../shards"):
        with pytest.raises(PathOutsideRootsError):
            find_files(str(name), ".tar", roots)
    with pytest.raises(DataError, match=r"\.\."):
        find_files("*/../../shards/*.tar", ".tar", roots)


def test_the_index_is_kept_until_a_shard_changes(shards: Path, tmp_path: Path, tiles: Path) -> None:
    config = DataConfig(train=str(shards))

    def again() -> Dataset:
        return read_dataset(config, ANYWHERE, seed=0, cache=tmp_path)

    first = again()
    (index,) = tmp_path.glob("shards-*.json")
    assert again().train.pairs == first.train.pairs
    stored = json.loads(index.read_bytes())
    stored["pairs"][0][5] = "a caption that only the index has"
    index.write_text(json.dumps(stored))
    seen = again()
    assert "a caption that only the index has" in {
        pair.caption for pair in seen.train.pairs + seen.validation.pairs
    }
    write_shard(shards / "tiles-03.tar", samples(tiles, range(4)))
    grown = again()
    assert len(grown.train) + len(grown.validation) == 64
    assert grown.findings.tables != first.findings.tables


def test_a_shard_that_shrinks_while_training_costs_rows_not_the_job(shards: Path, clip: Clip) -> None:
    dataset = read(shards)
    shard = shards / "tiles-02.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    told: list[str] = []
    with Loader(
        dataset.train,
        clip,
        batch_size=8,
        seed=0,
        max_bad=30,
        on_bad_row=lambda pair, reason: told.append(reason),
    ) as loader:
        assert len(list(loader.batches(0, 6))) == 6
    assert told
    assert any("tiles-02.tar ends before" in reason for reason in told)


def test_a_job_trains_from_shards_with_processes_that_decode(shards: Path, make_job: MakeJob) -> None:
    job = make_job(root=shards, data={"train": ".", "workers": 1}, train={"epochs": 1, "batch_size": 8})
    job.run("run", 1)
    assert job.outcome(1).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    assert "workers-lost" not in job.notices(1)
    assert len(list(job.path.glob("shards-*.json"))) == 1
