"""Classes as averages of their prompts' embeddings.

Enters: classes with prompts. Leaves: one unit vector a class, which images are compared with. Called by the
engine (classify) and by the trainer's evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cliptune.errors import InvalidInputError
from cliptune_model.clip import Clip
from cliptune_model.similarity import normalise


@torch.no_grad()
def class_embeddings(
    clip: Clip, classes: Sequence[tuple[str, Sequence[str]]], batch_size: int = 64
) -> Tensor:
    """Prompt ensembling (Radford et al. 2021, section 3.1.4): normalise each prompt, average, normalise.

    Args:
        clip: whose text tower embeds; its mode (train or eval) is the caller's.
        classes: (label, prompts) of each class.
        batch_size: prompts per forward.

    Returns:
        [C classes, D] fp32 of unit length, on the model's device.

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
            normalise(clip.encode_texts(part_BL.to(clip.device)))
            for part_BL in torch.split(tokens_PL, batch_size)
        ]
    )
    means = [
        part_KD.mean(dim=0)
        for part_KD in torch.split(embeddings_PD, [len(prompts) for _, prompts in classes])
    ]
    return normalise(torch.stack(means))
