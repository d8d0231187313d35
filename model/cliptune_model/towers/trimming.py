"""Texts without their padding: a causal text tower never reads past the token it pools at.

Enters: tokens padded to the context length. Leaves: the same rows, cut to one of a few lengths, which
`text_tower.encode_text` embeds as the whole rows. `Clip` trims through here, for training, evaluation,
zero-shot and serving. Exact, not an approximation: a causal mask hides every later token from the pooled
one, so neither an embedding nor a gradient depends on what is cut off.

Few lengths, because every length is a compiled graph on CUDA and a cached graph on MPS.

Shape suffixes: B batch, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from cliptune_model.choice import Choice
from cliptune_model.towers.text_tower import text_tower

# Lengths that texts are cut to, below the context's own. A third between neighbours bounds the waste.
LENGTHS: Final = (16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTrim:
    """How the texts of one model are cut. Call it with tokens.

    Attributes:
        choice: what was decided, and why.
        lengths: what rows are cut to, ascending; the last is the context length. One alone: nothing is cut.
        eos_id: the token that is pooled at; None: the one with the largest number (open_clip's end of text).
        spare: tokens that must stay behind the end of the text (CoCa's class token looks at one).
    """

    choice: Choice
    lengths: tuple[int, ...]
    eos_id: int | None = None
    spare: int = 0

    @classmethod
    def of(cls, model: nn.Module, context_length: int) -> TextTrim:
        """As the text tower of open_clip's `model` allows."""
        tower, why_not = text_tower(model)
        if tower is None or why_not:
            choice = Choice(subject="text_trimming", value="off", reason=why_not)
            return cls(choice=choice, lengths=(context_length,))
        lengths = (*(length for length in LENGTHS if length < tower.context_length), tower.context_length)
        return cls(
            choice=Choice(
                subject="text_trimming",
                value=", ".join(map(str, lengths)),
                reason="the text tower is causal: what follows the end of the text is never read",
            ),
            lengths=lengths,
            eos_id=tower.eos_id if tower.pool == "eos" else None,
            spare=int(tower.class_token),
        )

    def __call__(self, tokens_BL: Tensor) -> Tensor:
        """[B, L] int64 → [B, L'], L' the least of `lengths` that holds every text of the batch.

        Tokens that are on an accelerator stay as they are: to look at them would make the host wait.
        """
        context = tokens_BL.shape[1]
        if len(self.lengths) < 2 or tokens_BL.device.type != "cpu" or not len(tokens_BL):
            return tokens_BL
        marked_BL = tokens_BL if self.eos_id is None else tokens_BL.eq(self.eos_id).int()
        needed = int(marked_BL.argmax(dim=1).max()) + 1 + self.spare
        length = next((length for length in self.lengths if length >= needed), context)
        return tokens_BL if length >= context else tokens_BL[:, :length].contiguous()


def choose_trimming(model: nn.Module, context_length: int) -> Choice:
    """Whether the texts of this model are cut, to which lengths, and why."""
    return TextTrim.of(model, context_length).choice
