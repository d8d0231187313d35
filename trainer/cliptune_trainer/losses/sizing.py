"""Whether an objective takes its tables whole or in tiles, and the bytes that it takes.

Enters: what to minimise, N and D, the device and the bytes that the loss may take. Leaves: a `Choice`, bytes.
Called by the batch plan. `choice` decides for one loss; here all terms over all widths come together.
N: pairs in the batch, D: embedding dimension.
"""

from __future__ import annotations

from typing import Final

import torch

from cliptune.errors import SpecError
from cliptune_model.choice import Choice
from cliptune_model.similarity import Similarity
from cliptune_trainer.losses.choice import LONG_SUM, WHOLE, choose_tiling, loss_bytes
from cliptune_trainer.losses.config import LossConfig
from cliptune_trainer.losses.entry import NEGATIVE_CAPTIONS, TEACHER

_FP32_BYTES: Final = 4
# fp32 numbers a pair of a table between a similarity and its products, where they differ.
_TRANSFORMED: Final = 4


def choose_objective_tiling(
    config: LossConfig,
    similarity: Similarity,
    n: int,
    dim: int,
    device: str,
    budget_bytes: int | None = None,
) -> Choice:
    """As `choose_tiling`, for all terms at once.

    Raises:
        SpecError: tiles are asked for, or needed, where a term or the similarity must have whole tables.
    """
    obstacle = _obstacle(config, similarity)
    if obstacle is None:
        budget = None if budget_bytes is None else budget_bytes // _tables_at_once(config)
        largest = max(config.terms, key=lambda term: term.entry(config.temperature).tables)
        return choose_tiling(largest.name, config.tiling, n, dim, device, budget)
    allowed = "auto, off"
    if config.tiling == "on":
        raise SpecError(
            f"loss.tiling is 'on', but {obstacle} must have all logits at once; allowed: {allowed}",
            path="loss.tiling",
            allowed=allowed,
        )
    if torch.device(device).type == "mps" and n >= LONG_SUM:
        allowed = f"less than {LONG_SUM}, or a loss and a similarity that can be taken in tiles"
        raise SpecError(
            f"train.batch_size is {n}, {obstacle} must have all logits at once, and Apple's M1 and M2 sum"
            f" wrongly over so many; allowed: {allowed}",
            path="train.batch_size",
            allowed=allowed,
        )
    size = objective_bytes(config, similarity, n, dim, Choice(subject="", value=WHOLE, reason=""))
    reason = f"{obstacle} must have all logits at once: about {max(1, size >> 20)} MiB"
    return Choice(subject="loss tiling", value=WHOLE, reason=reason)


def objective_bytes(config: LossConfig, similarity: Similarity, n: int, dim: int, tiling: Choice) -> int:
    """Bytes that the objective takes at its peak, the features themselves not counted."""
    widths, terms = 1 + len(config.matryoshka_dims), config.terms
    vectors = _FP32_BYTES * n * dim * sum(need in config.needs for need in (NEGATIVE_CAPTIONS, TEACHER)) * 4
    if tiling.value != WHOLE:
        # Tiles pass; what each term keeps for its backward pass does not.
        each = [loss_bytes(term.name, n, dim, tiling) for term in terms]
        kept = _FP32_BYTES * 2 * dim * n * (_tables_at_once(config) - 1)
        return max(each) + kept + vectors
    tables = config.tables + (0 if similarity.linear else _TRANSFORMED * _tables_at_once(config))
    return (tables * n + widths * len(terms) * (4 * dim + 16)) * n * _FP32_BYTES + vectors


def _tables_at_once(config: LossConfig) -> int:
    return (1 + len(config.matryoshka_dims)) * len(config.terms)


def _obstacle(config: LossConfig, similarity: Similarity) -> str | None:
    if config.whole_only is not None:
        return f"{config.whole_only!r}"
    return None if similarity.linear else f"the similarity {similarity.name!r}"
