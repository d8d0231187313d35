"""Classes as averages of their prompts' embeddings.

Enters: classes with prompts. Leaves: one text's features a class, which images are compared with by the
model's similarity. Called by the trainer's evaluation; the engine does the same with vectors that it has
kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cliptune.errors import InvalidInputError
from cliptune_model.clip import Clip


@torch.no_grad()
def class_embeddings(
    clip: Clip, classes: Sequence[tuple[str, Sequence[str]]], batch_size: int = 64
) -> Tensor:
    """Prompt ensembling as the model's similarity does it: `Similarity.ensemble`.

    Args:
        clip: whose text tower embeds; its mode (train or eval) is the caller's.
        classes: (label, prompts) of each class.
        batch_size: prompts per forward.

    Returns:
        [C classes, D] fp32 text features, on the model's device; of unit length where only directions count.

    Raises:
        InvalidInputError: no class, or a class without a prompt.
        TextError: a prompt is empty or too long.
    """
    if not classes:
        raise InvalidInputError("zero-shot classification needs at least one class")
    for label, prompts in classes:
        if not prompts:
            raise InvalidInputError(f"class {label!r} has no prompts")
    prompts_flat = [prompt for _, prompts in classes for prompt in prompts]
    tokens_PL = clip.tokenize_trimmed(prompts_flat)
    embeddings_PD = torch.cat(
        [
            clip.similarity.kept(clip.encode_texts(part_BL.to(clip.device)))
            for part_BL in torch.split(tokens_PL, batch_size)
        ]
    )
    parts = torch.split(embeddings_PD, [len(prompts) for _, prompts in classes])
    return torch.stack([clip.similarity.ensemble(part_KD) for part_KD in parts])
