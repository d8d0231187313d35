"""open_clip's text tower, a module of its own or spread over the model, for texts of any length.

Enters: tokens [B, L], L the whole context or less. Leaves: embeddings [B, D]. Called by `Clip` for every
text; `trimming` asks here what may be cut. Towers of other libraries embed as open_clip lets them.

Shape suffixes: B batch, L tokens, D embedding, W width of the tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from cliptune.errors import TensorError
from cliptune_model.towers.lean_blocks import PoolingTransformer

_POOLS: Final = ("argmax", "eos")


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


def text_tower(model: nn.Module) -> tuple[TextTower | None, str]:
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


def encode_text(model: nn.Module, tokens_BL: Tensor) -> Tensor:
    """[B, L] int64 → [B, D], not normalised, as open_clip computes it from the same texts at full length.

    Raises:
        TensorError: the texts are shorter than the context, and the text tower reads what was cut off.
    """
    tower, why_not = text_tower(model)
    short = tower is not None and tokens_BL.shape[1] < tower.context_length
    if short and why_not:
        raise TensorError(
            f"texts of {tokens_BL.shape[1]} tokens are shorter than the context: {why_not}",
            shape=tuple(tokens_BL.shape),
        )
    if tower is not None and (short or isinstance(tower.module.transformer, PoolingTransformer)):
        return _encode_causal(tower, tokens_BL)
    return cast(Tensor, model.encode_text(tokens_BL, normalize=False))  # type: ignore[operator]


def _encode_causal(tower: TextTower, tokens_BL: Tensor) -> Tensor:
    """open_clip's `encode_text` with its positions and its mask cut to L."""
    module = tower.module
    length = tokens_BL.shape[1]
    dtype = module.transformer.get_cast_dtype()
    x_BLW = module.token_embedding(tokens_BL).to(dtype)
    positions_LW = module.positional_embedding[:length]
    if not tower.class_token:
        mask_LL = module.attn_mask[:length, :length]
        place_B = _pooled_places(tower, tokens_BL)
        x_BLW = x_BLW + positions_LW.to(dtype)
        if isinstance(module.transformer, PoolingTransformer):
            x_BW = module.transformer(x_BLW, attn_mask=mask_LL, pooled_B=place_B)[:, 0]
        else:
            x_BW = module.transformer(x_BLW, attn_mask=mask_LL)[
                torch.arange(len(place_B), device=place_B.device), place_B
            ]
    else:
        # It follows the text, but keeps its own position, the last.
        class_B1W = module.cls_emb.to(dtype).expand(len(x_BLW), 1, -1)
        positions_LW = torch.cat([positions_LW, module.positional_embedding[-1:]])
        x_BLW = torch.cat([x_BLW, class_B1W], dim=1) + positions_LW.to(dtype)
        padding_XLL = module._build_additive_mask(tokens_BL, length + 1, dtype)  # X: batch × heads
        mask_XLL = module.attn_mask[: length + 1, : length + 1] + padding_XLL
        x_BW = module.transformer(x_BLW, attn_mask=mask_XLL)[:, -1]
    pooled_BW = module.ln_final(x_BW)
    projection = module.text_projection
    if isinstance(projection, nn.Linear):
        return cast(Tensor, projection(pooled_BW))
    return cast(Tensor, pooled_BW if projection is None else pooled_BW @ projection)


def _pooled_places(tower: TextTower, tokens_BL: Tensor) -> Tensor:
    """Where each text ends: the first largest token, or the first end of text."""
    if tower.pool == "argmax":
        return tokens_BL.argmax(dim=-1)
    return (tokens_BL == tower.eos_id).int().argmax(dim=-1)
