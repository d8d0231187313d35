"""Text towers taught by MiniLM: each sentence's vector is to be the teacher's.

Enters: `corpus.npz`, `mean.npy` and the teacher, from `prepare`. Leaves: `texts.NAME.pt` for each model: its
text weights. Run by `python -m scripts.mini texts`; on a GPU it takes
minutes. Hinton et al. 2015 (distillation) on vectors: cosine, and the similarities within the batch (Park et
al. 2019, relational distillation; the softmax form of Fang et al. 2021, SEED).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.mini import towers
from scripts.mini.bag import RESERVED, Bag, begin_as
from scripts.mini.corpus import Corpus
from scripts.mini.teacher import Teacher, centred, piece_vectors, tokenise
from scripts.mini.token_rows import TokenRows

LENGTHS: Final = (8, 12, 16, 24, 40, towers.CONTEXT)
HELD_OUT: Final = 2000
_RELATION_TEMPERATURE: Final = 0.06
_TOLD_EVERY_S: Final = 60.0
_START, _END = 101, 102  # the teacher's marks
_RELATED: Final = 2048  # texts of a batch whose similarities are compared


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPlan:
    """How long and how fast."""

    batch: int = 4096
    seconds: float = 240.0
    """Of training, for each model; the learning rate follows this clock."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warm_up: int = 100
    """Steps."""
    bag_steps: int = 2500
    bag_batch: int = 512
    bag_learning_rate: float = 2e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Lessons:
    """Tokens and targets, in buckets of like length, on the device."""

    buckets: tuple[tuple[Tensor, Tensor], ...]
    """(tokens [N, L] int32, targets [N, D] fp16) each."""
    held_out: tuple[Tensor, Tensor]
    mean_D: Tensor

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Without end: a bucket drawn by its number of texts, then texts of it."""
        generator = torch.Generator(self.mean_D.device).manual_seed(seed)
        shares = torch.tensor([float(len(tokens)) for tokens, _ in self.buckets])
        while True:
            bucket = int(torch.multinomial(shares, 1))
            tokens_NL, targets_ND = self.buckets[bucket]
            chosen = torch.randint(len(tokens_NL), (size,), generator=generator, device=tokens_NL.device)
            yield tokens_NL[chosen].long(), targets_ND[chosen].float()


def lessons(corpus: Corpus, vectors_ND: Tensor, mean_D: Tensor, device: str) -> Lessons:
    """Every sentence with the teacher's vector of it."""
    targets_ND = towers.widened(centred(vectors_ND, mean_D)).half()
    lengths_N = corpus.pupil.lengths
    rows = np.arange(len(corpus))

    def pupil(chosen: npt.NDArray[np.int64], width: int) -> Tensor:
        return torch.from_numpy(corpus.pupil.padded(chosen, width).astype(np.int32)).to(device)

    buckets = []
    for shorter, length in zip((0, *LENGTHS), LENGTHS, strict=False):
        chosen = rows[(lengths_N > shorter) & (lengths_N <= length) & (rows >= HELD_OUT)]
        if len(chosen):
            buckets.append((pupil(chosen, length), targets_ND[torch.from_numpy(chosen).to(device)]))
    held_out = (pupil(rows[:HELD_OUT], int(lengths_N[:HELD_OUT].max())).long(), targets_ND[:HELD_OUT].float())
    return Lessons(buckets=tuple(buckets), held_out=held_out, mean_D=mean_D)


def word_vectors(prepared: Path, corpus: Corpus, targets_ND: Tensor) -> Tensor:
    """[V, D]: each of CLIP's tokens in the teacher's space.

    The mean of a text's word pieces, as the teacher looks them up, is taken to the teacher's vector of the
    text by ridge regression over the corpus; a token's letters go the same way.
    """
    pieces_PD = piece_vectors(prepared / "teacher").to(targets_ND.device)

    def mean_piece(rows: TokenRows) -> Tensor:
        flat = torch.from_numpy(rows.flat.astype(np.int64)).to(pieces_PD.device)
        begins = torch.from_numpy(rows.starts).to(pieces_PD.device)
        marks = (flat == _START) | (flat == _END)
        summed = F.embedding_bag(flat, pieces_PD, begins, mode="sum", per_sample_weights=(~marks).float())
        return F.normalize(summed, dim=-1)

    met_ND = mean_piece(corpus.teacher)
    eye_DD = torch.eye(met_ND.shape[1], device=met_ND.device)
    map_DD = torch.linalg.solve(met_ND.T @ met_ND + eye_DD, met_ND.T @ targets_ND.float())
    decoder = open_clip.tokenizer.SimpleTokenizer()
    words = [decoder.decode([token]).strip() or "." for token in range(towers.VOCABULARY)]
    vectors_VD: Tensor = mean_piece(tokenise(prepared / "teacher", words)) @ map_DD
    return vectors_VD


def teach_bag(bag: Bag, taught: Lessons, plan: TextPlan) -> None:
    """Train the words in place: cheap, for nothing but sums is computed."""
    words = [bag.content_VC.weight, bag.weight_V1.weight]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SparseAdam(words, lr=plan.bag_learning_rate),
        torch.optim.Adam([bag.projection_CD], lr=plan.bag_learning_rate),
    ]
    for step, (tokens_BL, targets_BD) in enumerate(taught.batches(plan.bag_batch, seed=3)):
        if step == plan.bag_steps:
            break
        rate = plan.bag_learning_rate * 0.5 * (1 + math.cos(math.pi * step / plan.bag_steps))
        loss = distance(bag(tokens_BL), targets_BD)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()


def decayed(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups for AdamW: biases and norms keep their size."""
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def bag_cosine(bag: Bag, taught: Lessons) -> float:
    """Mean cosine to the teacher's vectors on texts held out."""
    tokens_NL, targets_ND = taught.held_out
    return float((bag(tokens_NL) * targets_ND).sum(-1).mean())


def teach(model: Any, taught: Lessons, plan: TextPlan, device: str) -> float:
    """Train the text tower in place. Returns the mean cosine on texts held out."""
    words = model.token_embedding.weight
    others = [
        p for n, p in model.named_parameters() if not n.startswith(("visual.", "logit_")) and p is not words
    ]
    model.token_embedding.sparse = True  # a batch meets few of the words
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SparseAdam([words], lr=plan.learning_rate),
        torch.optim.AdamW(
            decayed(others),
            lr=plan.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=plan.weight_decay,
        ),
    ]
    began_s = told_s = time.monotonic()
    for step, (tokens_BL, targets_BD) in enumerate(taught.batches(plan.batch, seed=2)):
        done = (time.monotonic() - began_s) / plan.seconds
        if done >= 1:
            break
        rate = min(1.0, (step + 1) / plan.warm_up) * max(0.5 * (1 + math.cos(math.pi * done)), 1e-3)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = plan.learning_rate * rate
            optimizer.param_groups[-1]["lr"] = plan.learning_rate * rate
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
            found_BD = towers.encode_text(model, tokens_BL)
        loss = distance(F.normalize(found_BD.float(), dim=-1), targets_BD)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if time.monotonic() - told_s > _TOLD_EVERY_S:
            told_s = time.monotonic()
            cosine = held_out_cosine(model, taught)
            print(f"step {step} {done:.2f} loss {loss.item():.4f} held out {cosine:.4f}", flush=True)
    return held_out_cosine(model, taught)


def distance(found_BD: Tensor, wanted_BD: Tensor) -> Tensor:
    """One less the mean cosine, and how similarities within the batch differ (Kullback-Leibler)."""
    cosine = (found_BD * wanted_BD).sum(-1).mean()
    some_SD, all_BD = found_BD[:_RELATED], wanted_BD[:_RELATED]
    wanted_SS = (all_BD @ all_BD.T / _RELATION_TEMPERATURE).log_softmax(-1)
    found_SS = (some_SD @ all_BD.T / _RELATION_TEMPERATURE).log_softmax(-1)
    return 1 - cosine + 0.3 * F.kl_div(found_SS, wanted_SS, reduction="batchmean", log_target=True)


@torch.no_grad()
def held_out_cosine(model: Any, taught: Lessons) -> float:
    """Mean cosine to the teacher's vectors."""
    tokens_NL, targets_ND = taught.held_out
    found_ND = torch.cat([towers.encode_text(model, part) for part in torch.split(tokens_NL, 1000)])
    return float((F.normalize(found_ND, dim=-1) * targets_ND).sum(-1).mean())


def run(prepared: Path, out: Path, device: str, plan: TextPlan, names: Sequence[str]) -> None:
    """The step: every model named."""
    out.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    corpus = Corpus.read(prepared / "corpus.npz")
    mean_D = torch.from_numpy(np.load(prepared / "mean.npy")).to(device)
    vectors_ND = Teacher(prepared / "teacher", device).embed_tokens(corpus.teacher)
    taught = lessons(corpus, vectors_ND, mean_D, device)
    told = ", ".join(f"{tokens.shape[1]}: {len(tokens)}" for tokens, _ in taught.buckets)
    print(f"lessons after {time.monotonic() - began_s:.0f} s; texts by length: {told}", flush=True)
    begun_VD = word_vectors(prepared, corpus, towers.widened(centred(vectors_ND, mean_D)))
    for name in names:
        torch.manual_seed(0)
        model = towers.build(name).to(device)
        bag = Bag(begun_VD, content=model.token_embedding.weight.shape[1] - RESERVED).to(device)
        print(f"{name}: sums of words begin at cosine {bag_cosine(bag, taught):.4f}", flush=True)
        teach_bag(bag, taught, plan)
        print(f"{name}: and end at {bag_cosine(bag, taught):.4f}", flush=True)
        begin_as(model, bag)
        print(f"{name} begins at cosine {held_out_cosine(model, taught):.4f}", flush=True)
        cosine = teach(model, taught, plan, device)
        print(f"{name}: cosine {cosine:.4f} to the teacher on {HELD_OUT} texts held out", flush=True)
        kept = {
            key: value.half().cpu()
            for key, value in model.state_dict().items()
            if not key.startswith("visual.") and key not in ("logit_scale", "attn_mask")
        }
        torch.save({"weights": kept, "cosine": cosine}, out / f"texts.{name}.pt")
