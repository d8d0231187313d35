"""Whole training steps of the product on the fake MPS device; run by `test_fake_mps.py` in its own process.

Enters: nothing. Leaves: one line of JSON, for each case what was found. The product's own towers, attention,
checkpointing, loss, accumulation, precision, optimiser and step run as they do on a Mac.
"""

from __future__ import annotations

from tests.support.fake_mps import device as _device  # noqa: F401  # before torch

# isort: split
import json
import sys
import traceback
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby, product
from operator import attrgetter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from cliptune_model.attention import MODES, AttentionPlan, image_tokens, install
from cliptune_model.clip import Clip, build
from cliptune_model.source import CONFIG_FOLDER, ModelSource
from cliptune_trainer.data.loading.images import Images, Normalisation
from cliptune_trainer.data.loading.loader import Batch
from cliptune_trainer.losses import LOSSES
from cliptune_trainer.losses.config import LossConfig, Term
from cliptune_trainer.losses.entry import BIAS, TEACHER
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.steps.checkpointing import disable_checkpointing, enable_checkpointing
from cliptune_trainer.steps.optim import build_optimizer
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.step import Step
from cliptune_trainer.steps.teacher import StartingModel
from tests.mps import mistakes
from tests.support.fake_mps.watch import Watch
from tests.trainer.towers import small_clip

PRECISIONS = ("fp32", "bf16", "fp16")
SHIPPED = sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))
HEADS = {"cliptune-tiny-vit": 4, "coca": 8}
BYTES_A_SCORE = 10
TESTS_OWN = "cliptune-test-vit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One way to take a step. `block`: of the loss's tiles; 0: the whole table."""

    model: str
    precision: str
    attention: str
    checkpointing: bool
    loss: str = "infonce"
    block: int = 0
    rows: int = 2
    micro_batch_size: int = 2
    side: int = 0  # of images in pixels; 0: as the model was trained

    def __str__(self) -> str:
        again = "recomputed" if self.checkpointing else "kept"
        tiles = f"tiles of {self.block}" if self.block else "whole"
        return (
            f"{self.model}, {self.precision}, {self.attention}, {again}, {self.loss} {tiles},"
            f" {self.micro_batch_size} of {self.rows}" + (f", {self.side} pixels" if self.side else "")
        )


TOWERS = (
    Case(model="vit", precision="fp32", attention="chunked", checkpointing=True, block=1),
    Case(model="vit", precision="bf16", attention="sdpa", checkpointing=True, side=48),
    Case(model="dropout", precision="bf16", attention="sliced", checkpointing=True, micro_batch_size=1),
    Case(model="dropout", precision="fp16", attention="sdpa", checkpointing=False, side=64),
    Case(model="siglip", precision="fp16", attention="sdpa", checkpointing=False, loss="sigmoid", block=1),
    Case(model="coca", precision="bf16", attention="sliced", checkpointing=False, loss="infonce", block=1),
    Case(model="convnext", precision="fp16", attention="sdpa", checkpointing=True, micro_batch_size=1),
    Case(model="timm-resnet", precision="bf16", attention="sdpa", checkpointing=False),
    Case(model="resnet", precision="fp16", attention="chunked", checkpointing=False),
)


def cases() -> Iterator[Case]:
    """Every combination for the shipped models, every loss in two parts; for the other towers one each,
    between them every choice.
    """
    for name in LOSSES:
        if BIAS not in LOSSES[name].needs:  # only the SigLIP tower below has one
            yield Case(
                model="vit", precision="bf16", attention="sdpa", checkpointing=False, loss=name, rows=3
            )
    yield from TOWERS
    for model in SHIPPED:
        ways = list(product(PRECISIONS, MODES, (False, True)))
        # Of the tests' own model, smaller but of the same modules, every choice once.
        for at, (precision, attention, checkpointing) in enumerate(ways[:: 5 if model == TESTS_OWN else 1]):
            yield Case(
                model=model,
                precision=precision,
                attention=attention,
                checkpointing=checkpointing,
                loss=("infonce", "multi_positive")[at % 2],
                block=(0, 1)[at // 2 % 2],
                rows=1 if attention == "chunked" else 2,  # the blocks are many
                micro_batch_size=1 if (precision, attention) == ("fp16", "sdpa") else 2,
            )


def on_mps(model: str) -> Clip:
    """The model in training, on the device. Made really: libraries read numbers while they build."""
    with unset_fake_temporarily():
        clip = build(ModelSource(name=model)) if model in SHIPPED else small_clip(model)
    clip.model.train().to("mps")
    return clip


def batch_for(clip: Clip, rows: int) -> Batch:
    """As the loader hands it over: pixels as bytes and tokens on the CPU."""
    height, width = clip.image_size
    pixels_BHW3 = torch.zeros(rows, height, width, 3, dtype=torch.uint8)
    normalisation = Normalisation.of(clip.preprocess_config, clip.device)
    ids_B = torch.arange(rows)
    return Batch(
        epoch=0,
        index=0,
        images_B3HW=Images(pixels_BHW3, normalisation, torch.zeros(rows, 3, 4)),
        tokens_BL=torch.ones(rows, 16, dtype=torch.int64),
        image_ids_B=ids_B,
        caption_ids_B=ids_B // 2,
        labels_BC=torch.ones(rows, 2),
        negative_tokens_BL=torch.ones(rows, 16, dtype=torch.int64),
        negative_ids_B=ids_B - 2,
    )


def attention_budget(case: Case, clip: Clip) -> int:
    """Bytes that cut the image tower's attention in two: the batch, or the queries of each head."""
    if case.model in ("timm-resnet", "convnext"):
        return 1 << 20  # no attention at all
    a_head = image_tokens(clip) ** 2 * BYTES_A_SCORE
    heads = HEADS.get(case.model, 2)
    return a_head * case.rows * heads * 3 // 5 if case.attention == "sliced" else a_head * 3 // 5


def findings(case: Case, clip: Clip) -> list[str]:
    """What a Mac would refuse, or wait for, in one step."""
    disable_checkpointing(clip)
    clip = clip.at((case.side, case.side)) if case.side else clip
    if case.checkpointing and not enable_checkpointing(clip):
        return ["nothing was checkpointed"]
    install(clip.model, AttentionPlan(mode=case.attention, budget_bytes=attention_budget(case, clip)))
    precision = Precision(case.precision, "mps")
    optimizer = build_optimizer(
        clip.model, learning_rate=1e-4, weight_decay=0.1, scaled=precision.scaler is not None
    )
    objective = Objective(LossConfig(terms=(Term(name=case.loss),)), block=case.block or None)
    step = Step(
        clip,
        objective,
        optimizer,
        precision,
        clip_norm=1.0,
        micro_batch_size=case.micro_batch_size,
        teacher=StartingModel(deepcopy(clip)) if TEACHER in objective.config.needs else None,
    )
    batch = batch_for(clip, case.rows)
    with Watch() as watch:
        in_flight = step.launch(batch, 1e-4)
        waited = dict(watch.reads)
        in_flight.result()
    found = watch.findings
    if waited:
        found.append(f"the host waits within the step: {waited}")
    if watch.operators < 500:
        found.append(f"only {watch.operators} operators ran on the device")
    return found


def report() -> dict[str, dict[str, list[str]]]:
    """By model and case."""
    found: dict[str, dict[str, list[str]]] = {}
    for model, of_model in groupby(cases(), key=attrgetter("model")):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
            clip = on_mps(model)
            for case in of_model:
                try:
                    said = findings(case, clip)
                except Exception:
                    said = [traceback.format_exc(limit=-6)]
                found.setdefault(model, {})[str(case)] = said
    return found


if __name__ == "__main__":
    json.dump({"steps": report(), "mistakes": mistakes.report()}, sys.stdout)
