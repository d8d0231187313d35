"""Towers for inference whose weights are frozen: kept in the form that the device's kernels read.

Enters: a `Clip` that serves. Leaves: another that shares its weights and computes the same, and the choice
with its reason; or the same `Clip`. Called by the engine beside its requests, once a model serves, and by
benchmarks. Never for training: frozen products have no gradients.

    fp32 on a CPU       MKL's packed matrices: the product without the packing that each call begins with, and
                        QuickGELU in one pass. No compiler, no wait, and never slower than torch.compile with
                        frozen weights where both were measured (ViT-B/32, batches of 8 and 32)
    lower precisions    weights cast once; autocast casts those that do not learn in every call

The result is proved on the model's own shapes before it is used: images alone and together, texts of a
few tokens and of the whole context.

Shape suffixes: B batch, C channels, H height, W width, L tokens, D embedding, I inputs and O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, cast

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from cliptune_model.acceleration.frozen_blocks import (
    QUICK_GELU_SCALE,
    CastProduct,
    Freeze,
    FrozenAttention,
    FrozenLinear,
    FrozenPatches,
    PackedProduct,
    ScaledQuickGelu,
)
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_model.towers.lean_blocks import LeanAttention, PatchProjection, PooledBlock

TOLERANCE: Final = 1e-5  # of a vector's length
# Rows of a product that are tried for each size of weight: one token, odd numbers, whole batches.
_TRIED_ROWS: Final = (1, 3, 17, 50, 197, 1000)
_KEPT_FREE: Final = 2  # so many times the room that the frozen weights take


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """What became of a model.

    Attributes:
        clip: to serve.
        choice: "packed", a precision ("bf16", "fp16") or "off", and why.
        bytes: that the frozen weights take beside the others.
    """

    clip: Clip
    choice: Choice
    bytes: int = 0


class _StoppedError(Exception):
    """Nobody wants it any more."""


@torch.inference_mode()
def freeze(
    clip: Clip,
    *,
    dtype: torch.dtype | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    room_bytes: int = 2**62,
    stopped: Callable[[], bool] = lambda: False,
) -> Frozen:
    """`clip` with frozen weights, where that is exact and there is room.

    Args:
        clip: in evaluation mode; left as it is.
        dtype: of its products; None: fp32.
        autocast: around its forwards.
        room_bytes: of memory on its device.
        stopped: asked between two weights; True ends the work.
    """
    if why_not := _unsuited(clip, dtype):
        return _off(clip, why_not)
    sites = list(_sites(clip.model))
    needed_bytes = sum(
        weight.numel() * (4 if dtype is None else dtype.itemsize) for site in sites for weight in site.weights
    )
    if not sites:
        return _off(clip, "no product of the towers is a plain one")
    if _KEPT_FREE * needed_bytes > room_bytes:
        return _off(clip, f"it takes {needed_bytes / 2**20:.0f} MiB more, of {room_bytes / 2**20:.0f} free")
    make: Freeze = PackedProduct if dtype is None else partial(CastProduct, dtype=dtype)
    try:
        if dtype is None:
            _try_products(sites, stopped)
        frozen = replace(clip, model=_shared_modules(clip.model))
        _put_in(frozen.model, make, scaled=dtype is None, stopped=stopped)
        apart = _apart(clip, frozen, autocast, stopped)
    except _StoppedError:
        return _off(clip, "the model was unloaded meanwhile")
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        return _off(clip, f"this torch lacks the kernels ({type(error).__name__}: {str(error)[:200]})")
    if not apart <= TOLERANCE:  # NaN too
        return _off(clip, f"a frozen tower's vector is {apart:.1e} of its length away")
    value = "packed" if dtype is None else str(dtype).removeprefix("torch.").replace("bfloat", "bf")
    how = "packed once for MKL" if dtype is None else "cast once"
    told = f"{needed_bytes / 2**20:.0f} MiB of weights {how}; at most {apart:.0e} of a vector's length apart"
    return Frozen(clip=frozen, choice=_choice(value.replace("float", "fp"), told), bytes=needed_bytes)


def _unsuited(clip: Clip, dtype: torch.dtype | None) -> str:
    if clip.device.type == "mps":
        return "not proved on Apple's GPU"
    if clip.adapter is not None:
        return "an adapter's products are not those of its base's weights alone"
    if dtype is None and clip.device.type != "cpu":
        return "fp32 off the CPU has nothing to pack"
    if dtype is None and not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return "this torch computes without MKL"
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Site:
    """A module whose product is frozen, and the weights that go into it."""

    module: nn.Module
    weights: tuple[Tensor, ...]


def _sites(model: nn.Module) -> Iterator[_Site]:
    """Modules of exactly the classes that freezing is written for, in fp32."""
    for module in model.modules():
        kind = type(module)
        if kind not in (nn.Linear, LeanAttention, PatchProjection):
            continue
        weights: tuple[Any, ...] = (module.weight,) if kind is not LeanAttention else ()
        if isinstance(module, LeanAttention):
            weights = (cast(Tensor, module.in_proj_weight), module.out_proj.weight)
        if all(weight.dtype == torch.float32 for weight in weights):
            yield _Site(module=module, weights=weights)


def _try_products(sites: list[_Site], stopped: Callable[[], bool]) -> None:
    """Every size of weight with every kind of rows. Raises `RuntimeError` where the kernel is wrong."""
    generator = torch.Generator().manual_seed(0)
    for width, wide in {(weight[0].numel(), len(weight)) for site in sites for weight in site.weights}:
        _go_on(stopped)
        weight_OI = torch.randn(wide, width, generator=generator) / width**0.5
        product = PackedProduct(weight_OI, None)
        for rows in _TRIED_ROWS:
            x = torch.randn(rows, width, generator=generator)
            wanted, found = F.linear(x, weight_OI), product(x)
            if not float((found - wanted).norm() / wanted.norm()) <= TOLERANCE:
                raise RuntimeError(f"a packed product of {rows} rows with [{wide}, {width}] is wrong")


def _shared_modules(model: nn.Module) -> nn.Module:
    """Other modules, the same tensors, whether they are parameters, buffers or neither."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        memo |= {id(value): value for value in vars(module).values() if isinstance(value, Tensor)}
    return copy.deepcopy(model, memo)


def _put_in(model: nn.Module, make: Freeze, *, scaled: bool, stopped: Callable[[], bool]) -> None:
    scale_of = _scaled(model) if scaled else {}
    pooled = {block.attn for block in model.modules() if isinstance(block, PooledBlock)}
    for site in list(_sites(model)):
        _go_on(stopped)
        module: Any = site.module
        if isinstance(module, LeanAttention):
            _put_in_attention(module, make, pooled=module in pooled)
            continue
        weight_OI = module.weight.flatten(1)
        before, after = scale_of.get(module, (1.0, 1.0))
        bias = module.bias if before == 1.0 or module.bias is None else module.bias * before
        scale = before * after
        module.product = make(weight_OI if scale == 1.0 else weight_OI * scale, bias)
        module.__class__ = FrozenPatches if isinstance(module, PatchProjection) else FrozenLinear


def _put_in_attention(module: Any, make: Freeze, *, pooled: bool) -> None:
    weight, bias, width = module.in_proj_weight, module.in_proj_bias, module.embed_dim
    apart = ((0, 1), (1, 3)) if pooled else ((0, 3),)  # as the block asks for them
    module.parts = {
        (first, last): make(
            weight[first * width : last * width],
            None if bias is None else bias[first * width : last * width],
        )
        for first, last in apart
    }
    module.product = make(module.out_proj.weight, module.out_proj.bias)
    module.__class__ = FrozenAttention


def _scaled(model: nn.Module) -> dict[nn.Module, tuple[float, float]]:
    """QuickGELU between two plain products of open_clip's block becomes SiLU, and its scale goes into their
    weights: of each product (what its result, what its input is multiplied by)."""
    found: dict[nn.Module, tuple[float, float]] = {}
    for block in model.modules():
        if not isinstance(block, ResidualAttentionBlock):
            continue
        parts = list(block.mlp.children())
        if [type(part) for part in parts] == [nn.Linear, QuickGELU, nn.Linear]:
            found[parts[0]] = (QUICK_GELU_SCALE, 1.0)
            found[parts[2]] = (1.0, 1.0 / QUICK_GELU_SCALE)
            parts[1].__class__ = ScaledQuickGelu
    return found


def _apart(
    clip: Clip,
    frozen: Clip,
    autocast: Callable[[], AbstractContextManager[object]],
    stopped: Callable[[], bool],
) -> float:
    """The largest distance of two vectors of the same item, against their length."""
    generator = torch.Generator().manual_seed(1)
    images_BCHW = torch.randn(3, 3, *clip.image_size, generator=generator).to(clip.device)
    texts = ["a photo", "a red car parked by the sea at night, seen from the window of a train"]
    inputs: list[tuple[str, Tensor]] = [
        ("image", images_BCHW[:1]),
        ("image", images_BCHW),
        ("text", clip.tokenize_trimmed(texts[:1]).to(clip.device)),
        ("text", clip.tokenize(texts).to(clip.device)),
    ]
    worst: list[float] = []
    for kind, given in inputs:
        vectors = []
        for side in (clip, frozen):
            _go_on(stopped)
            with autocast():
                vectors.append(
                    (side.encode_images(given) if kind == "image" else side.encode_texts(given)).float()
                )
        wanted_BD, found_BD = vectors
        worst.append(float(((found_BD - wanted_BD).norm(dim=-1) / wanted_BD.norm(dim=-1)).max()))
    # NaN compares with nothing, and must not be lost.
    return next((one for one in worst if one != one), max(worst))


def _go_on(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise _StoppedError


def _choice(value: str, reason: str) -> Choice:
    return Choice(subject="frozen_towers", value=value, reason=reason)


def _off(clip: Clip, reason: str) -> Frozen:
    return Frozen(clip=clip, choice=_choice("off", reason))
