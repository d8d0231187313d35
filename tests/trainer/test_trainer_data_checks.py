from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from cliptune.errors import DataError
from cliptune_model.clip import Clip
from cliptune_trainer.data import findings as findings_module
from cliptune_trainer.data.dataset import Dataset, read_dataset
from cliptune_trainer.data.findings import Findings
from cliptune_trainer.data.remarks import about_data
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.spec import DataConfig

ANYWHERE = DataRoots()


@pytest.fixture
def folder(tiles: Path, tmp_path: Path) -> Path:
    """Twelve tiles, and copies of two of them: one file for file, one saved anew in another format."""
    for row in range(12):
        shutil.copy(tiles / f"{row}.png", tmp_path)
    shutil.copy(tmp_path / "2.png", tmp_path / "copy.png")
    Image.open(tmp_path / "5.png").save(tmp_path / "again.bmp")
    return tmp_path


def write(folder: Path, *lines: str, name: str = "rows.csv") -> str:
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def read(train: str, **options: Any) -> Dataset:
    config = DataConfig(train=train, **{"validation_fraction": 0.0, **options})
    return read_dataset(config, ANYWHERE, seed=0)


def remarks(dataset: Dataset, clip: Clip) -> dict[str, str]:
    return {remark.code: remark.message for remark in about_data(dataset, clip)}


def twice(folder: Path) -> str:
    """Rows 1-12 are the tiles, rows 13 and 14 the copies of 2.png and 5.png."""
    images = [*(f"{row}.png" for row in range(12)), "copy.png", "again.bmp"]
    return write(folder, "image,caption", *(f"{image},tile {row}" for row, image in enumerate(images)))


# -- duplicates


def test_images_of_equal_content_are_noticed_and_count_as_one(folder: Path, clip: Clip) -> None:
    dataset = read(twice(folder))
    assert remarks(dataset, clip)["duplicate-images"] == (
        "2 images under a second name, taken for the same image: row 13 (copy.png) is row 3 (2.png);"
        " row 14 (again.bmp) is row 6 (5.png)"
    )
    ids = dataset.train.image_ids
    assert len(dataset.train) == 14
    assert (ids[12], ids[13]) == (ids[2], ids[5])
    assert len(set(ids.tolist())) == 12


def test_duplicates_are_dropped_but_for_the_first_or_refused(folder: Path, clip: Clip) -> None:
    dataset = read(twice(folder), duplicates="drop")
    assert [pair.row for pair in dataset.train.pairs] == list(range(1, 13))
    assert "left out: row 13" in remarks(dataset, clip)["duplicate-images"]
    with pytest.raises(DataError, match=r"row 13 \(copy\.png\) is row 3 \(2\.png\)") as caught:
        read(twice(folder), duplicates="refuse")
    assert caught.value.metadata["copies"] == "2"


def test_several_captions_of_one_image_are_no_duplicates(folder: Path, clip: Clip) -> None:
    dataset = read(write(folder, "image,caption", "0.png,a", "0.png,b", "1.png,c"), duplicates="refuse")
    assert len(dataset.train) == 3
    assert "duplicate-images" not in remarks(dataset, clip)


def test_a_split_made_here_keeps_equal_images_together(folder: Path) -> None:
    for seed in range(8):
        config = DataConfig(train=twice(folder), validation_fraction=0.4)
        dataset = read_dataset(config, ANYWHERE, seed=seed)
        held_out = {pair.row for pair in dataset.validation.pairs}
        assert (3 in held_out) == (13 in held_out)
        assert (6 in held_out) == (14 in held_out)


def test_of_many_images_files_of_equal_bytes_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_alike = bytearray((folder / "7.png").read_bytes())
    looked_alike[len(looked_alike) // 2] ^= 1  # beyond the first bytes and before the last
    (folder / "8.png").write_bytes(looked_alike)
    monkeypatch.setattr(findings_module, "MAX_DECODED", 2)
    monkeypatch.setattr(findings_module, "_ENDS_BYTES", 64)
    dataset = read(twice(folder), max_bad_fraction=0.5)
    assert dataset.copies.startswith("1 image under a second name")
    assert "row 13 (copy.png) is row 3 (2.png)" in dataset.copies
    members = {f"{row:02d}.png": folder / name for row, name in enumerate(("0.png", "1.png", "copy.png"))}
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, file in {**members, "03.png": folder / "2.png"}.items():
            tar.add(file, name)
            (folder / "caption.txt").write_text(f"tile {name}")
            tar.add(folder / "caption.txt", name.replace("png", "txt"))
    assert "row 4 (a.tar/03.png) is row 3 (a.tar/02.png)" in read(str(folder / "a.tar")).copies


def test_what_was_found_is_kept_for_the_run(folder: Path) -> None:
    config = DataConfig(train=twice(folder))
    first = read_dataset(config, ANYWHERE, seed=0)
    known = Findings.load(first.findings.store())
    assert known == first.findings
    for image in folder.glob("*.png"):
        image.write_bytes(b"not looked at again")
    again = read_dataset(config, ANYWHERE, seed=0, known=known)
    assert again.copies == first.copies
    assert again.train.pairs == first.train.pairs


# -- leaks


def test_a_group_in_both_splits_is_refused_with_its_rows(folder: Path, clip: Clip) -> None:
    rows = [f"{row}.png,tile {row},p{row // 3},{'val' if row in (4, 9) else 'train'}" for row in range(12)]
    table = write(folder, "image,caption,patient,part", *rows)
    options: dict[str, Any] = {"split_column": "part", "group_column": "patient"}
    with pytest.raises(DataError) as caught:
        read(table, **options)
    assert "group 'p1' (training rows 4, 6, validation row 5)" in caught.value.message
    assert "group 'p3' (training rows 11, 12, validation row 10)" in caught.value.message
    assert caught.value.metadata["leaks"] == "2"
    dataset = read(table, **options, leakage="notice")
    assert remarks(dataset, clip)["leakage"].startswith(
        "2 leaks between the training and the validation rows"
    )
    assert (len(dataset.train), len(dataset.validation)) == (10, 2)


def test_an_image_under_another_name_in_the_validation_file_is_a_leak(folder: Path) -> None:
    train = write(folder, "image,caption", "2.png,a tile", "5.png,another")
    validation = write(folder, "image,caption", "copy.png,a tile", "7.png,another", name="val.csv")
    with pytest.raises(DataError, match=r"image 2\.png \(training row 1, validation row 1\)"):
        read(train, validation=validation)
    dropped = read(train, validation=validation, duplicates="drop")
    assert [pair.reference for pair in dropped.validation.pairs] == ["7.png"]
    assert "val.csv, row 1 (copy.png) is rows.csv, row 1 (2.png)" in dropped.copies


def test_a_split_made_here_leaks_nothing(folder: Path) -> None:
    rows = [f"{row}.png,tile {row},p{row // 3}" for row in range(12)]
    table = write(folder, "image,caption,patient", *rows, "copy.png,tile,p9", "again.bmp,tile,")
    for seed in range(5):
        config = DataConfig(train=table, group_column="patient", validation_fraction=0.5)
        assert not read_dataset(config, ANYWHERE, seed=seed).leaks


# -- what else a user should know


def test_one_caption_for_all_rows_is_refused(folder: Path) -> None:
    table = write(folder, "image,caption", *(f"{row}.png,a tile" for row in range(7)))
    with pytest.raises(DataError, match=r"same caption, 'a tile' \(rows 1, 2, 3, 4, 5 and 2 more"):
        read(table)


def test_a_class_of_one_image_is_noticed_with_its_row(folder: Path, clip: Clip) -> None:
    rows = ["0.png,a,red", "0.png,b,red", "1.png,c,green", "2.png,d,green|new", "copy.png,e,new", "3.png,f,"]
    table = write(folder, "image,caption,label", *rows)
    dataset = read(table, label_column="label", label_separator="|")
    assert remarks(dataset, clip)["class-of-one-image"] == (
        "2 labels with a single image, which cannot both train and validate: 'red' (row 1); 'new' (row 4)"
    )


def test_mixed_bit_depths_are_noticed_with_the_first_row_of_each(folder: Path, clip: Clip) -> None:
    deep = np.arange(1600, dtype=np.uint16).reshape(40, 40)
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep.T.copy()).save(folder / "deeper.tif")
    table = write(folder, "image,caption", "0.png,a", "deep.png,b", "1.png,c", "deeper.tif,d")
    dataset = read(table)
    told = remarks(dataset, clip)["mixed-bit-depths"]
    assert "2 images not of 8 bits" in remarks(dataset, clip)["deep-images"]
    assert f"2 are 8-bit (the first is row 1 of {table})" in told
    assert f"2 are 16-bit (the first is row 2 of {table})" in told
    same = write(folder, "image,caption", "deep.png,b", "deeper.tif,d", name="deep.csv")
    assert "mixed-bit-depths" not in remarks(read(same), clip)


def test_dicom_files_without_pixels_are_named_and_skipped(folder: Path) -> None:
    plan = get_testdata_file("rtplan.dcm", download=False)
    assert isinstance(plan, str)
    shutil.copy(plan, folder)
    table = write(
        folder, "image,caption", *(f"{row}.png,tile {row}" for row in range(9)), "rtplan.dcm,a plan"
    )
    dataset = read(table, max_bad_fraction=0.1)
    assert dataset.bad == (
        "rows.csv, row 10: rtplan.dcm: the DICOM file holds no pixels: it is a RT Plan Storage",
    )
    with pytest.raises(DataError, match="the first is row 10"):
        read(table)


def test_captions_longer_than_the_context_are_counted(folder: Path, clip: Clip) -> None:
    assert clip.context_length == 16
    fits, lost = " ".join(["tile"] * 14), " ".join(["tile"] * 15)  # start and end take two tokens
    rows = [f"0.png,{fits}", f"1.png,{lost}", "2.png,short", f"3.png,{lost} ✓", f"4.png,{lost}"]
    dataset = read(write(folder, "image,caption", *rows))
    assert remarks(dataset, clip)["captions-cut"] == (
        "2 captions of more than the 16 tokens that the model reads, cut there: rows 2, 4, 5;"
        " with model.context_length, up to 248, it reads more"
    )
    one_token_a_byte = "".join(chr(0x4E00 + place) for place in range(15))  # 15 letters of three bytes
    assert "captions-cut" in remarks(
        read(write(folder, "image,caption", f"0.png,{one_token_a_byte}", "1.png,short")), clip
    )


def test_sound_data_are_not_remarked_on(tiles: Path, clip: Clip) -> None:
    config = DataConfig(train=str(tiles / "tiles.csv"), label_column="label", group_column="module")
    assert remarks(read_dataset(config, ANYWHERE, seed=0), clip) == {}
