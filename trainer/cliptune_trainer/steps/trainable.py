"""What of a model is trained: all of it, one tower, or an adapter.

Enters: the model and the spec. Leaves: the model with its frozen parts frozen and its adapter in place, and
what is told of that. Called by preparation and by `run`, before anything is planned, so that the plan counts
gradients and optimizer state of what is trained alone.

A frozen tower makes no graph, keeps no activations, and is not gone through again in parts (Zhai et al. 2022,
LiT, section 3). It draws nothing at random and its batch statistics stay: it is in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cliptune.errors import ConflictError
from cliptune_model.adapters import BaseIdentity, attach, base_state, digest
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_trainer.spec import Spec

_STILL: Final = "_cliptune_still"
_IMAGE: Final = "visual"


def make_trainable(clip: Clip, spec: Spec) -> tuple[Clip, tuple[Choice, ...]]:
    """Freezes and attaches, in place. Again, as after a resume: keeps the adapter that is there.

    Raises:
        SpecError: the towers that are trained have no layers of a kind that the adapter was asked for.
        ConflictError: a checkpoint of another adapter than the spec's.
    """
    train, choices = spec.train, []
    if spec.adapter is not None:
        if clip.adapter is None:
            base = BaseIdentity(
                source=spec.model, seed=spec.train.seed, sha256=digest(base_state(clip.model))
            )
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(spec.train.seed)
                clip = attach(
                    clip, spec.adapter, base, image=not train.freeze_image, text=not train.freeze_text
                )
        elif clip.adapter.config != spec.adapter:
            raise ConflictError(f"the model carries another adapter ({clip.adapter.config}) than the spec's")
        choices.append(_told_adapter(clip))
        # An adapter's file holds no statistics: they are the base's.
        _keep_still(module for module in clip.model.modules() if isinstance(module, _BatchNorm))
    for name, frozen in (("image", train.freeze_image), ("text", train.freeze_text)):
        if frozen:
            for part in _tower(clip.model, name):
                part.requires_grad_(False)
                if isinstance(part, nn.Module):
                    _keep_still([part])
            choices.append(Choice(subject=f"{name} tower", value="frozen", reason="asked for"))
    return clip, tuple(choices)


def still_modules(model: nn.Module) -> list[nn.Module]:
    """Those that stay in evaluation mode while the rest is trained."""
    return [module for module in model.modules() if getattr(module, _STILL, False)]


def _keep_still(modules: Iterator[nn.Module] | list[nn.Module]) -> None:
    for module in modules:
        setattr(module, _STILL, True)


def _tower(model: nn.Module, name: str) -> Iterator[nn.Module | nn.Parameter]:
    """The parts of a tower; the scales belong to neither."""
    for child_name, child in model.named_children():
        if (child_name == _IMAGE) == (name == "image"):
            yield child
    if name == "text":  # open_clip's `CLIP` holds its text tower itself
        for parameter_name, parameter in model.named_parameters(recurse=False):
            if not parameter_name.startswith("logit_"):
                yield parameter


def _told_adapter(clip: Clip) -> Choice:
    attached = clip.adapter
    if attached is None:
        raise ConflictError("the model carries no adapter")
    config = attached.config
    added = sum(one.numel() for name, one in clip.model.named_parameters() if ".adapter." in name)
    whole = sum(one.numel() for one in clip.model.parameters())
    kinds = {target for layer in attached.layers for target in layer.wanted(config)}
    return Choice(
        subject="adapter",
        value=f"{config.kind}, rank {config.rank}",
        reason=f"asked for; {added:,} parameters ({added / whole:.2%} of all) in {len(attached.layers)}"
        f" layers: {', '.join(sorted(kinds))}",
    )
