"""The blocks' weights in half precision once a step, for all the parts that a batch goes through in.

Enters: a model and the format that autocast computes in. Leaves: the same gradients with less work for the
host. Called by accumulation where a batch has several parts; the stepper compiles with the same stand-ins.

Autocast casts a block's fp32 weights in every pass, and in every backward pass casts each weight's gradient
back and adds it to the sum: four small kernels a weight and part, and a small part waits for the host that
launches them, not for the GPU. Here copies in half precision stand in for the weights while the parts pass:
cast once, many in one kernel. Their gradients are cast to fp32 and added many at a time too, as blocks finish
their backward pass, so that few of them wait in memory. Each weight's sum is the one that autocast comes to,
bit by bit: the same casts, and the same additions in fp32 in the same order.

What autocast leaves in fp32 stays so: norms, scales, embeddings. Only open_clip's own blocks take stand-ins;
which of their weights autocast casts is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final, NamedTuple, Self, cast

import torch
from open_clip.transformer import (
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    ResidualAttentionBlock,
    Transformer,
)
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_model.towers.lean_blocks import LeanAttention, PooledBlock, PoolingTransformer
from cliptune_trainer.steps.precision import Precision

# Exactly these classes: whatever derives from them (adapters do) may read its weights otherwise.
_BLOCKS: Final = (ResidualAttentionBlock, PooledBlock)
_TRANSFORMERS: Final = (Transformer, PoolingTransformer)
_CAST: Final = (nn.Linear, NonDynamicallyQuantizableLinear, nn.MultiheadAttention, LeanAttention)
_LEFT: Final = (LayerNorm, LayerNormFp32, nn.LayerNorm, LayerScale)
# Gradients in half precision that may wait until they are added; their sum in fp32 takes twice that beside.
_WAITING_BYTES: Final = 32 << 20
_SUBJECT: Final = "half_weights"


def choose_half_weights(clip: Clip, precision: str, device_type: str) -> Choice:
    """Whether a step in parts casts the blocks' weights itself, "on" or "off", and why.

    Args:
        clip: the model, its towers lean already if they are to be.
        precision: of the towers: "fp32", "bf16" or "fp16".
        device_type: of the run, which preparation is not always on.
    """
    if precision == "fp32":
        return Choice(subject=_SUBJECT, value="off", reason="fp32 casts no weights")
    if device_type == "mps":
        reason = "proved on CPU and CUDA alone; on Apple's GPU autocast casts the weights itself"
        return Choice(subject=_SUBJECT, value="off", reason=reason)
    if not any(_blocks(clip.model)):
        return Choice(
            subject=_SUBJECT, value="off", reason="no tower is a stack of plain blocks of open_clip's"
        )
    return Choice(
        subject=_SUBJECT,
        value="on",
        reason="a step in parts casts weights once, not in every part; the gradients are the same",
    )


class _Place(NamedTuple):
    """Where a module keeps a weight."""

    module: nn.Module
    name: str
    cast: bool  # by autocast


class _Pair(NamedTuple):
    """A weight and what stands in for it: a copy in half precision, or the same memory."""

    weight: Tensor
    stand_in: Tensor


class HalfWeights:
    """The stand-ins of one model, which exist inside `standing_in` alone.

    Args:
        clip: the model, with fp32 weights; its blocks may be lean, checkpointed and compiled.
        half: the format that autocast computes in.
    """

    def __init__(self, clip: Clip, half: torch.dtype) -> None:
        self._half = half
        self._blocks = list(_blocks(clip.model))
        self._transformers: list[Any] = [one for one in clip.model.modules() if type(one) in _TRANSFORMERS]
        self._pairs: list[list[_Pair]] = []  # of each block
        self._finished: list[list[_Pair]] = []  # blocks whose gradients wait
        self._waiting_bytes = 0

    @classmethod
    def of(cls, clip: Clip, precision: Precision, choice: Choice) -> Self | None:
        """None where `choice` is "off"."""
        if choice.value != "on" or precision.half is None:
            return None
        return cls(clip, precision.half)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Inside, the blocks compute with the stand-ins; afterwards with their weights again, which must not
        change meanwhile. `collect` follows each backward pass. Never waits for the device."""
        with ExitStack() as stack:
            self._stand_in(stack)
            yield

    def collect(self) -> None:
        """Adds the gradients of a backward pass to the weights' own; it is over."""
        self._add_up(self._pairs)
        self._finished, self._waiting_bytes = [], 0

    def _stand_in(self, stack: ExitStack) -> None:
        """Puts them in place; `stack` takes them out again."""
        stack.callback(self._forget)
        for transformer in self._transformers:
            # A text's embeddings take the format that it tells: that of the weights, as it ever was.
            transformer.get_cast_dtype = partial(_same, transformer.get_cast_dtype())
            stack.callback(delattr, transformer, "get_cast_dtype")
        halves = []
        for places in self._blocks:
            pairs = []
            for module, name, is_cast in places:
                weight = cast(nn.Parameter, module._parameters[name])
                value = torch.empty_like(weight, dtype=self._half) if is_cast else weight.detach()
                stand_in = nn.Parameter(value, requires_grad=weight.requires_grad)
                pairs.append(_Pair(weight, stand_in))
                if is_cast:
                    halves.append(pairs[-1])
                stack.callback(module._parameters.__setitem__, name, weight)
                module._parameters[name] = stand_in
            self._pairs.append(pairs)
            # In a backward pass the first of a block's weights is the last to get its gradient. If others
            # come later after all (compiled blocks hand theirs over together), `collect` adds them.
            first = next((stand_in for _, stand_in in pairs if stand_in.requires_grad), None)
            if first is not None:
                finish = partial(self._finish, pairs)
                handle = first.register_post_accumulate_grad_hook(finish)  # type: ignore[no-untyped-call]
                # Without this the tensors would live until the garbage collector comes by.
                stack.callback(handle.remove)
        with torch.no_grad():
            torch._foreach_copy_(
                [pair.stand_in for pair in halves], [pair.weight for pair in halves], non_blocking=True
            )

    def _finish(self, pairs: list[_Pair], _: Tensor) -> None:
        """A block's gradients are there."""
        self._finished.append(pairs)
        self._waiting_bytes += sum(stand_in.nbytes for _, stand_in in pairs if stand_in.requires_grad)
        if self._waiting_bytes >= _WAITING_BYTES:
            self._add_up(self._finished)
            self._finished, self._waiting_bytes = [], 0

    def _forget(self) -> None:
        self._pairs, self._finished, self._waiting_bytes = [], [], 0

    @torch.no_grad()
    def _add_up(self, blocks: Sequence[Sequence[_Pair]]) -> None:
        """Takes the stand-ins' gradients, and adds them to those of the weights."""
        casts: tuple[list[Tensor], list[Tensor]] = ([], [])
        sums: tuple[list[Tensor], list[Tensor]] = ([], [])
        for weight, stand_in in (pair for pairs in blocks for pair in pairs):
            gradient = stand_in.grad
            if gradient is None:
                continue
            stand_in.grad = None
            in_full = gradient
            if gradient.dtype != weight.dtype:
                in_full = torch.empty_like(weight)
                casts[0].append(in_full)
                casts[1].append(gradient)
            if weight.grad is None:
                weight.grad = in_full
            else:
                sums[0].append(weight.grad)
                sums[1].append(in_full)
        if casts[0]:
            torch._foreach_copy_(*casts, non_blocking=True)
        if sums[0]:
            torch._foreach_add_(*sums)


def _blocks(model: nn.Module) -> Iterator[list[_Place]]:
    """The weights of each block, in the order in which a forward pass comes by. A block with anything in it
    that is not known takes no stand-ins."""
    for block in model.modules():
        if type(block) not in _BLOCKS:
            continue
        holders = [module for module in block.modules() if any(_weights(module))]
        if all(type(module) in (*_CAST, *_LEFT) for module in holders) and all(
            weight.dtype == torch.float32 for weight in block.parameters()
        ):
            yield [
                _Place(module, name, type(module) in _CAST)
                for module in holders
                for name, _ in _weights(module)
            ]


def _weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own."""
    yield from ((name, weight) for name, weight in module._parameters.items() if weight is not None)


def _same(dtype: torch.dtype) -> torch.dtype:
    return dtype
