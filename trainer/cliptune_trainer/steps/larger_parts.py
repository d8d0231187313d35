"""Where a batch in parts can take larger ones at no more memory, so that the device idles less.

Enters: a model, the length of its texts, the rows of a batch and the micro-batch. Leaves: the rows that each
tower takes at once. Called by accumulation, and by the stepper, which has them compiled.

The micro-batch is what both towers' graphs have room for. A pass without a graph keeps one layer at a time of
many, and texts that are replayed have the room of the images to themselves. Small parts are what makes
accumulation dear: a device gets its work from the host kernel by kernel, as slowly for a small one as for a
large one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from torch import nn

from cliptune_model.acceleration.compiled import Pass
from cliptune_model.attention import image_tokens
from cliptune_model.clip import Clip
from cliptune_model.machine.workload import tower_of
from cliptune_trainer.steps.batch_norm import has_batch_norm
from cliptune_trainer.steps.checkpointing import is_checkpointed, repeated_blocks
from cliptune_trainer.steps.parts import parts_of

# Without a graph a transformer holds a few layers' tensors, with one those of all its layers: of 12, and of
# the shallowest in use, 6, less than a quarter.
_WITHOUT_GRAPH: Final = 4
_SHALLOWEST: Final = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Larger:
    """Times the micro-batch that fit in the memory of its graphs.

    Attributes:
        images, texts: without a graph.
        replayed_texts: with one, while no image has one.
    """

    images: int = 1
    texts: int = 1
    replayed_texts: int = 1

    @classmethod
    def of(cls, clip: Clip, text_tokens: int) -> Self:
        """Of this model as it is trained now; 1 wherever a tower keeps too little to compare with.

        `text_tokens`: of the batch.
        """
        if has_batch_norm(clip.model):
            return cls()  # it looks at all that passes at once
        visual = clip.model.get_submodule("visual")
        image_blocks = list(repeated_blocks(visual))
        text_blocks = [block for block in repeated_blocks(clip.model) if block not in image_blocks]
        keeps_images, keeps_texts = _keeps_all(image_blocks), _keeps_all(text_blocks)
        return cls(
            images=_WITHOUT_GRAPH if keeps_images else 1,
            texts=_WITHOUT_GRAPH if keeps_images or keeps_texts else 1,
            replayed_texts=_texts_in_place_of_an_image(clip, text_tokens) if keeps_images else 1,
        )


def joined(parts: Sequence[slice], times: int) -> list[slice]:
    """The rows of adjacent parts in parts that are `times` as long, or nearly."""
    if times == 1 or len(parts) < 2:
        return list(parts)
    start, stop = parts[0].start, parts[-1].stop
    longest = times * max(part.stop - part.start for part in parts)
    return [slice(start + one.start, start + one.stop) for one in parts_of(stop - start, longest)]


def passes_of(clip: Clip, batch_size: int, micro_batch_size: int, text_tokens: int) -> set[Pass]:
    """How the rows of a batch go through the towers where nothing is drawn at random, at the clip's size."""
    parts = parts_of(batch_size, micro_batch_size)
    early, last = parts[:-1], parts[-1]
    larger = Larger.of(clip, text_tokens) if early else Larger()
    return {
        Pass(
            tokens=tokens,
            rows=rows.stop - rows.start,
            with_graph=with_graph,
            size=(0, 0) if tokens else clip.image_size,
        )
        for tokens, without_graph, replayed in (
            (0, larger.images, 1),
            (text_tokens, larger.texts, larger.replayed_texts),
        )
        for with_graph, some in (
            (True, [*joined(early, replayed), last]),
            (False, [*early[:1], *joined(early[1:], without_graph)]),
        )
        for rows in some
    }


def _keeps_all(blocks: Sequence[nn.Module]) -> bool:
    """Whether the tower's graph keeps the activations of all its layers: the first one is trained, and none
    is computed again."""
    if len(blocks) < _SHALLOWEST or any(is_checkpointed(block) for block in blocks):
        return False
    return any(weight.requires_grad for weight in blocks[0].parameters())


def _texts_in_place_of_an_image(clip: Clip, text_tokens: int) -> int:
    """By numbers that a layer holds, and by layers; 1 for towers whose shape is not known."""
    image, text = (tower_of(clip.model_config.get(key, {})) for key in ("vision_cfg", "text_cfg"))
    if not (image.layers and text.layers and text_tokens):
        return 1
    wide = image_tokens(clip) * image.width / (text_tokens * text.width)
    return 1 + int(wide * min(1.0, image.layers / text.layers))
