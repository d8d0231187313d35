"""Adapters: what is trained, what a file takes, and what a training step holds, beside all weights.

Random weights of each architecture; the numbers depend on shapes alone. An adapter's file is written and
weighed; the state of a step is weights, gradients and AdamW's moments in fp32, activations aside. Merged: the
largest difference of embeddings of noise between the adapted and the merged model, by the largest number.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from bench.record import Columns, report
from cliptune_model.adapters import AdapterConfig, BaseIdentity, SharedBase, attach, merged_state
from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, manifest_of
from cliptune_model.machine.workload import Workload
from cliptune_model.source import ModelSource

MODELS: Final = ("ViT-B-32", "ViT-B-16", "RN50", "cliptune-mini-vit", "cliptune-mini")
CONFIGS: Final = (
    AdapterConfig(rank=2),
    AdapterConfig(rank=8),
    AdapterConfig(kind="bottleneck", rank=16, dropout=0.0),
)
MB: Final = 1e6


def measured(name: str, config: AdapterConfig) -> Columns:
    """One line of the table."""
    source = ModelSource(name=name)
    clip = build(source)
    whole = _state_bytes(clip)
    weights = sum(one.numel() for one in clip.model.parameters())
    # Nothing is loaded from here: the digest of the base is not needed.
    clip = attach(clip, config, BaseIdentity(source=source, seed=0, sha256="0" * 64))
    trained = sum(one.numel() for one in clip.model.parameters() if one.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        export_model(clip, Path(folder) / "adapter", manifest_of(clip), adapter_alone=True)
        size = (Path(folder) / "adapter" / "cliptune_adapter.safetensors").stat().st_size
    return {
        "model": name,
        "adapter": f"{config.kind}, rank {config.rank}",
        "layers": len(clip.adapter.layers) if clip.adapter else 0,
        "trained": trained,
        "trained_percent": round(100 * trained / weights, 3),
        "file_mb": round(size / MB, 3),
        "weights_mb": round(4 * weights / MB, 1),
        "state_mb": round(_state_bytes(clip) / MB, 1),
        "state_mb_of_all_weights": round(whole / MB, 1),
        "merged_error": _merged_error(clip) if config.mergeable else "",
    }


def _state_bytes(clip: Clip) -> int:
    return Workload.of(clip, batch_size=1, image_tokens=1).state_bytes()


@torch.no_grad()
def _merged_error(clip: Clip) -> float:
    """Relative, in fp32, with last matrices that are not zero."""
    for name, parameter in clip.model.named_parameters():
        if name.endswith(".up"):
            parameter.normal_(std=0.02)
    images_B3HW = torch.randn(2, 3, *clip.image_size)
    tokens_BL = clip.tokenize(["a photo of a cell", "a crack"])
    wanted = clip.encode_images(images_B3HW), clip.encode_texts(tokens_BL)
    merged = merged_state(clip.model)
    plain = SharedBase(clip).copy()
    plain.model.load_state_dict(merged)
    found = plain.encode_images(images_B3HW), plain.encode_texts(tokens_BL)
    pairs = zip(wanted, found, strict=True)
    return max(float((one - two).abs().max() / one.abs().max()) for one, two in pairs)


def lines(models: list[str]) -> Iterator[Columns]:
    """A line for each model and adapter."""
    for name in models:
        for config in CONFIGS:
            yield measured(name, config)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    torch.manual_seed(0)
    report("adapters", lines(list(parser.parse_args().models)))


if __name__ == "__main__":
    main()
