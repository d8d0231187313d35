"""The models as they are shipped: open_clip's folders in half precision, with model cards and checksums.

Enters: trained towers and `cards/NAME.md`. Leaves: `mini/cliptune_mini/NAME/` and `SHA256SUMS`. Run by
`python -m scripts.mini pack`. The statistics of batch norms stay fp32: some are too small for fp16.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from cliptune.embedded import MANIFEST, PROBE_FOLDER, SUMS, WEIGHTS
from scripts.mini import teacher, towers

CARDS: Final = Path(__file__).parent / "cards"
VERSION: Final = "0.1.0"
LOGIT_SCALE: Final = 30.0  # what the image head was trained with


def run(
    prepared: Path, trained: Path, target: Path, names: tuple[str, ...] = (towers.MINI, towers.VIT)
) -> None:
    """The step: every model for which both towers are there."""
    for name in names:
        halves = [trained / f"{half}.{name}.pt" for half in ("images", "texts")]
        if all(path.is_file() for path in halves):
            write(name, weights(name, prepared, *halves), target / name)
            print(f"{name}: {(target / name / WEIGHTS).stat().st_size / 1e6:.1f} MB", flush=True)
        else:
            print(f"{name}: left out, for {' or '.join(path.name for path in halves)} is missing", flush=True)
    seal(target)


def seal(target: Path) -> None:
    """Writes the checksums of every file that a folder of the package holds."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(target).as_posix()}\n"
        for path in sorted(target.glob("*/*"))
        if path.is_file() and path.parent.name in (*towers.MODEL_CONFIG, PROBE_FOLDER)
    ]
    (target / SUMS).write_text("".join(lines), encoding="utf-8")


def weights(name: str, prepared: Path, images: Path, texts: Path) -> dict[str, Tensor]:
    """The whole state of open_clip's model: it loads strictly."""
    model = towers.build(name)
    state = dict(model.state_dict())
    visual: dict[str, Tensor] = torch.load(images, map_location="cpu", weights_only=True)
    if name == towers.MINI:
        trunk = torch.load(prepared / "lite0.pt", map_location="cpu", weights_only=True)
        kept = {f"trunk.{key}": value for key, value in trunk.items() if not key.startswith("classifier")}
        visual = {**kept, **{f"head.{key}": value for key, value in visual.items()}}
    text: dict[str, Tensor] = torch.load(texts, map_location="cpu", weights_only=True)["weights"]
    state.update({f"visual.{key}": value for key, value in visual.items()}, **text)
    state["logit_scale"] = torch.tensor(math.log(LOGIT_SCALE))
    model.load_state_dict(state)
    return {
        key: value.half() if value.is_floating_point() and _halved(key) else value
        for key, value in model.state_dict().items()
        if key != "attn_mask"
    }


def write(name: str, state: dict[str, Tensor], folder: Path) -> None:
    """open_clip's configuration, the weights, the manifest and the card."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors' is private
    config = {"model_cfg": towers.MODEL_CONFIG[name], "preprocess_cfg": towers.preprocess_config(name)}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    size = int(towers.MODEL_CONFIG[name]["vision_cfg"]["image_size"])
    manifest: dict[str, Any] = {
        "architecture": "custom",
        "context_length": towers.CONTEXT,
        "created": "2026-11-23T00:00:00+00:00",
        "embedding_dim": teacher.DIM,
        "format_version": 1,
        "image_size": [size, size],
        "name": name,
        "precision": "fp16",
        "release": VERSION,
        "similarity": "cosine",
        "weights_sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copy(CARDS / f"{name}.md", folder / "README.md")


def _halved(key: str) -> bool:
    return not key.endswith(("running_mean", "running_var", "logit_scale"))
