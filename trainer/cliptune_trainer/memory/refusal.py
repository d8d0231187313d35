"""Why a job cannot fit, by how much, and what would.

Enters: the least that a step takes, and the budget. Leaves: a message with ways out, their bytes counted
roughly. Called by the batch plan when not even one pair at a time fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import open_clip

from cliptune_model.attention import image_tokens
from cliptune_model.clip import Clip
from cliptune_model.image_sizes import fitted
from cliptune_model.machine.workload import Tower, Workload
from cliptune_model.proven_sizes import Size
from cliptune_model.proven_sizes import told as told_size
from cliptune_model.towers.image_tower import image_tower
from cliptune_trainer.memory.estimate import OVERHEAD
from cliptune_trainer.memory.plan import Demand, Way, gib

# Of the weights, that a low-rank adapter trains.
_ADAPTED_SHARE: Final = 0.01
_SMALLER: Final = ("ViT-L-14", "ViT-B-16", "ViT-B-32", "MobileCLIP-S1")
_VOCABULARY: Final = 49_408
# Weights of a transformer's layer, in squares of its width.
_LAYER_SQUARES: Final = 12


def does_not_fit(clip: Clip, workload: Workload, demand: Demand, smallest: Way, *, precision: str) -> str:
    """For a person: what a step takes at the least, how much that is too much, and what would fit."""
    least, budget = smallest.peak_bytes, demand.budget_bytes
    pairs = smallest.micro_batch_size
    at_once = "one pair" if pairs == 1 else f"train.micro_batch_size = {pairs} pairs"
    how = f"{at_once} at a time, attention = {smallest.attention.mode!r}"
    how += " and recomputed activations" if smallest.checkpointing else ""
    told = (
        f"{clip.architecture} does not fit: a step takes about {gib(least)} even with {how} in {precision};"
        f" the budget on {demand.device_type} is {gib(budget)}, {gib(least - budget)} too little."
    )
    beside = least - workload.state_bytes()
    ways_out = [
        f"{what} (about {gib(size)})"
        for what, size in _ways_out(clip, workload, beside, demand, smallest, precision)
        if size <= budget
    ]
    if pairs > 1 and (most := smallest.estimate.pairs_within(budget)) >= 1:
        ways_out.insert(0, f"train.micro_batch_size of at most {most}")
    if ways_out:
        return f"{told} What would fit: {'; '.join(ways_out)}."
    return f"{told} More memory is needed: a larger resources.memory_gib, or another device."


def _ways_out(
    clip: Clip, workload: Workload, beside: int, demand: Demand, smallest: Way, precision: str
) -> Iterator[tuple[str, int]]:
    """What could be trained instead, and the bytes of its step."""
    # The gradient of the largest weight passes through memory; a frozen one has none.
    passing = 4 * max((one.numel() for one in clip.model.parameters() if one.requires_grad), default=0)
    beside = max(0, beside - int(passing * OVERHEAD[demand.device_type]))
    adapted = replace(workload, trainable=int(workload.parameters * _ADAPTED_SHARE))
    yield from _smaller_images(clip, workload, demand, smallest, precision)
    if clip.adapter is None:
        told = "training low-rank adapters (LoRA) in place of all weights: adapter.kind = 'lora'"
        yield told, adapted.state_bytes() + beside
    image = sum(weight.numel() for weight in clip.model.get_submodule("visual").parameters())
    text = workload.parameters - image
    whole = clip.adapter is None and workload.trainable in (None, workload.parameters)
    for frozen, trained in (("image", text), ("text", image)) if whole else ():
        told = f"a frozen {frozen} tower: train.freeze.{frozen} = true"
        yield told, replace(workload, trainable=trained).state_bytes() + beside
    for name in _SMALLER:
        smaller = _workload_of(name, workload)
        if smaller is None or smaller.parameters >= workload.parameters:
            continue
        pair = smaller.pair_bytes("fp32", checkpointing=smallest.checkpointing, scores_kept=False)
        yield f"a smaller model: {name}", smaller.state_bytes() + 2 * pair + demand.loss_bytes


def _smaller_images(
    clip: Clip, workload: Workload, demand: Demand, smallest: Way, precision: str
) -> Iterator[tuple[str, int]]:
    """The largest images that would fit, by what their tokens take against those of the present ones."""
    tower = image_tower(clip.model)
    if tower.why_fixed:
        return

    def pair_bytes(size: Size) -> int:
        tokens = replace(workload, image_tokens=image_tokens(clip.at(size)))
        kept = smallest.attention.mode == "sdpa" and demand.device_type == "mps"
        return tokens.pair_bytes(precision, checkpointing=smallest.checkpointing, scores_kept=kept)

    estimate, pairs, now = smallest.estimate, smallest.micro_batch_size, pair_bytes(clip.image_size)
    for eighths in range(7, 0, -1):
        sides = [
            max(side * eighths // 8, step) for side, step in zip(clip.image_size, tower.step, strict=True)
        ]
        size = fitted(clip, (sides[0], sides[1]))
        taken = estimate.fixed_bytes + int(pairs * estimate.pair_bytes * pair_bytes(size) / now)
        if size != clip.image_size and taken <= demand.budget_bytes:
            yield f"images of {told_size(size)} pixels", taken
            return


def _workload_of(name: str, like: Workload) -> Workload | None:
    """Of an open_clip architecture, from its configuration alone; None: its towers are not plain ones."""
    config = open_clip.get_model_config(name)
    if config is None:
        return None
    vision, text = config["vision_cfg"], config["text_cfg"]
    try:
        towers = [
            Tower(layers=part["layers"], width=part["width"], heads=max(1, part["width"] // 64))
            for part in (vision, text)
        ]
        patches = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2
    except (KeyError, TypeError, ValueError):
        return None
    weights = sum(_LAYER_SQUARES * tower.layers * tower.width**2 for tower in towers)
    weights += text.get("vocab_size", _VOCABULARY) * towers[1].width
    return Workload(
        image_tokens=patches + 1,
        text_tokens=min(like.text_tokens, int(text.get("context_length", 77))),
        parameters=weights,
        batch_size=like.batch_size,
        image=towers[0],
        text=towers[1],
    )
