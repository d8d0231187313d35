"""An adapter's folder: small, over its own base alone, and merged once."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cliptune.errors import (
    AdapterBaseError,
    ConflictError,
    InvalidInputError,
    ModelDamagedError,
    ModelNotFoundError,
)
from cliptune_model.adapters import AdapterConfig, describe_adapter, load_adapted
from cliptune_model.cli import adapters
from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, load_exported, manifest_of
from cliptune_model.source import ModelSource
from tests.support.adapters import adapted, identity


def source(folder: Path) -> ModelSource:
    return ModelSource(name=f"local-dir:{folder}")


def write_base(folder: Path, seed: int) -> Path:
    clip = build(ModelSource(name="cliptune-test-vit"), seed=seed)
    export_model(clip, folder, manifest_of(clip))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, an adapter that was trained over it, and a bottleneck."""
    root = tmp_path_factory.mktemp("adapter")
    base = write_base(root / "base", 4)
    for name, config in {
        "lora": AdapterConfig(rank=2, dropout=0.0),
        "bottleneck": AdapterConfig(kind="bottleneck", rank=4, dropout=0.0),
    }.items():
        clip = load_exported(base)
        clip = adapted(clip, config, base=identity(clip, source(base)))
        with torch.no_grad():
            clip.model.get_parameter("logit_scale").fill_(3.0)
        export_model(clip, root / name, manifest_of(clip, metrics={"m": 0.5}), adapter_alone=True)
    return {name: root / name for name in ("base", "lora", "bottleneck")}


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    adapters.add_arguments(parser)
    return adapters.run(parser.parse_args([str(word) for word in words]))


@torch.inference_mode()
def vectors(clip: Clip) -> tuple[Tensor, Tensor]:
    height, width = clip.image_size
    images_B3HW = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    return clip.encode_images(images_B3HW), clip.encode_texts(clip.tokenize(["a cat", "a red square"]))


@pytest.mark.parametrize("name", ["lora", "bottleneck"])
def test_an_adapter_comes_back_from_its_folder_over_its_base(folders: dict[str, Path], name: str) -> None:
    clip = load_exported(folders[name])
    assert clip.adapter is not None
    assert clip.logit_scale == pytest.approx(torch.tensor(3.0).exp().item())
    assert not clip.model.training
    trained = {one for one, weight in clip.model.named_parameters() if weight.requires_grad}
    assert all(".adapter." in one or one.startswith("logit") for one in trained)
    base = vectors(load_exported(folders["base"]))
    assert not any(map(torch.allclose, vectors(clip), base))
    files = {path.name for path in folders[name].iterdir()}
    assert "open_clip_model.safetensors" not in files


def test_the_command_merges_into_a_model_that_computes_the_same_and_shows_what_an_adapter_is(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("merge", folders["lora"], tmp_path / "merged") == 0
    merged = load_exported(tmp_path / "merged")
    assert merged.adapter is None
    for one, two in zip(vectors(merged), vectors(load_adapted(folders["lora"])), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "merged" / "cliptune.json").read_text())["metrics"] == {"m": 0.5}
    assert run("show", folders["lora"]) == 0
    told = capsys.readouterr().out
    assert "lora of rank 2" in told
    assert str(folders["base"]) in told


def test_merging_twice_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    once = tmp_path / "once"
    run("merge", folders["lora"], once)
    with pytest.raises(ConflictError, match="in its weights already"):
        run("merge", folders["lora"], tmp_path / "twice", "--base", f"local-dir:{once}")
    with pytest.raises(ConflictError, match="has its adapter in its weights already"):
        run("merge", once, tmp_path / "twice")
    with pytest.raises(ConflictError, match="is there already"):
        run("merge", folders["lora"], once)
    assert not (tmp_path / "twice").exists()


def test_a_bottleneck_is_not_merged_and_leaves_no_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConflictError, match="no weight can hold it"):
        run("merge", folders["bottleneck"], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_another_base_is_refused_and_both_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", 5)
    wanted, found = describe_adapter(folders["lora"]).attached.base, str(other)
    with pytest.raises(AdapterBaseError) as raised:
        load_adapted(folders["lora"], base=source(other))
    assert wanted.told in raised.value.message
    assert found in raised.value.message
    assert raised.value.metadata["wanted"] == wanted.sha256
    assert raised.value.metadata["found"] not in ("", wanted.sha256)


def test_the_same_weights_elsewhere_are_the_same_base(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["base"], tmp_path / "moved")
    moved = load_adapted(folders["lora"], base=source(tmp_path / "moved"))
    for one, two in zip(vectors(moved), vectors(load_adapted(folders["lora"])), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("cliptune_adapter.safetensors", b"", ModelDamagedError),
        ("cliptune_adapter.safetensors", None, ModelDamagedError),
        ("cliptune_adapter.json", b"{}", InvalidInputError),
        ("cliptune_adapter.json", b'{"format": 99}', InvalidInputError),
        ("cliptune_adapter.json", None, ModelNotFoundError),
    ],
    ids=["cut-weights", "lost-weights", "empty-description", "newer-format", "lost-description"],
)
def test_a_damaged_adapter_is_told(
    folders: dict[str, Path], tmp_path: Path, file: str, content: bytes | None, error: type[Exception]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(folders["lora"], folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(error):
        load_adapted(folder)


def test_a_job_cannot_start_from_an_adapter_and_hears_what_makes_a_model_of_it(
    folders: dict[str, Path],
) -> None:
    with pytest.raises(InvalidInputError, match="cliptune adapters merge"):
        build(source(folders["lora"]))
