"""Put the blocks into a model, whatever library its towers are from, and take them out again.

Enters: any module and an `AttentionPlan`. Leaves: the same module, each attention of which now runs by the
plan. Called through `cliptune_model.attention`.

Every attention module is given a subclass of its own class whose `forward` runs under a `TorchFunctionMode`
that answers `scaled_dot_product_attention` and `multi_head_attention_forward`. This one mechanism covers
open_clip's blocks and poolers, timm's and SigLIP's. The mode is entered where attention is computed; so it
holds in a checkpoint's recomputation on autograd's own threads, holds for this model only, and keeps
nn.MultiheadAttention off its fused inference path, which no mode can look into. A copied or pickled model
keeps its plan; its state dict is unchanged.

E: width of a tower, L: queries, S: keys, B: batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cliptune_model.attention.exact import attention
from cliptune_model.attention.plan import AttentionPlan

_PLAN: Final = "_cliptune_attention_plan"

# Names by which a module's forward gives away that it computes attention.
_NAMES: Final = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})


def install(model: nn.Module, plan: AttentionPlan) -> None:
    """Make every attention of `model` follow `plan` from its next call on, in place of an earlier plan.

    "sdpa" leaves torch's own modules. Attention that a tower writes out by hand (Swin's windows, towers of
    Hugging Face) is not touched.
    """
    if plan.mode == "sdpa":
        uninstall(model)
        return
    for module in _attention_modules(model):
        if not isinstance(module, _Blocked):
            module.__class__ = _blocked(type(module))
        module.__dict__[_PLAN] = plan


def uninstall(model: nn.Module) -> None:
    """Give every attention of `model` back its own class."""
    for module in model.modules():
        if isinstance(module, _Blocked):
            module.__class__ = module.unblocked  # type: ignore[assignment]
            del module.__dict__[_PLAN]


def installed(model: nn.Module) -> AttentionPlan:
    """The plan that `model` follows."""
    for module in model.modules():
        if isinstance(module, _Blocked):
            return cast(AttentionPlan, module.__dict__[_PLAN])
    return AttentionPlan(mode="sdpa")


def _attention_modules(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        forward = getattr(type(module).forward, "__code__", None)
        if isinstance(module, _Blocked) or (forward is not None and _NAMES & set(forward.co_names)):
            yield module


class _Blocked:
    """Marks the subclasses; `unblocked` is the class that the module had."""

    unblocked: type[nn.Module]


_classes: Final[dict[type[nn.Module], type[nn.Module]]] = {}


def _blocked(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _classes:
        _classes[base] = _subclass(base)
    return _classes[base]


def _subclass(base: type[nn.Module]) -> type[nn.Module]:
    class Blocked(_Blocked, base):  # type: ignore[misc, valid-type]
        unblocked = base

        def forward(self, *arguments: Any, **named: Any) -> Any:
            with _Mode(self.__dict__[_PLAN]):
                return super().forward(*arguments, **named)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _empty, (base,), self.__dict__

    Blocked.__name__ = Blocked.__qualname__ = f"Blocked{base.__name__}"
    return Blocked


def _empty(base: type[nn.Module]) -> nn.Module:
    """A module without state, for copies and pickles."""
    kind = _blocked(base)
    return kind.__new__(kind)


class _Mode(TorchFunctionMode):
    """Answers attention by the plan; everything else as ever. Its own calls are not seen by itself."""

    def __init__(self, plan: AttentionPlan) -> None:
        super().__init__()
        self._plan = plan

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        named: dict[str, Any] | None = None,
    ) -> Any:
        named = named or {}
        if function is F.scaled_dot_product_attention:
            return attention(self._plan, *arguments, **named)
        if function is F.multi_head_attention_forward:
            return _multi_head(self._plan, *arguments, **named)
        return function(*arguments, **named)


def _multi_head(
    plan: AttentionPlan,
    query_LBE: Tensor,
    key_SBE: Tensor,
    value_SBE: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch's `multi_head_attention_forward` for what towers ask of it; anything else is its own again."""
    plain = (
        query_LBE.dim() == 3
        and bias_k is None
        and bias_v is None
        and not add_zero_attn
        and static_k is None
        and static_v is None
        and key_padding_mask is None
        and not need_weights
        and not (is_causal and attn_mask is None)
    )
    if not plain:
        return F.multi_head_attention_forward(
            query_LBE,
            key_SBE,
            value_SBE,
            embed_dim,
            num_heads,
            in_proj_weight,
            in_proj_bias,
            bias_k,
            bias_v,
            add_zero_attn,
            dropout_p,
            out_proj_weight,
            out_proj_bias,
            training=training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=use_separate_proj_weight,
            q_proj_weight=q_proj_weight,
            k_proj_weight=k_proj_weight,
            v_proj_weight=v_proj_weight,
            static_k=static_k,
            static_v=static_v,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
    query_BLE, key_BSE, value_BSE = (t.transpose(0, 1) for t in (query_LBE, key_SBE, value_SBE))
    if isinstance(weights, Tensor) and query_LBE is key_SBE and key_SBE is value_SBE:
        # One product for all three; they stay views of its result, which is all that backward needs to keep.
        projected = F.linear(query_BLE, weights, in_proj_bias).chunk(3, dim=-1)
    else:
        three = (
            weights.chunk(3) if isinstance(weights, Tensor) else cast(tuple[Tensor, Tensor, Tensor], weights)
        )
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        projected = tuple(
            F.linear(tokens, weight, bias)
            for tokens, weight, bias in zip((query_BLE, key_BSE, value_BSE), three, biases, strict=True)
        )
    q, k, v = (tokens.view(*tokens.shape[:2], num_heads, -1).transpose(1, 2) for tokens in projected)
    # Here True hides; for scaled_dot_product_attention it shows.
    mask = ~attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
    if mask is not None and mask.dim() == 3:
        mask = mask.view(-1, num_heads if mask.shape[0] > 1 else 1, *mask.shape[1:])
    out_BHLD = attention(plan, q, k, v, mask, dropout_p if training else 0.0)
    out_BLE = F.linear(out_BHLD.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    return out_BLE.transpose(0, 1), None
