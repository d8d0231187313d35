"""Bytes of a training step, counted on the very model without computing anything.

Enters: a `Clip` and how its towers shall compute. Leaves: an `Estimate`, a line in the micro-batch size.
Called by the batch plan. Forward and backward pass run at two sizes on fake tensors, shapes without numbers;
of a stack of like layers only the first are run, for each further one keeps as much.

The fake tensors are the CPU's, for every device: another device's need its driver, and would wake a GPU that
is busy with another job. Where devices differ in what they keep, it is imitated: Apple's GPU has no fused
attention in training (the score matrix is kept), and accelerators under autocast compute norms in fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from cliptune_model.attention import AttentionPlan, install
from cliptune_model.clip import Clip
from cliptune_model.machine.workload import Workload
from cliptune_trainer.memory.count import LiveBytes

# What a device holds against the bytes of live tensors: heaps, fragments, graphs. Probes correct it.
OVERHEAD: Final = {"mps": 1.4, "cuda": 1.1, "cpu": 1.2}
# Workspaces of the device's libraries.
_WORKSPACE_BYTES: Final = {"mps": 128 << 20, "cuda": 128 << 20, "cpu": 32 << 20}
_LEAST_COUNTED_PAIRS: Final = 2
_MAX_COUNTED_PAIRS: Final = 256
_COUNTED_BLOCK_PAIRS: Final = 64
_SCORE_BYTES: Final = 10
_USUAL_HEADS: Final = 16
_HALF: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Peak bytes on the device of a step whose micro-batch has m pairs: `fixed_bytes` + m × `pair_bytes`."""

    fixed_bytes: int
    pair_bytes: int

    def at(self, pairs: int) -> int:
        """Peak of a micro-batch of so many pairs."""
        return self.fixed_bytes + pairs * self.pair_bytes

    def pairs_within(self, budget_bytes: int) -> int:
        """The most pairs whose peak keeps to the budget; 0 or less: not even one."""
        return (budget_bytes - self.fixed_bytes) // max(self.pair_bytes, 1)


class Estimator:
    """Estimates for one model, precision and device; each is counted when it is first asked for.

    Args:
        clip: the model; it is copied without its weights, and may be on any device.
        device_type: where the step will run: "cpu", "cuda" or "mps".
        precision: "fp32", "bf16" or "fp16".
        text_tokens: length that texts have when they reach the tower.
        workload: the step's sizes, for how many pairs to count with.
        recompute: switches checkpointing on in a model.
    """

    def __init__(
        self,
        clip: Clip,
        *,
        device_type: str,
        precision: str,
        text_tokens: int,
        workload: Workload,
        recompute: Callable[[Clip], object],
    ) -> None:
        self._device_type, self._precision = device_type, precision
        self._text_tokens, self._workload, self._recompute = text_tokens, workload, recompute
        self._clip = clip
        self._known: dict[tuple[AttentionPlan, bool], Estimate] = {}
        self._state_bytes = workload.state_bytes()
        weights = [parameter for parameter in clip.model.parameters() if parameter.requires_grad]
        self._largest_weight_bytes = 4 * max((weight.numel() for weight in weights), default=0)

    def __call__(self, attention: AttentionPlan, *, checkpointing: bool) -> Estimate:
        """The estimate for towers that compute like this."""
        key = (attention, checkpointing)
        if key not in self._known:
            self._known[key] = self._estimate(attention, checkpointing)
        return self._known[key]

    def _estimate(self, attention: AttentionPlan, checkpointing: bool) -> Estimate:
        rough = self._workload.pair_bytes(
            self._precision, checkpointing=checkpointing, scores_kept=attention.mode == "sdpa"
        )
        fake = _fake(self._clip)
        # Between the two sizes only activations may differ, so those of the layers that are run must outweigh
        # the passing gradient of the largest weight. Fake tensors cost the same at every size, but blocks of
        # attention are looped over.
        share = max(1, rough // max(1, max((len(stack.like) for stack in fake.stacks), default=1)))
        pairs = min(
            max(_LEAST_COUNTED_PAIRS, -(-4 * self._largest_weight_bytes // share)), _MAX_COUNTED_PAIRS
        )
        counted, beyond = attention, 0
        if attention.mode != "sdpa":
            one_pair = _USUAL_HEADS * _SCORE_BYTES * self._workload.tokens**2
            budget = min(attention.budget_bytes, one_pair * min(pairs, _COUNTED_BLOCK_PAIRS))
            counted, beyond = replace(attention, budget_bytes=budget), attention.budget_bytes - budget
        if self._device_type != "cpu":
            for module in fake.clip.model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.forward = partial(_norm_in_full, module)  # type: ignore[method-assign]
        install(fake.clip.model, counted)
        if checkpointing:
            self._recompute(fake.clip)
        first, second = (self._activation_bytes(fake, count) for count in (pairs, 2 * pairs))
        pair_bytes = max((second - first) // pairs, 1)
        overhead = OVERHEAD[self._device_type]
        passing = max(first - pairs * pair_bytes, 0) + beyond
        return Estimate(
            fixed_bytes=self._state_bytes + int(passing * overhead) + _WORKSPACE_BYTES[self._device_type],
            pair_bytes=int(pair_bytes * overhead),
        )

    def _activation_bytes(self, fake: _Fake, pairs: int) -> int:
        """Peak of a whole step beside weights, their gradients and the optimizer's state."""
        for stack in fake.stacks:
            stack.cut_to(1)
        kept, peak = self._run(fake, pairs, backward=True)
        for stack in fake.stacks:
            stack.cut_to(2)
            deeper, _ = self._run(fake, pairs, backward=False)
            stack.cut_to(1)
            peak += (len(stack.like) - 1) * (deeper - kept)
        return peak

    def _run(self, fake: _Fake, pairs: int, *, backward: bool) -> tuple[int, int]:
        """Bytes that live after the forward pass, and the most that lived."""
        clip = fake.clip
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(fake.mode)
            live = stack.enter_context(LiveBytes("cpu"))
            for tensor in fake.weights:
                live.adopt(tensor)
            weights_bytes = live.now
            stack.enter_context(_as_on(self._device_type))
            images_B3HW = torch.empty(pairs, 3, *clip.image_size)
            tokens_BL = torch.zeros(pairs, self._text_tokens, dtype=torch.int64)
            with _autocast(self._precision):
                image_BD, text_BD = clip.encode_images(images_B3HW), clip.encode_texts(tokens_BL)
            kept = live.now - weights_bytes
            if backward:
                (image_BD * text_BD).sum().backward()  # type: ignore[no-untyped-call]
            return kept, live.peak - weights_bytes


@dataclass(frozen=True, slots=True)
class _Stack:
    """Layers one after the other in the module that holds them; `like` names those that are alike."""

    holder: nn.Module
    layers: dict[str, nn.Module]
    like: list[str]

    def cut_to(self, depth: int) -> None:
        left_out = self.like[depth:]
        self.holder._modules.clear()
        self.holder._modules.update(
            (name, layer) for name, layer in self.layers.items() if name not in left_out
        )


@dataclass(frozen=True, slots=True)
class _Fake:
    """A copy of a model with fake weights, whose gradients pass as soon as they are there."""

    clip: Clip
    mode: FakeTensorMode
    weights: list[Tensor]
    stacks: list[_Stack]


def _fake(clip: Clip) -> _Fake:
    mode = FakeTensorMode()
    memo: dict[int, Any] = {}
    with mode:
        for tensor in (*clip.model.parameters(), *clip.model.buffers()):
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                if tensor.requires_grad:
                    fake.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
            memo[id(tensor)] = fake
    weights = list(memo.values())
    model = deepcopy(clip.model, memo)
    model.train()
    return _Fake(replace(clip, model=model), mode, weights, _stacks(model))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _stacks(model: nn.Module) -> list[_Stack]:
    found = []
    for module in model.modules():
        layers = dict(module.named_children())
        if isinstance(module, nn.ModuleList | nn.Sequential) and layers:
            forms = {name: _form(layer) for name, layer in layers.items()}
            form, count = Counter(forms.values()).most_common(1)[0]
            if count > 2 and form[1]:
                like = [name for name in layers if forms[name] == form]
                found.append(_Stack(module, layers, like))
    return found


def _form(layer: nn.Module) -> tuple[type[nn.Module], tuple[tuple[torch.Size, bool], ...]]:
    weights = layer.parameters()
    return type(layer), tuple((weight.shape, weight.requires_grad) for weight in weights)


def _as_on(device_type: str) -> AbstractContextManager[object]:
    """torch's own attention keeps for the backward pass what it would on this device."""
    return sdpa_kernel([SDPBackend.MATH]) if device_type == "mps" else nullcontext()


def _autocast(precision: str) -> AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=_HALF[precision]) if precision in _HALF else nullcontext()


def _norm_in_full(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """As autocast on CUDA and MPS has it, not on the CPU."""
    with torch.autocast("cpu", enabled=False):
        return type(norm).forward(norm, x.float()).to(x.dtype)
