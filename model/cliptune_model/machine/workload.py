"""What a training step asks of a machine: sizes of the towers, and a rough count of their bytes.

Enters: a `Clip`, or plain numbers. Leaves: a `Workload` for `policy.decide`. The bytes are a first guess for
where to begin; the trainer's batch plan counts them on the very model.

T: tokens × width, S: heads × tokens², each summed over the layers of both towers, for one pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from cliptune_model.clip import Clip

# Bytes that autograd keeps, by precision: ~16 tensors of T a layer (norms, q, k, v, attention's output, the
# MLP's four-fold middle twice), fitted to counts of ViT-B/32, B/16, L/14 and L/14-336 (within 6 %).
_TOKEN_BYTES: Final = {"fp32": 68.0, "bf16": 37.5, "fp16": 37.5}
# torch's own attention without a fused kernel that spares the scores: probabilities; copies of q, k, v.
_SCORE_BYTES: Final = 4.4
_COPY_BYTES: Final = 2.5
# Recomputing: a layer's input is kept, and one layer's activations live at a time.
_INPUT_BYTES: Final = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}

# fp32 weight; gradient and Adam's two moments.
_WEIGHT_BYTES: Final = 4
_TRAINING_BYTES: Final = 12

_GUESSED_WIDTH: Final = 768
_HEAD_WIDTH: Final = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Tower:
    """A transformer: `layers` × `width`, `heads` heads. Zeros: unknown, guessed from its parameters."""

    layers: int = 0
    width: int = 0
    heads: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A step's sizes.

    Attributes:
        image_tokens: of an image in its tower, class token included.
        text_tokens: of a text in its tower.
        parameters: of both towers.
        batch_size: pairs in one contrastive batch.
        trainable: parameters that are trained; None: all.
        image, text: shapes of the towers.
        total_steps: of the job; 0: unknown.
    """

    image_tokens: int
    text_tokens: int
    parameters: int
    batch_size: int
    trainable: int | None = None
    image: Tower = Tower()
    text: Tower = Tower()
    total_steps: int = 0

    @classmethod
    def of(cls, clip: Clip, *, batch_size: int, image_tokens: int, total_steps: int = 0) -> Workload:
        """The workload of training `clip`. `image_tokens`: as `cliptune_model.attention` counts them."""
        parameters = list(clip.model.parameters())
        return cls(
            image_tokens=image_tokens,
            text_tokens=clip.context_length,
            parameters=sum(parameter.numel() for parameter in parameters),
            trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            batch_size=batch_size,
            image=tower_of(clip.model_config.get("vision_cfg", {})),
            text=tower_of(clip.model_config.get("text_cfg", {})),
            total_steps=total_steps,
        )

    @property
    def tokens(self) -> int:
        """Of the longer tower."""
        return max(self.image_tokens, self.text_tokens)

    def state_bytes(self) -> int:
        """Weights, gradients and Adam's moments, fp32."""
        trainable = self.parameters if self.trainable is None else self.trainable
        return _WEIGHT_BYTES * self.parameters + _TRAINING_BYTES * trainable

    def pair_bytes(self, precision: str, *, checkpointing: bool, scores_kept: bool) -> int:
        """Bytes of one pair's activations at their peak, roughly.

        Args:
            precision: "fp32", "bf16" or "fp16".
            checkpointing: activations are recomputed.
            scores_kept: attention keeps its score matrix for the backward pass.
        """
        towers = self._towers()
        kept, largest_layer = 0.0, 0.0
        for tokens, tower in towers:
            layer = _TOKEN_BYTES[precision] * tokens * tower.width
            if scores_kept:
                layer += _COPY_BYTES * tokens * tower.width + _SCORE_BYTES * tower.heads * tokens**2
            if checkpointing:
                kept += _INPUT_BYTES[precision] * tokens * tower.width * tower.layers
                largest_layer = max(largest_layer, layer)
            else:
                kept += layer * tower.layers
        return int(kept + largest_layer)

    def _towers(self) -> list[tuple[int, Tower]]:
        pairs = [(self.image_tokens, self.image), (self.text_tokens, self.text)]
        return [(tokens, tower if tower.layers else self._guessed()) for tokens, tower in pairs]

    def _guessed(self) -> Tower:
        """A transformer with half of all parameters: 12 × width² a layer."""
        layers = max(1, round(self.parameters / 2 / (12 * _GUESSED_WIDTH**2)))
        return Tower(layers=layers, width=_GUESSED_WIDTH, heads=_GUESSED_WIDTH // _HEAD_WIDTH)


def tower_of(config: dict[str, Any]) -> Tower:
    """From a tower's part of open_clip's configuration; unknown for those of timm, ResNets and the hub."""
    layers, width = config.get("layers"), config.get("width")
    named_elsewhere = config.get("timm_model_name") or config.get("hf_model_name")
    if named_elsewhere or not isinstance(layers, int) or not isinstance(width, int):
        return Tower()
    heads = config.get("heads") or max(1, width // int(config.get("head_width", _HEAD_WIDTH)))
    return Tower(layers=layers, width=width, heads=int(heads))
