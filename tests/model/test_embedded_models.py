"""Models that come as a package: found by name, proved whole, and refused clearly when they are not."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from cliptune.embedded import DEFAULT_MODEL as NAME
from cliptune.embedded import SUMS, WEIGHTS, embedded_digest, embedded_names
from cliptune.errors import (
    InvalidInputError,
    ModelDamagedError,
    ModelNotFoundError,
    WeightsUnavailableError,
)
from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, load_exported, manifest_of
from cliptune_model.manifest import MANIFEST_FILE
from cliptune_model.source import ModelSource
from tests.support.embedded import seal, write_package


@pytest.fixture
def package(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with two models that differ in nothing but their names."""
    folder = write_package(tmp_path / "site", clip, NAME, f"{NAME}-vit")
    monkeypatch.syspath_prepend(folder.parent)
    importlib.invalidate_caches()
    return folder


def test_a_name_loads_the_packages_model(package: Path, clip: Clip) -> None:
    assert embedded_names() == [NAME, f"{NAME}-vit"]
    loaded = build(ModelSource(name=NAME))
    assert loaded.pretrained
    tokens = clip.tokenize(["a cat"])
    assert torch.equal(loaded.encode_texts(tokens), clip.encode_texts(tokens))


def test_without_the_package_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliptune.embedded.PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(WeightsUnavailableError, match="pip install cliptune-mini"):
        build(ModelSource(name=NAME))
    assert embedded_names() == []


def test_a_name_that_the_package_does_not_have_is_told_with_those_it_has(package: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"{NAME}, {NAME}-vit"):
        build(ModelSource(name=f"{NAME}-huge"))


def test_other_weights_beside_an_embedded_model_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="brings its own weights"):
        ModelSource(name=NAME, pretrained="openai")


@pytest.mark.parametrize("file", [WEIGHTS, "open_clip_config.json", MANIFEST_FILE])
def test_a_file_that_is_missing_is_named(package: Path, file: str) -> None:
    (package / NAME / file).unlink()
    with pytest.raises(ModelDamagedError, match=file) as caught:
        build(ModelSource(name=NAME))
    assert caught.value.metadata["file"].endswith(file)


def test_weights_that_were_cut_short_are_refused(package: Path) -> None:
    path = package / NAME / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelDamagedError, match="cut short"):
        build(ModelSource(name=NAME))


def test_weights_with_one_bit_changed_are_refused(package: Path) -> None:
    path = package / NAME / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelDamagedError, match="SHA-256"):
        build(ModelSource(name=NAME))


def test_another_model_under_its_name_is_refused_though_it_is_whole(package: Path, tmp_path: Path) -> None:
    other = build(ModelSource(name="cliptune-test-vit"), seed=9)
    sums = (package / SUMS).read_text()
    export_model(other, package / NAME, manifest_of(other))
    seal(package / NAME)
    (package / SUMS).write_text(sums)
    with pytest.raises(ModelDamagedError, match="is another model"):
        build(ModelSource(name=NAME))
    assert build(ModelSource(name=f"{NAME}-vit")).pretrained  # the other name is not harmed


def test_a_list_of_checksums_that_cannot_be_read_is_told(package: Path) -> None:
    (package / SUMS).write_text("no checksum\n")
    with pytest.raises(ModelDamagedError, match="checksums"):
        embedded_digest(NAME)


def test_a_copy_of_the_model_is_checked_by_its_manifest(package: Path) -> None:
    folder = package / NAME
    assert load_exported(folder).pretrained
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ModelDamagedError, match="SHA-256"):
        load_exported(folder)
