"""Makes device "mps" known to torch. Import this before anything that imports torch.

Enters: the library, named by the environment. Leaves: a torch that takes "mps" for its accelerator, for fake
tensors. Called by the programs that `run_on_fake_mps` starts.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

from tests.support.fake_mps.library import ENVIRONMENT

if "torch" in sys.modules:
    raise RuntimeError("torch asks for its devices while it is imported: import this module before it")
ctypes.CDLL(os.environ[ENVIRONMENT], mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import unset_fake_temporarily  # noqa: E402

torch._C._has_mps = True  # type: ignore[misc]
torch.mps.device_count = lambda: 1

_library = torch.library.Library("aten", "IMPL")


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch chooses on MPS: with gradients or dropout the operator taken apart, otherwise one kernel."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    trained = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    aten = torch.ops.aten
    apart = trained or dropout_p > 0
    kernel = aten._scaled_dot_product_attention_math
    if not apart:
        kernel = aten._scaled_dot_product_attention_math_for_mps
    return kernel(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


_library.impl("scaled_dot_product_attention", _attention, "AutogradMPS")

# A module that moves to the device gets new parameters: a fake tensor cannot change its device in place.
torch.__future__.set_overwrite_module_params_on_conversion(True)

_swap = torch.utils.swap_tensors


def _swap_fake(one: Tensor, other: Tensor) -> None:
    """The fake mode holds weak references to all its tensors, which torch takes for views of theirs."""
    references = weakref.getweakrefs
    weakref.getweakrefs = lambda _: []  # type: ignore[assignment]
    try:
        _swap(one, other)
    finally:
        weakref.getweakrefs = references


torch.utils.swap_tensors = _swap_fake


def _really(function: Callable[..., Any]) -> Callable[..., Any]:
    """States of generators are real tensors, also while all others are fake."""

    def call(*arguments: Any, **named: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments, **named)

    return call


for _module in (torch, torch.random, torch.mps):
    for _name in ("get_rng_state", "set_rng_state"):
        setattr(_module, _name, _really(getattr(_module, _name)))
