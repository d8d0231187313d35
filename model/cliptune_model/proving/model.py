"""A whole tiny model: its gradients, its export, its tokeniser and its images.

Enters: a device. Leaves: measured differences, or an exception where something does not work at all.
"""

from __future__ import annotations

import io
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F
from torch.optim import SGD

from cliptune.errors import ImageDecodeError
from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, load_exported, manifest_of
from cliptune_model.machine.proofs import Proof
from cliptune_model.machine.synchronize import synchronize
from cliptune_model.pixels import FORMATS, decode_image
from cliptune_model.proving.compare import FP32_LIMIT, Sizes, churned, judged, true_fp32, worst
from cliptune_model.source import ModelSource

PROBE_MODEL = ModelSource(name="cliptune-test-vit")
PROBE_TEXTS = ("a photo of a cat", "a solar cell", "a dog in the snow", "an X-ray of a chest")
# What CLIP's tokeniser makes of the first of them, for ever (Radford et al. 2021).
CAT_TOKENS = (49406, 320, 1125, 539, 320, 2368, 49407)


def prove_gradients(device: str, sizes: Sizes) -> Proof:
    """A whole training step's gradients in fp32 on `device`, against float64 on the CPU."""
    exact = exact_gradients()
    with true_fp32(), churned(device):
        found = gradients(build(PROBE_MODEL, device=device), device, torch.float32)
    what = f"forward and backward in fp32 on {device} against float64 on the CPU"
    return judged(worst(found, exact), FP32_LIMIT, what)


@cache
def exact_gradients() -> dict[str, Tensor]:
    """What every device is compared with."""
    return gradients(build(PROBE_MODEL), "cpu", torch.float64)


def gradients(
    clip: Clip,
    device: str,
    dtype: torch.dtype,
    *,
    half: torch.dtype | None = None,
    scaler: GradScaler | None = None,
) -> dict[str, Tensor]:
    """Every parameter's gradient of a contrastive loss over four pairs, float64 on the CPU.

    Args:
        clip: on `device`; its weights become `dtype`.
        device: where it is.
        dtype: of weights and images.
        half: what the towers compute in, under autocast; None: in `dtype`.
        scaler: scales the loss, and the gradients back.
    """
    model = clip.model.train().to(dtype)
    images_BCHW, tokens_BL = _batch(clip)
    # Straight from the towers: Clip's own encoders end in fp32.
    with torch.autocast(torch.device(device).type, dtype=half, enabled=half is not None):
        image_BD = model.encode_image(images_BCHW.to(device, dtype))  # type: ignore[operator]
        text_BD = model.encode_text(tokens_BL.to(device))  # type: ignore[operator]
    image_BD, text_BD = (F.normalize(features_BD.to(dtype), dim=-1) for features_BD in (image_BD, text_BD))
    logits_BB = model.logit_scale.exp() * image_BD @ text_BD.T  # type: ignore[operator]
    pairs_B = torch.arange(len(logits_BB), device=device)
    loss = (F.cross_entropy(logits_BB, pairs_B) + F.cross_entropy(logits_BB.T, pairs_B)) / 2
    if scaler is None:
        loss.backward()  # type: ignore[no-untyped-call]
    else:
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(SGD(model.parameters(), lr=0.0))
    synchronize(device)
    return {
        name: parameter.grad.detach().cpu().double()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def export_difference(device: str) -> float:
    """Export, load and embed: the largest difference between the vectors before and after; 0 is right."""
    clip = build(PROBE_MODEL, device=device)
    with tempfile.TemporaryDirectory(prefix="cliptune-doctor-") as folder:
        export_model(clip, Path(folder) / "model", manifest_of(clip))
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


def _batch(clip: Clip) -> tuple[Tensor, Tensor]:
    images_BCHW = torch.stack([clip.preprocess(_probe_image(seed)) for seed in range(len(PROBE_TEXTS))])
    return images_BCHW, clip.tokenize(PROBE_TEXTS)


def _probe_image(seed: int) -> PIL.Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((64, 64), PIL.Image.Resampling.BICUBIC)
