"""Traps of Apple's GPU that are avoided by how models are built and called, on any device."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cliptune_model.acceleration.folded import fold
from cliptune_model.acceleration.lean import choose_lean
from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, manifest_of
from cliptune_model.source import CONFIG_FOLDER, ModelSource

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "model").rglob("*.py")) + sorted((ROOT / "trainer").rglob("*.py"))
CPU_ALONE = {"folded.py", "folded_blocks.py", "lean_blocks.py"}


class Devices(TorchDispatchMode):
    """On which devices the resampling of images ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if "upsample" in str(op):
            self.seen.add(f"{arguments[0].device.type} {arguments[0].dtype}")
        return op(*arguments, **(options or {}))


def test_trap_5_weights_stored_in_half_precision_are_trained_in_fp32(clip: Clip, tmp_path: Path) -> None:
    export_model(clip, tmp_path / "model", manifest_of(clip))
    weights = tmp_path / "model" / "open_clip_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    loaded = build(ModelSource(name=f"local-dir:{tmp_path / 'model'}"))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_trap_6_no_text_tower_asks_for_is_causal_and_its_mask_is_of_floats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, calls = F.scaled_dot_product_attention, []

    def recorded(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor:
        calls.append((attn_mask, more.get("is_causal", False) or (len(rest) > 1 and rest[1])))
        return right(q, k, v, attn_mask, *rest, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    for name in ("cliptune-test-vit", "cliptune-tiny-vit"):
        clip = build(ModelSource(name=name))
        clip.model.train()
        clip.encode_texts(clip.tokenize(["a cat"]))
    assert calls
    assert not any(is_causal for _, is_causal in calls)
    assert all(mask is not None and mask.is_floating_point() for mask, _ in calls)


def test_trap_6_nothing_in_the_sources_uses_what_is_wrong_on_mps() -> None:
    """Channels-last, is_causal=True and baddbmm with beta=0, in calls. What CUDA alone uses says so there."""
    found = []
    for path in SOURCES:
        wrong = {"baddbmm", "baddbmm_"} | (set() if path.name in CPU_ALONE else {"channels_last"})
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in wrong:
                found.append(f"{path.name}:{node.lineno} {node.attr}")
            if isinstance(node, ast.keyword) and ast.unparse(node) == "is_causal=True":
                found.append(f"{path.name}:{node.value.lineno} is_causal=True")
    assert not found


def test_trap_6_what_lies_channels_last_is_chosen_on_the_cpu_alone() -> None:
    on_cpu = build(ModelSource(name="cliptune-mini"))
    elsewhere = dataclasses.replace(on_cpu, model=copy.deepcopy(on_cpu.model).to("meta"))
    assert "layout" in choose_lean(on_cpu).value
    assert fold(on_cpu)[1].value == "on"
    assert "layout" not in choose_lean(elsewhere).value
    left, choice = fold(elsewhere)
    assert left is elsewhere
    assert choice.value == "off"


def test_trap_7_position_embeddings_are_resized_on_the_cpu_in_fp32_whatever_the_device(
    clip: Clip, tmp_path: Path
) -> None:
    # The weights of 32-pixel images into a model of 48-pixel ones, on a device that is not the CPU.
    export_model(clip, tmp_path / "small", manifest_of(clip))
    config = json.loads((CONFIG_FOLDER / "cliptune-test-vit.json").read_text())
    config["vision_cfg"]["image_size"] = 48
    folder = tmp_path / "large"
    folder.mkdir()
    stored = json.loads((tmp_path / "small" / "open_clip_config.json").read_text())
    stored["model_cfg"] = config
    (folder / "open_clip_config.json").write_text(json.dumps(stored))
    (tmp_path / "small" / "open_clip_model.safetensors").rename(folder / "open_clip_model.safetensors")
    with Devices() as devices:
        loaded = build(ModelSource(name=f"local-dir:{folder}"), device="meta")
    assert loaded.device.type == "meta"
    assert devices.seen == {"cpu torch.float32"}
