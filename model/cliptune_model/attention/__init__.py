"""Attention that never holds the whole score matrix, in forward or backward, for every tower of a CLIP.

Enters: a model and an `AttentionPlan`. Leaves: the same model, whose attention computes the same result in
blocks of a bounded size. Called by the trainer before the first step and whenever its memory plan changes,
and by the engine. Two models of one process may have different plans, or none.
"""

from cliptune_model.attention.hook import install, installed, uninstall
from cliptune_model.attention.plan import MODES, AttentionPlan, BlockShape, block_shape
from cliptune_model.attention.tokens import image_tokens

__all__ = [
    "MODES",
    "AttentionPlan",
    "BlockShape",
    "block_shape",
    "image_tokens",
    "install",
    "installed",
    "uninstall",
]
