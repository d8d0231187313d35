"""Small computations that show whether this machine computes rightly.

Enters: a device. Leaves: measured differences, or an exception where something does not work at all. Called
by `cliptune_model.doctor`; each takes a second or less.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from cliptune.errors import ImageDecodeError
from cliptune_model.clip import Clip, build
from cliptune_model.device import synchronize
from cliptune_model.exported import Manifest, export_model, load_exported
from cliptune_model.pixels import FORMATS, decode_image
from cliptune_model.source import ModelSource

PROBE_MODEL = ModelSource(name="cliptune-test-vit")
PROBE_TEXTS = ("a photo of a cat", "a solar cell", "a dog in the snow", "an X-ray of a chest")
# What CLIP's tokeniser makes of the first of them, for ever (Radford et al. 2021).
CAT_TOKENS = (49406, 320, 1125, 539, 320, 2368, 49407)

# Above 32,767 rows some Apple GPUs summed past the end of their operands (pytorch#177116, #193487).
LONG_ROWS = 40_000


def gradient_difference(device: str) -> float:
    """A whole training step's gradient, in fp32 on `device` against float64 on the CPU.

    Returns:
        ‖g − g₆₄‖ / ‖g₆₄‖ of the parameter where it is largest, among those with a gradient worth the name.
    """
    exact = _gradients(build(PROBE_MODEL), "cpu", torch.float64)
    with _true_fp32():
        found = _gradients(build(PROBE_MODEL, device=device), device, torch.float32)
    largest = max(float(gradient.norm()) for gradient in exact.values())
    differences = [
        float((found[name] - gradient).norm() / gradient.norm())
        for name, gradient in exact.items()
        if float(gradient.norm()) > 1e-6 * largest
    ]
    if not all(np.isfinite(differences)):
        return float("nan")
    return max(differences)


def long_sum_difference(device: str) -> float:
    """A weight gradient over very many tokens, in fp32 on `device` against float64 on the CPU: relative."""
    generator = torch.Generator().manual_seed(0)
    a_KM, b_KN = (torch.randn(LONG_ROWS, columns, generator=generator) for columns in (32, 48))
    exact_MN = a_KM.double().T @ b_KN.double()
    with _true_fp32():
        found_MN = (a_KM.to(device).T @ b_KN.to(device)).cpu().double()
    return float((found_MN - exact_MN).norm() / exact_MN.norm())


def export_difference(device: str) -> float:
    """Export, load and embed: the largest difference between the vectors before and after; 0 is right."""
    clip = build(PROBE_MODEL, device=device)
    with tempfile.TemporaryDirectory(prefix="cliptune-doctor-") as folder:
        export_model(clip, Path(folder) / "model", Manifest.of(clip))
        loaded = load_exported(Path(folder) / "model", device=device)
    images_BCHW, tokens_BL = (part.to(device) for part in _batch(clip))
    with torch.inference_mode():
        return max(
            float((clip.encode_images(images_BCHW) - loaded.encode_images(images_BCHW)).abs().max()),
            float((clip.encode_texts(tokens_BL) - loaded.encode_texts(tokens_BL)).abs().max()),
        )


def tokens_of_a_cat() -> tuple[int, ...]:
    """Tokens of "a photo of a cat", which should be `CAT_TOKENS`."""
    tokens_BL = build(PROBE_MODEL).tokenize(PROBE_TEXTS[:1])
    return tuple(int(token) for token in tokens_BL[0, : len(CAT_TOKENS)])


def decodable_formats() -> tuple[str, ...]:
    """Formats that this Pillow writes and reads back, and whose truncated files it refuses."""
    image = _probe_image(0).resize((96, 64))
    return tuple(kind for kind in FORMATS if _round_trips(image, kind))


def _round_trips(image: PIL.Image.Image, kind: str) -> bool:
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind)
        whole = decode_image(buffer.getvalue())
    except (OSError, KeyError, ImageDecodeError):
        return False
    try:
        decode_image(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    except ImageDecodeError:
        return whole.size == image.size
    return False


def _gradients(clip: Clip, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    model = clip.model.train().to(dtype)
    images_BCHW, tokens_BL = _batch(clip)
    # Straight from the towers: Clip's own encoders end in fp32.
    image_BD = F.normalize(model.encode_image(images_BCHW.to(device, dtype)), dim=-1)  # type: ignore[operator]
    text_BD = F.normalize(model.encode_text(tokens_BL.to(device)), dim=-1)  # type: ignore[operator]
    logits_BB = model.logit_scale.exp() * image_BD @ text_BD.T  # type: ignore[operator]
    pairs_B = torch.arange(len(logits_BB), device=device)
    loss = (F.cross_entropy(logits_BB, pairs_B) + F.cross_entropy(logits_BB.T, pairs_B)) / 2
    loss.backward()  # type: ignore[no-untyped-call]
    synchronize(device)
    return {
        name: parameter.grad.detach().cpu().double()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@contextmanager
def _true_fp32() -> Iterator[None]:
    """CUDA rounds fp32 to TF32 in convolutions by default: not wrong, but too coarse for a comparison."""
    backends = (cast(Any, torch.backends.cudnn).conv, cast(Any, torch.backends.cuda).matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _batch(clip: Clip) -> tuple[Tensor, Tensor]:
    images_BCHW = torch.stack([clip.preprocess(_probe_image(seed)) for seed in range(len(PROBE_TEXTS))])
    return images_BCHW, clip.tokenize(PROBE_TEXTS)


def _probe_image(seed: int) -> PIL.Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((64, 64), PIL.Image.Resampling.BICUBIC)
