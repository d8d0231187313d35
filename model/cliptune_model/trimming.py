"""Texts without their padding: a causal text tower never reads past the token it pools at.

Enters: tokens padded to the context length. Leaves: the same rows cut to one of a few lengths, and the
embeddings that the whole rows would have given. `Clip` trims and encodes through here, for training,
evaluation, zero-shot and serving. Exact, not an approximation: a causal mask hides every later token from the
pooled one, so neither an embedding nor a gradient depends on what is cut off.

Few lengths, because every length is a compiled graph on CUDA and a cached graph on MPS.

Shape suffixes: B batch, L tokens, D embedding, W width of the tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

from cliptune.errors import TensorError
from cliptune_model.device import Choice

if TYPE_CHECKING:
    from cliptune_model.clip import Clip

# Lengths that texts are cut to, below the context's own. A third between neighbours bounds the waste.
LENGTHS: Final = (16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224)
_POOLS: Final = ("argmax", "eos")


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
    def of(cls, clip: Clip) -> TextTrim:
        """As the text tower of `clip` allows."""
        tower, why_not = _text_tower(clip.model)
        if tower is None or why_not:
            choice = Choice(subject="text_trimming", value="off", reason=why_not)
            return cls(choice=choice, lengths=(clip.context_length,))
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


def choose_trimming(clip: Clip) -> Choice:
    """Whether the texts of this model are cut, to which lengths, and why."""
    return TextTrim.of(clip).choice


def encode_text(model: nn.Module, tokens_BL: Tensor) -> Tensor:
    """[B, L] int64 → [B, D], not normalised, as open_clip computes it from the same texts at full length.

    Raises:
        TensorError: the texts are shorter than the context, and the text tower reads what was cut off.
    """
    tower, why_not = _text_tower(model)
    if tower is not None and tokens_BL.shape[1] < tower.context_length:
        if why_not:
            raise TensorError(
                f"texts of {tokens_BL.shape[1]} tokens, not {tower.context_length}: {why_not}",
                shape=tuple(tokens_BL.shape),
            )
        return encode_causal(tower, tokens_BL)
    return cast(Tensor, model.encode_text(tokens_BL, normalize=False))  # type: ignore[operator]


def encode_causal(tower: TextTower, tokens_BL: Tensor) -> Tensor:
    """[B, L] → [B, D]: open_clip's `encode_text` with its positions and its mask cut to L."""
    module = tower.module
    length = tokens_BL.shape[1]
    dtype = module.transformer.get_cast_dtype()
    x_BLW = module.token_embedding(tokens_BL).to(dtype)
    positions_LW = module.positional_embedding[:length]
    mask_LL = module.attn_mask
    if tower.class_token:
        # It follows the text but keeps its own position, the last.
        class_B1W = module.cls_emb.to(dtype).expand(len(x_BLW), 1, -1)
        x_BLW = torch.cat([x_BLW, class_B1W], dim=1)
        positions_LW = torch.cat([positions_LW, module.positional_embedding[-1:]])
        length += 1
        padding_XLL = module._build_additive_mask(tokens_BL, length, x_BLW.dtype)  # X: batch × heads
        mask_LL = mask_LL[:length, :length].unsqueeze(0) + padding_XLL
    else:
        mask_LL = mask_LL[:length, :length]
    x_BLW = module.transformer(x_BLW + positions_LW.to(dtype), attn_mask=mask_LL)
    if tower.class_token:
        pooled_BW = module.ln_final(x_BLW[:, -1])
    else:
        x_BLW = module.ln_final(x_BLW)
        pooled_BW = text_global_pool(x_BLW, tokens_BL, tower.pool, eos_token_id=tower.eos_id)
    projection = module.text_projection
    if projection is None:
        return cast(Tensor, pooled_BW)
    linear = isinstance(projection, nn.Linear)
    return cast(Tensor, projection(pooled_BW) if linear else pooled_BW @ projection)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTower:
    """open_clip's own text transformer: a module of its own, or spread over the model itself (its `CLIP`).

    Attributes:
        module: what holds the embeddings, the transformer, the last norm and the projection.
        pool: open_clip's name of how a text becomes one vector.
        eos_id: the end of the text for the pool "eos".
        class_token: CoCa's, appended behind the padding; it, not the end of the text, is pooled.
    """

    module: Any
    pool: str
    eos_id: int
    class_token: bool

    @property
    def context_length(self) -> int:
        """Tokens that it has positions for, without the class token's."""
        return len(self.module.positional_embedding) - int(self.class_token)


def _text_tower(model: nn.Module) -> tuple[TextTower | None, str]:
    """The text tower if it is open_clip's own, and why its texts cannot be cut; "": they can."""
    kind = type(model)
    if kind is CLIP:
        spread: Any = model
        tower = TextTower(
            module=spread, pool=spread.text_pool_type, eos_id=spread.text_eos_id, class_token=False
        )
    elif kind in (CustomTextCLIP, CoCa) and type(model.text) is TextTransformer:
        text: Any = model.text
        tower = TextTower(
            module=text, pool=text.pool_type, eos_id=text.eos_id, class_token=text.cls_emb is not None
        )
    else:
        inner = type(getattr(model, "text", model)).__name__
        return None, f"{inner} is not known to ignore what follows the text"
    if tower.module.attn_mask is None:
        return tower, "the text tower reads every token, padding too: it has no causal mask"
    if not tower.class_token and tower.pool not in _POOLS:
        return tower, f"the text tower pools {tower.pool!r}, not at the end of the text"
    return tower, ""
