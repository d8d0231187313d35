"""Which layers of a model can carry adapters, and what each of them is called.

Enters: a `Clip`. Leaves: `Layer`s, of which `attach` takes those that were asked for. Layers are known by the
names that open_clip, timm and Hugging Face give them, in the fused form (one weight for q, k and v) and in
separate ones.

Only layers that the towers really call count: some modules reach into a layer for its weight (the attention
pool of open_clip's ResNets), where an addition would be silently without effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn

from cliptune_model.adapters.attached import Layer
from cliptune_model.adapters.hosts import HOSTS, is_host
from cliptune_model.clip import Clip

_FUSED: Final = {"qkv": "qkv", "Wqkv": "qkv", "in_proj": "qkv", "kv": "kv"}
_SEPARATE: Final = {
    **dict.fromkeys(("q", "q_proj", "query", "to_q"), "q"),
    **dict.fromkeys(("k", "k_proj", "key", "to_k"), "k"),
    **dict.fromkeys(("v", "v_proj", "value", "to_v"), "v"),
    **dict.fromkeys(("proj", "out_proj", "o_proj", "c_proj", "to_out"), "o"),
}
_MLPS: Final = frozenset({"mlp", "ffn", "feed_forward", "intermediate"})
_ATTENTION: Final = "att"  # in attn, self_attn, attention, attn_pool, attnpool
_LAST_OF_MLP: Final = frozenset({"c_proj", "fc2", "w3", "down_proj", "wo"})
_IMAGE: Final = "visual."


def find_layers(clip: Clip) -> list[Layer]:
    """All layers of both towers that can carry adapters, in the model's order."""
    called = _called(clip)
    return [layer for layer in _named(clip.model) if layer.name in called]


def is_image_layer(name: str) -> bool:
    """Whether a module or a weight belongs to the image tower."""
    return name.startswith(_IMAGE)


def _named(model: nn.Module) -> Iterator[Layer]:
    for name, module in model.named_modules():
        if type(module) not in HOSTS and not is_host(module):
            continue
        if isinstance(module, nn.MultiheadAttention):
            yield Layer(name=name, targets=("q", "k", "v", "o"), slices={}, ends=True)
        elif isinstance(module, nn.Conv2d):
            if _is_pointwise(module):
                yield Layer(name=name, targets=("pointwise",), slices={}, ends=False)
        elif isinstance(module, nn.Linear):
            *parents, leaf = name.split(".")
            if leaf in _FUSED and _in_attention(parents):
                names = _FUSED[leaf]
                width = module.out_features // len(names)
                slices = {one: (place * width, (place + 1) * width) for place, one in enumerate(names)}
                if width * len(names) == module.out_features:
                    yield Layer(name=name, targets=tuple(names), slices=slices, ends=False)
            elif (target := _target(parents, leaf)) is not None:
                ends = target == "o" or leaf in _LAST_OF_MLP or parents[-1:] == ["output"]
                yield Layer(name=name, targets=(target,), slices={}, ends=ends)


def _target(parents: list[str], leaf: str) -> str | None:
    """Of a linear layer that makes one thing; None: a head, an embedding, or unknown."""
    if _MLPS & set(parents):
        return "mlp"
    if _in_attention(parents):
        if leaf in _SEPARATE:
            return _SEPARATE[leaf]
        return "o" if [*parents[-1:], leaf] == ["output", "dense"] else None  # BERT's
    return "mlp" if [*parents[-1:], leaf] == ["output", "dense"] else None


def _in_attention(parents: list[str]) -> bool:
    return any(_ATTENTION in parent.lower() for parent in parents[-3:])


def _is_pointwise(convolution: nn.Conv2d) -> bool:
    return (
        convolution.kernel_size == (1, 1)
        and convolution.groups == 1
        and convolution.padding in ((0, 0), "valid", "same")
        and convolution.weight.shape[0] > 1
    )


def _called(clip: Clip) -> set[str]:
    """Names of the modules that take part when an image and a text are embedded."""
    seen: set[str] = set()
    handles = []
    for name, module in clip.model.named_modules():

        def see(_module: nn.Module, _inputs: Any, name: str = name) -> None:
            seen.add(name)

        handles.append(module.register_forward_pre_hook(see))
    training = clip.model.training
    clip.model.eval()
    try:
        with torch.no_grad():
            like = next(clip.model.parameters())
            clip.encode_images(like.new_zeros(1, 3, *clip.image_size))
            clip.encode_texts(clip.tokenize(["a photo"]).to(clip.device))
    finally:
        clip.model.train(training)
        for handle in handles:
            handle.remove()
    return seen
