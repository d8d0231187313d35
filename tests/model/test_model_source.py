"""Where models come from: every source, and what is said when one cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from cliptune.errors import ConflictError, InvalidInputError, ModelNotFoundError
from cliptune_model import source as source_module
from cliptune_model.clip import Clip, build
from cliptune_model.source import CONFIG_FOLDER, ModelSource, resolve


def test_a_plain_open_clip_folder_loads(clip: Clip, tmp_path: Path) -> None:
    config = {"model_cfg": clip.model_config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(clip.model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    loaded = build(ModelSource(name=f"local-dir:{tmp_path}"))
    assert loaded.pretrained
    assert loaded.architecture == "cliptune-test-vit"
    assert list(loaded.preprocess_config["mean"]) == [0.5] * 3
    tokens = clip.tokenize(["a cat"])
    assert torch.equal(loaded.encode_texts(tokens), clip.encode_texts(tokens))


def test_a_folder_with_a_configuration_of_its_own_is_custom(clip: Clip, tmp_path: Path) -> None:
    model_config = json.loads(json.dumps(clip.model_config))
    model_config["vision_cfg"]["layers"] = 1
    weights = {k: v for k, v in clip.model.state_dict().items() if "visual.transformer.resblocks.1" not in k}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config}))
    save_file(weights, tmp_path / "weights.safetensors")
    assert build(ModelSource(name=f"local-dir:{tmp_path}")).architecture == "custom"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_weights_file_serves_as_pretrained(clip: Clip, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(clip.model.state_dict(), path)
    else:
        torch.save({"state_dict": clip.model.state_dict(), "epoch": 3}, path)
    loaded = build(ModelSource(name="cliptune-test-vit", pretrained=str(path)), seed=99)
    assert loaded.pretrained
    assert torch.equal(
        loaded.model.state_dict()["text_projection"], clip.model.state_dict()["text_projection"]
    )


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (os.environ["BOMB_FOLDER"],))


def test_a_weights_file_that_would_run_code_is_refused_and_runs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOMB_FOLDER", str(tmp_path / "exploded"))
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {"a": Bomb()}}, path)
    with pytest.raises(InvalidInputError, match="safetensors"):
        build(ModelSource(name="cliptune-test-vit", pretrained=str(path)))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x08\0\0\0\0\0\0\0{}      "])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_weights_are_an_input_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match="weights"):
        build(ModelSource(name="cliptune-test-vit", pretrained=str(path)))


def test_weights_of_another_architecture_are_an_input_error(clip: Clip, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(clip.model.state_dict(), path)
    with pytest.raises(InvalidInputError, match="does not load as cliptune-tiny-vit"):
        build(ModelSource(name="cliptune-tiny-vit", pretrained=str(path)))


def test_an_unknown_architecture_is_answered_with_close_names() -> None:
    with pytest.raises(InvalidInputError, match="did you mean ViT-B-32") as caught:
        build(ModelSource(name="vit-b32"))
    assert "ViT-B-32" in caught.value.metadata["allowed"]
    with pytest.raises(InvalidInputError, match="cliptune-tiny-vit"):
        build(ModelSource(name="zzzzzzzz"))


def test_an_unknown_tag_is_answered_with_the_allowed_ones() -> None:
    with pytest.raises(InvalidInputError, match="laion2b_s34b_b79k") as caught:
        build(ModelSource(name="ViT-B-32", pretrained="laion3b"))
    assert "openai" in caught.value.metadata["allowed"]
    with pytest.raises(InvalidInputError, match="no published weights"):
        build(ModelSource(name="cliptune-tiny-vit", pretrained="/nowhere/weights.safetensors"))


def test_missing_and_foreign_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no folder"):
        build(ModelSource(name=f"local-dir:{tmp_path / 'absent'}"))
    with pytest.raises(InvalidInputError, match=r"has no open_clip_config\.json"):
        build(ModelSource(name=f"local-dir:{tmp_path}"))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="not a configuration"):
        build(ModelSource(name=f"local-dir:{tmp_path}"))
    config = open_clip.get_model_config("ViT-B-32")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(InvalidInputError, match="has no weights"):
        build(ModelSource(name=f"local-dir:{tmp_path}"))


@pytest.mark.parametrize(
    ("name", "pretrained"), [("", ""), (" ", ""), ("local-dir:", ""), ("hf-hub:a/b", "openai")]
)
def test_a_source_that_makes_no_sense_is_refused_at_once(name: str, pretrained: str) -> None:
    with pytest.raises(InvalidInputError):
        ModelSource(name=name, pretrained=pretrained)


@pytest.mark.skipif(source_module.find_spec("transformers") is not None, reason="transformers is installed")
def test_an_architecture_that_needs_another_package_names_it() -> None:
    with pytest.raises(ConflictError, match="pip install transformers"):
        build(ModelSource(name="ViT-B-16-SigLIP"))


def test_openai_weights_keep_the_activation_they_were_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    # open_clip only warns and computes with the wrong one; no download is needed to see what it is told.
    monkeypatch.setattr(source_module.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(source_module.open_clip_pretrained, "download_pretrained", lambda config: "/fetched")
    recipe = resolve(ModelSource(name="ViT-B-32", pretrained="openai"))
    assert recipe.force_quick_gelu
    assert recipe.model_config["quick_gelu"] is True
    assert not resolve(ModelSource(name="ViT-B-32", pretrained="laion2b_s34b_b79k")).force_quick_gelu
    assert not resolve(ModelSource(name="ViT-B-32-quickgelu", pretrained="openai")).force_quick_gelu


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_the_error_names_the_offline_ways(tmp_path: Path, offline: bool) -> None:
    code = (
        "from cliptune.errors import WeightsUnavailableError\n"
        "from cliptune_model.clip import build\n"
        "from cliptune_model.source import ModelSource\n"
        "hub = ModelSource(name='hf-hub:laion/absent-model')\n"
        "for source in (hub, ModelSource(name='ViT-B-32', pretrained='laion2b_e16')):\n"
        "    try:\n"
        "        build(source)\n"
        "    except WeightsUnavailableError as error:\n"
        "        print(error.message)\n"
    )
    # Port 9 of this machine: nothing answers, as without a network, and nothing leaves the machine.
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) == 2
    for message in messages:
        assert all(way in message for way in ("local-dir:", "pretrained =", "HF_HUB_OFFLINE")), message


def test_shipped_configurations_are_whole_and_known_to_open_clip_once_used() -> None:
    names = sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))
    assert names == ["cliptune-test-vit", "cliptune-tiny-vit"]
    source_module.register_shipped_configs()
    for name in names:
        assert open_clip.get_model_config(name)["text_cfg"]["vocab_size"] == 49408
