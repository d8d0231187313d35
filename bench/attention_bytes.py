"""Memory of a training step by the way attention is computed: counted on fake tensors, or measured on CUDA.

Enters: a `Case`. Leaves: bytes. Called by `bench.attention` and by the tests. The peer is torch's math
attention, which keeps all scores for the backward pass: what Apple's GPU has in training.

Fake tensors are counted as a GPU under autocast would hold them: norms in fp32, all else in half precision.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final, cast

import open_clip
import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from cliptune_model.attention import AttentionPlan, install
from cliptune_trainer.memory.count import LiveBytes

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LAYER_NORM: Final = nn.functional.layer_norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A step: both towers, forward and backward, AdamW's state beside them.

    Attributes:
        architecture: open_clip's name of a CLIP with its own two transformers.
        image_size: pixels; None: the architecture's own.
        layers: of the image and the text tower; None: the architecture's own.
    """

    architecture: str
    attention: AttentionPlan
    precision: str = "fp16"
    checkpointing: bool = False
    image_size: int | None = None
    layers: tuple[int, int] | None = None

    def model_config(self) -> dict[str, Any]:
        """open_clip's form."""
        config = deepcopy(open_clip.get_model_config(self.architecture))
        if self.image_size is not None:
            config["vision_cfg"]["image_size"] = self.image_size
        if self.layers is not None:
            config["vision_cfg"]["layers"], config["text_cfg"]["layers"] = self.layers
        return cast(dict[str, Any], config)


def pair_bytes(case: Case, *, pairs: int, device: str = "fake") -> float:
    """Bytes that one more image-caption pair costs, between `pairs` and twice as many of them."""
    return (
        step_bytes(case, pairs=2 * pairs, device=device) - step_bytes(case, pairs=pairs, device=device)
    ) / pairs


def step_bytes(case: Case, *, pairs: int, device: str = "fake") -> int:
    """The most bytes of tensors that a step of `pairs` holds at once, weights and optimizer included.

    `device`: "fake" counts without allocating anything; "cuda" runs the step.

    Raises:
        torch.OutOfMemoryError: the GPU has less.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if case.attention.mode == "sdpa":
            stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        if device == "fake":
            return _counted(case, pairs, stack)
        return _measured(case, pairs, device)


def _counted(case: Case, pairs: int, stack: ExitStack) -> int:
    stack.enter_context(FakeTensorMode())
    stack.enter_context(_norms_in_full())
    live = stack.enter_context(LiveBytes("cpu"))
    model = _model(case, "cpu")
    weights = list(model.parameters())
    held = [torch.zeros_like(weight) for weight in weights for _ in range(2)]  # AdamW's moments
    for tensor in (*weights, *held):
        live.adopt(tensor)
    _forward_backward(model, case, pairs, "cpu")
    return int(live.peak)


def _measured(case: Case, pairs: int, device: str) -> int:
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    model = _model(case, device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):  # the first makes the optimizer's state
        torch.cuda.reset_peak_memory_stats(device)
        _forward_backward(model, case, pairs, device)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return int(torch.cuda.max_memory_allocated(device) - before)


def _model(case: Case, device: str) -> CLIP:
    config = case.model_config()
    with torch.device(device):
        model = CLIP(
            config["embed_dim"],
            config["vision_cfg"],
            config["text_cfg"],
            quick_gelu=config.get("quick_gelu", False),
        ).train()
    model.set_grad_checkpointing(case.checkpointing)
    install(model, case.attention)
    return model


def _forward_backward(model: CLIP, case: Case, pairs: int, device: str) -> None:
    config = case.model_config()
    size, length = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
    images_B3HW = torch.zeros(pairs, 3, size, size, device=device)
    tokens_BL = torch.zeros(pairs, length, dtype=torch.int64, device=device)
    half = case.precision != "fp32"
    kind = torch.device(device).type
    with torch.autocast(kind, dtype=_DTYPES[case.precision]) if half else nullcontext():
        image_BD, text_BD = model.encode_image(images_B3HW), model.encode_text(tokens_BL)
    (image_BD.float() * text_BD.float()).sum().backward()


@contextmanager
def _norms_in_full() -> Iterator[None]:
    """Layer norms in fp32, as autocast has them on GPUs but not on the CPU."""

    def in_full(x: Tensor, *arguments: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return _LAYER_NORM(x.float(), *arguments)

    nn.functional.layer_norm = in_full  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.layer_norm = _LAYER_NORM
