"""The sides of `bench.step`: one model and its batches, the trainer's step on them, and open_clip's own.

Enters: a model's name, a batch size, a device. Leaves: sides that take steps and say their losses. Called by
`bench.step`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from cliptune_model.acceleration.compiled import compile_towers
from cliptune_model.acceleration.lean import PARTS, make_lean
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from cliptune_trainer.data.loading.loader import Batch
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.steps.larger_parts import passes_of
from cliptune_trainer.steps.optim import BETAS, EPS, build_optimizer, takes_decay
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.step import Step, StepInFlight

START, END, WORDS = 49406, 49407, 40_000
# As for fine-tuning: at a rate for random weights, without warm-up, rounding alone parts the curves.
LEARNING_RATE, DECAY = 1e-5, 0.1
BATCHES: Final = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How our side runs. As the trainer decides by itself on a GPU, unless told otherwise."""

    trimmed: bool = True
    parts: tuple[str, ...] = PARTS
    compiled: str = "blocks"  # "", "blocks", "whole", or a mode of torch.compile for whole towers


class Workload:
    """One model, its batches on the device, and the sides that train on them."""

    def __init__(self, name: str, batch_size: int, tokens: int, device: str) -> None:
        self.name, self.batch_size, self.tokens, self.device = name, batch_size, tokens, device
        self.clip = build(ModelSource(name=name), device=device)
        self.precision = "bf16" if device == "cuda" else "fp32"
        generator = torch.Generator().manual_seed(0)
        self.batches = [self._batch(generator) for _ in range(BATCHES)]

    def _batch(self, generator: torch.Generator) -> Batch:
        rows, length = self.batch_size, self.clip.context_length
        tokens_BL = torch.randint(1, WORDS, (rows, length), generator=generator)
        tokens_BL[:, 0], tokens_BL[:, self.tokens - 1], tokens_BL[:, self.tokens :] = START, END, 0
        images_B3HW = torch.randn(rows, 3, *self.clip.image_size, generator=generator)
        places_B = torch.arange(rows)
        parts = (images_B3HW, tokens_BL, places_B, places_B)
        images, tokens, image_ids, caption_ids = (part.to(self.device) for part in parts)
        return Batch(
            epoch=0,
            index=0,
            images_B3HW=images,
            tokens_BL=tokens,
            image_ids_B=image_ids,
            caption_ids_B=caption_ids,
        )

    def forward_flops(self) -> int:
        """Of one pair, at the captions' own length: the towers as open_clip wrote them."""
        meta = copy.copy(self.clip)
        meta.model = copy.deepcopy(self.clip.model).to("meta")
        trimmed = self.clip.trim(self.batches[0].tokens_BL.cpu())[:1, : self.tokens]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            meta.model.train()
            meta.encode_images(torch.empty(1, 3, *self.clip.image_size, device="meta"))
            meta.encode_texts(trimmed.to("meta"))
        return int(counter.get_total_flops())

    def fresh(self) -> Clip:
        """The model with its first weights, to be trained."""
        clip = copy.copy(self.clip)
        clip.model = copy.deepcopy(self.clip.model).train()
        return clip


class Ours:
    """The trainer's step. `take` launches one and waits for the one before, as the loop does."""

    def __init__(self, workload: Workload, form: Form) -> None:
        self._clip = clip = workload.fresh()
        make_lean(clip, Choice(subject="lean_towers", value=", ".join(form.parts), reason="this benchmark"))
        self._batches = [
            replace(batch, tokens_BL=clip.trim(batch.tokens_BL.cpu()).to(workload.device))
            if form.trimmed
            else batch
            for batch in workload.batches
        ]
        precision = Precision(workload.precision, workload.device)
        began = time.perf_counter()
        if form.compiled:
            mode = {} if form.compiled in ("blocks", "whole") else {"config_patches": _patches(form.compiled)}
            on = Choice(subject="compile", value="on", reason="this benchmark")
            self.compilation = compile_towers(clip, on, whole=form.compiled != "blocks", options=mode)
            rows, tokens = self._batches[0].tokens_BL.shape
            self.compilation.warm_up(passes_of(clip, rows, rows, tokens), precision.autocast)
            if self.compilation.choice.value != "on":
                raise SystemExit(f"{workload.name}: {self.compilation.choice.reason}")
        self.compile_s = time.perf_counter() - began if form.compiled else 0.0
        optimizer = build_optimizer(clip.model, learning_rate=LEARNING_RATE, weight_decay=DECAY)
        self._step = Step(clip, Objective(), optimizer, precision, clip_norm=0.0)
        self._taken = 0
        self._flight: StepInFlight | None = None

    def take(self) -> float | None:
        """One step; the loss of the one before."""
        batch = self._batches[self._taken % BATCHES]
        self._taken += 1
        before, self._flight = self._flight, self._step.launch(batch, LEARNING_RATE)
        return None if before is None else before.result().loss

    def losses(self, steps: int) -> list[float]:
        """Of the next steps."""
        found = [self.take() for _ in range(steps)][1:]
        last = cast(StepInFlight, self._flight).result().loss
        self._flight = None
        return [*(loss for loss in found if loss is not None), last]


class _Towers(nn.Module):
    """Both of open_clip's towers, as one module to call or to compile."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] and [B, L] → two of [B, D], not normalised."""
        model = cast(Any, self.model)
        return model.encode_image(images), model.encode_text(tokens)


class OpenClip:
    """The step of open_clip's training script, with features and loss in fp32 and nothing read in between."""

    def __init__(self, workload: Workload, *, compiled: bool) -> None:
        self._model = workload.fresh().model
        self._batches, self._loss = workload.batches, ClipLoss()
        self._autocast = Precision(workload.precision, workload.device).autocast
        towers = _Towers(self._model)
        self._towers: Callable[..., tuple[Tensor, Tensor]] = torch.compile(towers) if compiled else towers
        named = list(self._model.named_parameters())
        self._optimizer = AdamW(
            [
                {
                    "params": [value for name, value in named if not takes_decay(name, value)],
                    "weight_decay": 0.0,
                },
                {
                    "params": [value for name, value in named if takes_decay(name, value)],
                    "weight_decay": DECAY,
                },
            ],
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=EPS,
        )
        self._taken = 0
        self.compile_s = 0.0
        if compiled:
            began = time.perf_counter()
            with self._autocast():
                self._towers(self._batches[0].images_B3HW, self._batches[0].tokens_BL)
            self.compile_s = time.perf_counter() - began

    def take(self) -> Tensor:
        """One step; its loss, on the device."""
        batch = self._batches[self._taken % BATCHES]
        self._taken += 1
        self._optimizer.zero_grad()
        with self._autocast():
            image_BD, text_BD = self._towers(batch.images_B3HW, batch.tokens_BL)
        scale = cast(nn.Parameter, self._model.logit_scale)
        loss = self._loss(
            F.normalize(image_BD.float(), dim=-1), F.normalize(text_BD.float(), dim=-1), scale.exp()
        )
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            scale.clamp_(0, math.log(100.0))
        return cast(Tensor, loss.detach())

    def losses(self, steps: int) -> list[float]:
        """Of the next steps."""
        return torch.stack([self.take() for _ in range(steps)]).tolist()


def _patches(mode: str) -> dict[str, object]:
    return cast(dict[str, object], torch._inductor.list_mode_options(mode))
