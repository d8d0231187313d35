"""How deep each weight lies in its tower: for learning rates by layer, and for what is probed first.

Enters: a model. Leaves: shares of the learning rate by name; the names of the towers' last projections.
Called by the optimizer and by the stepper.
"""

from __future__ import annotations

from typing import Final

from torch import nn

from cliptune.errors import SpecError
from cliptune_trainer.steps.checkpointing import repeated_blocks

_PROJECTIONS: Final = frozenset({"proj", "text_projection", "head", "attnpool", "attn_pool"})
# What follows the last block beside them, in open_clip and timm.
_LAST: Final = _PROJECTIONS | {"ln_post", "ln_final", "norm", "fc_norm", "conv_head", "bn2"}
_IMAGE: Final = "visual."


def layer_shares(model: nn.Module, decay: float) -> dict[str, float]:
    """By what each parameter's learning rate is multiplied (Bao et al. 2022, BEiT).

    Of a tower of n blocks: 1 for what follows them, `decay` ** (n - i) for block i of 0 to n - 1, and
    `decay` ** (n + 1) for embeddings.
    """
    depths = _depths(model)
    shares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        found = depths.get(id(parameter))
        if found is not None:
            place, count = found
            shares[name] = decay ** (count - place)
        elif _LAST & set(name.split(".")) or name.startswith("logit_"):
            shares[name] = 1.0
        else:
            shares[name] = decay ** (_block_count(model, name) + 1)
    return shares


def projections(model: nn.Module) -> set[str]:
    """Names of the trained weights that a linear probe trains: the last projections of both towers.

    Raises:
        SpecError: a tower that is trained has none.
    """
    depths = _depths(model)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    found = {
        name for name, one in trained.items() if id(one) not in depths and _PROJECTIONS & set(name.split("."))
    }
    for tower, image in (("image", True), ("text", False)):
        its = {name for name in trained if name.startswith(_IMAGE) is image and not name.startswith("logit_")}
        if its and not its & found:
            raise SpecError(
                f"train.probe_fraction: the {tower} tower has no projection to train first; allowed: 0",
                path="train.probe_fraction",
                allowed="0",
            )
    return found


def _depths(model: nn.Module) -> dict[int, tuple[int, int]]:
    """Of each parameter of a block, by its id: the block's place in its tower, and how many there are."""
    visual = model.get_submodule("visual")
    image = list(repeated_blocks(visual))
    seen = {id(block) for block in image}
    text = [block for block in repeated_blocks(model) if id(block) not in seen]
    return {
        id(parameter): (place, len(blocks))
        for blocks in (image, text)
        for place, block in enumerate(blocks)
        for parameter in block.parameters()
    }


def _block_count(model: nn.Module, name: str) -> int:
    image = len(list(repeated_blocks(model.get_submodule("visual"))))
    return image if name.startswith(_IMAGE) else len(list(repeated_blocks(model))) - image
