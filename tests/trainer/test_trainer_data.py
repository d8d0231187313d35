from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cliptune.errors import DataError, MissingColumnError, PathOutsideRootsError
from cliptune_model.clip import Clip
from cliptune_trainer.data.dataset import Pairs, read_dataset
from cliptune_trainer.data.findings import Findings
from cliptune_trainer.data.forms.reader import read_table
from cliptune_trainer.data.loading.loader import Batch, Loader
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.split import split_by_group
from cliptune_trainer.data.table import Pair
from cliptune_trainer.image.augment import NAMED
from cliptune_trainer.spec import DataConfig
from tests.trainer.batches import same

ANYWHERE = DataRoots()


@pytest.fixture
def folder(tiles: Path, tmp_path: Path) -> Path:
    """A few tiles of one's own, to spoil."""
    for row in range(12):
        shutil.copy(tiles / f"{row}.png", tmp_path)
    return tmp_path


def table(folder: Path, *lines: str, name: str = "rows.csv") -> DataConfig:
    (folder / name).write_text("\n".join(lines) + "\n")
    return DataConfig(train=str(folder / name), max_bad_fraction=0.5)


def test_a_tsv_file_is_read_and_captions_may_hold_commas_and_quotes(folder: Path) -> None:
    config = table(folder, "image\tcaption", '0.png\t"big, ""red"""', name="rows.tsv")
    (pair,) = read_table(config.train, config, ANYWHERE).pairs
    assert (pair.caption, pair.image, pair.row) == ('big, "red"', folder / "0.png", 1)


def test_a_missing_column_names_the_columns_that_were_found(folder: Path) -> None:
    config = table(folder, "picture,caption", "0.png,a tile")
    with pytest.raises(MissingColumnError) as caught:
        read_table(config.train, config, ANYWHERE)
    assert caught.value.metadata["column"] == "image"
    assert caught.value.metadata["found"] == "picture, caption"
    assert caught.value.metadata["path"] == "data.image_column"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04\0\0", b"\xff\xfei\0m\0", b"image,caption\n"])
def test_a_file_that_is_no_table_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    config = DataConfig(train=str(tmp_path / "rows.csv"))
    with pytest.raises(DataError, match=r"rows\.csv"):
        read_table(config.train, config, ANYWHERE)


def test_a_file_that_is_not_there_is_a_data_error_naming_it(tmp_path: Path) -> None:
    config = DataConfig(train=str(tmp_path / "none.csv"))
    with pytest.raises(DataError, match=r"none\.csv.*No such file"):
        read_table(config.train, config, ANYWHERE)


def test_bad_rows_are_named_and_skipped_up_to_the_limit(folder: Path) -> None:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])  # truncated
    (folder / "2.png").write_text("not an image")
    good = [f"{row}.png,a tile {row}" for row in (0, 3, 4, 5, 6, 7, 8)]
    bad = ["1.png,a tile", "2.png,a tile", "gone.png,a tile", "9.png,", "10.png", f"11.png,{'x' * 100_000}"]
    config = table(folder, "image,caption", *good, *bad)
    dataset = read_dataset(config, ANYWHERE, seed=0)
    assert len(dataset.train) + len(dataset.validation) == 7
    assert len(dataset.bad) == 6
    for place, reason in enumerate(
        ("corrupt", "not an image", "No such file", "empty", "1 fields", "100,000")
    ):
        assert f"row {place + 8}:" in dataset.bad[place]
        assert reason in dataset.bad[place]
    message = dataset.bad_rows_message()
    assert message.startswith("6 rows")
    assert message.endswith("and 1 more")

    strict = DataConfig(train=config.train, max_bad_fraction=0.1)
    with pytest.raises(DataError, match="6 of 13 rows") as caught:
        read_dataset(strict, ANYWHERE, seed=0)
    assert caught.value.metadata["row"] == "8"


def test_bytes_that_are_not_utf8_cost_their_own_row_only(folder: Path) -> None:
    lines = [b"image,caption", b"0.png,a tile", b"1.png,\xff\xfe tile", b"2.png,another"]
    (folder / "rows.csv").write_bytes(b"\n".join(lines))
    config = DataConfig(train=str(folder / "rows.csv"))
    read = read_table(config.train, config, ANYWHERE)
    assert [pair.row for pair in read.pairs] == [1, 3]
    assert (read.bad[0].row, read.bad[0].reason) == (2, "not UTF-8 text")


def test_paths_outside_the_roots_are_refused_also_through_links_and_dots(folder: Path, tiles: Path) -> None:
    inside = folder / "inside"
    inside.mkdir()
    shutil.copy(folder / "0.png", inside)
    (inside / "link.png").symlink_to(tiles / "0.png")
    (inside / "linked").symlink_to(tiles)
    roots = DataRoots([inside])
    for image in ("../1.png", "link.png", "linked/0.png", str(tiles / "0.png"), ".."):
        config = table(inside, "image,caption", f"{image},a tile")
        with pytest.raises(PathOutsideRootsError) as caught:
            read_table(config.train, config, roots)
        assert caught.value.metadata["roots"] == str(inside)
    outside = table(folder, "image,caption", "0.png,a tile")
    with pytest.raises(PathOutsideRootsError):
        read_table(outside.train, outside, roots)
    allowed = table(inside, "image,caption", "0.png,a tile")
    assert len(read_table("rows.csv", allowed, roots).pairs) == 1


def pair(row: int, image: str, group: str = "") -> Pair:
    return Pair(row=row, image=Path("/data") / image, reference=image, caption="a tile", group=group)


def test_the_split_keeps_groups_and_images_together_and_ignores_the_rows_order() -> None:
    rows = [pair(row, f"{row // 2}.png", group=f"g{row // 6}") for row in range(120)]
    rows += [pair(200, "0.png", group="g19")]  # ties two groups together
    train, validation = split_by_group(rows, 0.2, seed=1)
    assert {entry.group for entry in train}.isdisjoint(entry.group for entry in validation)
    assert {entry.image for entry in train}.isdisjoint(entry.image for entry in validation)
    assert len({entry.group for entry in validation}) in (4, 5)
    again = split_by_group(rows[::-1], 0.2, seed=1)[1]
    assert {entry.row for entry in again} == {entry.row for entry in validation}
    other = split_by_group(rows, 0.2, seed=2)[1]
    assert {entry.row for entry in other} != {entry.row for entry in validation}
    moved = [
        Pair(row=e.row, image=Path("/else") / e.reference, reference=e.reference, caption="a", group=e.group)
        for e in rows
    ]
    assert {entry.row for entry in split_by_group(moved, 0.2, seed=1)[1]} == {
        entry.row for entry in validation
    }


def test_one_group_cannot_be_split() -> None:
    with pytest.raises(DataError, match="one group"):
        split_by_group([pair(row, f"{row}.png", group="g") for row in range(4)], 0.1, seed=0)


def test_the_split_column_decides_where_there_is_one(folder: Path) -> None:
    lines = [f"{row}.png,tile {row},{split}" for row, split in enumerate(("train", "train", "val", "test"))]
    config = table(folder, "image,caption,part", *lines)
    config = DataConfig(train=config.train, split_column="part")
    dataset = read_dataset(config, ANYWHERE, seed=0)
    assert [entry.row for entry in dataset.train.pairs] == [1, 2]
    assert [entry.row for entry in dataset.validation.pairs] == [3]


def test_a_validation_file_is_used_whole_and_what_it_shares_is_refused_or_noticed(folder: Path) -> None:
    config = table(folder, "image,caption", "0.png,a", "1.png,b", "2.png,c")
    table(folder, "image,caption", "2.png,c", "3.png,d", name="val.csv")
    config = DataConfig(train=config.train, validation=str(folder / "val.csv"))
    with pytest.raises(DataError, match=r"image 2\.png \(training row 3, validation row 1\)"):
        read_dataset(config, ANYWHERE, seed=0)
    dataset = read_dataset(replace(config, leakage="notice"), ANYWHERE, seed=0)
    assert (len(dataset.train), len(dataset.validation), len(dataset.leaks)) == (3, 2, 1)


def test_what_was_found_unreadable_is_remembered_until_the_file_changes(folder: Path) -> None:
    config = table(folder, "image,caption", *(f"{row}.png,tile {row}" for row in range(8)))
    spoiled = (folder / "3.png").read_bytes()
    (folder / "3.png").write_text("no image")
    first = read_dataset(config, ANYWHERE, seed=0)
    known = Findings.load(first.findings.store())
    (folder / "3.png").write_bytes(spoiled)
    assert read_dataset(config, ANYWHERE, seed=0, known=known).bad == first.bad
    table(folder, "image,caption", *(f"{row}.png,a tile {row}" for row in range(8)))
    assert read_dataset(config, ANYWHERE, seed=0, known=known).bad == ()


def pairs(folder: Path, rows: int = 12) -> Pairs:
    return Pairs(
        [
            Pair(row=row + 1, image=folder / f"{row}.png", reference="", caption=f"tile {row // 2}")
            for row in range(rows)
        ]
    )


def load(folder: Path, clip: Clip, first: int = 0, total: int = 6, **options: object) -> list[Batch]:
    options = {"augmentation": NAMED["crop"], **options}
    with Loader(pairs(folder), clip, batch_size=5, seed=5, **options) as loader:  # type: ignore[arg-type]
        return list(loader.batches(first, total))


def test_a_loader_that_begins_anywhere_gives_what_an_uninterrupted_one_gives(
    folder: Path, clip: Clip
) -> None:
    whole, late = load(folder, clip), load(folder, clip, first=3)
    assert [(batch.epoch, batch.index) for batch in whole] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(map(same, whole[3:], late))
    assert not torch.equal(whole[0].images_B3HW[:], whole[2].images_B3HW[:])
    assert whole[0].images_B3HW.shape == (5, 3, 32, 32)
    seen = torch.cat([whole[0].image_ids_B, whole[1].image_ids_B])
    assert len(set(seen.tolist())) == 10


def test_an_image_that_goes_bad_is_replaced_alike_each_time_and_counted(folder: Path, clip: Clip) -> None:
    (folder / "4.png").write_text("no image any more")
    told: list[tuple[int, str]] = []
    first = load(folder, clip, max_bad=1, on_bad_row=lambda pair, reason: told.append((pair.row, reason)))
    again = load(folder, clip, max_bad=1)
    assert all(map(same, first, again))
    assert len(told) == 1
    assert told[0][0] == 5
    assert all(4 not in batch.image_ids_B for batch in first)
    with pytest.raises(DataError, match="row 5") as caught:
        load(folder, clip, max_bad=0)
    assert caught.value.metadata["row"] == "5"


def test_identities_are_those_of_file_and_text() -> None:
    repeated = Pairs([pair(1, "a.png"), pair(2, "b.png"), pair(3, "a.png")])
    assert repeated.image_ids.tolist() == [0, 1, 0]
    assert repeated.caption_ids.tolist() == [0, 0, 0]
    assert repeated.image_ids.dtype == np.int64
