"""How near a faster way stays to the exact one: measured on the model itself, before it serves.

Enters: a `Clip` on its device, what is wished, and what was measured before (`measured.py`). Leaves: the way
to serve it, each choice with the cosine that was measured. Called by the engine when it loads a model. A
faster way is taken only where every sample's cosine to the exact embedding is at least `LEAST_COSINE`; it
depends on the weights, so no table could say it.

Shape suffixes: N samples, C channels, H height, W width, D embedding.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_model.gpu_jpeg import GpuJpeg
from cliptune_model.image_reader import ImageReader
from cliptune_model.machine.hardware import Machine
from cliptune_model.machine.proofs import UNKNOWN, Proofs
from cliptune_model.machine.rules import automatic_precisions

LEAST_COSINE: Final = 0.999
PRECISIONS: Final = ("exact", "auto")
_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TEXTS: Final = (
    "a photo of a dog",
    "an X-ray of a broken wrist",
    "7",
    "a red car parked by the sea at night",
)
_PHOTOS: Final = 4

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingWay:
    """How one model is served.

    Attributes:
        precision: "fp32", "bf16" or "fp16".
        precision_cosine: the least one to fp32 that was measured; 1 for fp32 itself.
        decode: "exact", "fast", or "gpu": fast, and JPEG files on the GPU too.
        decode_cosine: the least one to the exact transform; 1 for that itself.
        measured: cosines by way ("bf16", "fp16", "fast", "gpu"), those that were known before and new ones,
            also of ways that were not taken.
    """

    precision: Choice
    precision_cosine: float
    decode: Choice
    decode_cosine: float
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the towers' products; None: fp32."""
        return _DTYPES.get(self.precision.value)

    def autocast(self, device: str) -> Autocast:
        """Around each forward."""
        dtype = self.dtype
        if dtype is None:
            return nullcontext
        return lambda: torch.autocast(torch.device(device).type, dtype=dtype)


@torch.inference_mode()
def choose_way(
    clip: Clip,
    machine: Machine,
    *,
    precision: str,
    decode: str,
    proofs: Proofs = UNKNOWN,
    known: Mapping[str, float] = MappingProxyType({}),
) -> ServingWay:
    """The fastest way that stays near enough.

    Args:
        clip: on its device, in evaluation mode.
        machine: of that device.
        precision: "exact": fp32. "auto": the machine's fastest, if it is near enough.
        decode: "exact" or "fast" (if it is near enough).
        proofs: what is known of the device.
        known: `measured` of an earlier time, of these weights on this device.
    """
    cosines = _Cosines(clip, known)
    faster, precision_cosine = _precision(cosines, machine, precision, proofs)
    reading, decode_cosine = _decode(cosines, decode)
    return ServingWay(
        precision=faster,
        precision_cosine=precision_cosine,
        decode=reading,
        decode_cosine=decode_cosine,
        measured=cosines.measured,
    )


class _Cosines:
    """Of one model; each is measured once."""

    def __init__(self, clip: Clip, known: Mapping[str, float]) -> None:
        self.clip: Final = clip
        self.measured: Final = dict(known)

    def of(self, way: str) -> float:
        """The least cosine of `way` to the exact one."""
        if way not in self.measured:
            photos = [_photo(seed) for seed in range(_PHOTOS)]
            if way == "fast":
                self.measured[way] = _fast_cosine(self.clip, photos)
            elif way == "gpu":
                self.measured[way] = _gpu_cosine(self.clip, photos)
            else:
                self.measured[way] = _precision_cosine(self.clip, photos, _DTYPES[way])
        return self.measured[way]


def _precision(cosines: _Cosines, machine: Machine, wanted: str, proofs: Proofs) -> tuple[Choice, float]:
    def choice(value: str, reason: str) -> Choice:
        return Choice(subject="serving_precision", value=value, reason=reason)

    if wanted == "exact":
        return choice("fp32", "asked for: vectors equal open_clip's"), 1.0
    if machine.accelerator == "cpu":
        if not machine.cpu_bf16:
            return choice("fp32", "this processor has no bf16 instructions"), 1.0
        value, why = "bf16", "this processor computes bf16 itself"
    elif machine.accelerator == "mps" and not proofs.failed("fp16"):
        value, why = "fp16", "every Apple GPU computes fp16, and a forward alone needs no loss scaling"
    else:
        best = automatic_precisions(machine, proofs)[0]
        value, why = best.value, best.reason
    if value == "fp32":
        return choice("fp32", why), 1.0
    cosine = cosines.of(value)
    if not cosine >= LEAST_COSINE:
        return choice("fp32", f"{value} would leave a cosine of {cosine:.5f} to fp32"), 1.0
    return choice(value, f"{why}; cosine to fp32 {cosine:.5f}"), cosine


def _decode(cosines: _Cosines, wanted: str) -> tuple[Choice, float]:
    def choice(value: str, reason: str) -> Choice:
        return Choice(subject="decode", value=value, reason=reason)

    if wanted == "exact":
        return choice("exact", "asked for: open_clip's transform"), 1.0
    cosine = cosines.of("fast")
    if not cosine >= LEAST_COSINE:
        return choice("exact", f"scaled decoding would leave a cosine of {cosine:.5f}"), 1.0
    told = f"cosine to the exact transform {cosine:.5f}"
    on_gpu, why = _gpu_decode(cosines)
    if on_gpu is None:
        return choice("fast", f"{told}; {why}" if why else told), cosine
    return choice("gpu", f"{told}, on the GPU {on_gpu:.5f}"), min(cosine, on_gpu)


def _gpu_decode(cosines: _Cosines) -> tuple[float | None, str]:
    """The cosine of files that are decoded on the GPU, or None and why none are; on a CPU there is no GPU."""
    if cosines.clip.device.type != "cuda":
        return None, ""
    why_not = GpuJpeg.why_not(cosines.clip)
    if why_not:
        return None, f"not on the GPU: {why_not}"
    try:
        cosine = cosines.of("gpu")
    except (RuntimeError, ImportError) as error:
        return None, f"not on the GPU: {type(error).__name__}: {str(error)[:200]}"
    if not cosine >= LEAST_COSINE:
        return None, f"not on the GPU: that would leave a cosine of {cosine:.5f}"
    return cosine, ""


def _precision_cosine(clip: Clip, photos: list[bytes], dtype: torch.dtype) -> float:
    reader = ImageReader(clip)
    exact = _features(clip, reader, photos, nullcontext)
    faster = _features(clip, reader, photos, lambda: torch.autocast(clip.device.type, dtype=dtype))
    found = [_least_cosine(one, other) for one, other in zip(exact, faster, strict=True)]
    return min(found) if all(one == one for one in found) else float("nan")


def _fast_cosine(clip: Clip, photos: list[bytes]) -> float:
    exact_ND = _image_features(clip, ImageReader(clip), photos, nullcontext)
    fast_ND = _image_features(clip, ImageReader(clip, fast=True), photos, nullcontext)
    return _least_cosine(exact_ND, fast_ND)


def _gpu_cosine(clip: Clip, photos: list[bytes]) -> float:
    exact_ND = _image_features(clip, ImageReader(clip), photos, nullcontext)
    images_NCHW = torch.stack(GpuJpeg(clip, clip.device).read(photos))
    return _least_cosine(exact_ND, clip.encode_images(images_NCHW).float().cpu())


def _features(clip: Clip, reader: ImageReader, photos: list[bytes], autocast: Autocast) -> list[Tensor]:
    with autocast():
        tokens = clip.tokenize_trimmed(_TEXTS).to(clip.device)
        texts_ND = clip.encode_texts(tokens).float().cpu()
    return [_image_features(clip, reader, photos, autocast), texts_ND]


def _image_features(clip: Clip, reader: ImageReader, photos: list[bytes], autocast: Autocast) -> Tensor:
    images_NCHW = torch.stack([reader.encoded(photo) for photo in photos]).to(clip.device)
    with autocast():
        return clip.encode_images(images_NCHW).float().cpu()


def _least_cosine(one_ND: Tensor, other_ND: Tensor) -> float:
    """NaN where an embedding is NaN, which is near to nothing."""
    return float(torch.nn.functional.cosine_similarity(one_ND, other_ND, dim=1).min())


def _photo(seed: int) -> bytes:
    """A JPEG of 640 × 480 with detail at every scale, as photographs have it."""
    chance = np.random.default_rng(seed)
    pixels_HWC = np.full((480, 640, 3), 120.0, np.float32)
    for across in (4, 16, 64):
        grain = chance.integers(0, 256, (across * 3 // 4, across, 3), dtype=np.uint8)
        layer = PIL.Image.fromarray(grain).resize((640, 480), PIL.Image.Resampling.BICUBIC)
        pixels_HWC += (np.asarray(layer, np.float32) - 128.0) * (1.6 / across**0.55)
    pixels_HWC += chance.normal(0.0, 3.5, pixels_HWC.shape).astype(np.float32)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()
