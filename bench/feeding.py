"""What `bench.loader` measures: a loader alone, a peer, and a step that they feed.

Apart from it, because decoding processes import the main module again and need no torch.
"""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from bench.record import Columns, Row
from bench.turns import medians
from cliptune_model.acceleration.compiled import compile_towers
from cliptune_model.acceleration.lean import choose_lean, make_lean
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip, build
from cliptune_model.machine.synchronize import synchronize
from cliptune_model.source import ModelSource
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.forms.reader import read_table
from cliptune_trainer.data.loading.loader import Batch, Loader
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.image.augment import NAMED
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.spec import DataConfig
from cliptune_trainer.steps.optim import build_optimizer
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.step import Step

# Until every process has started and what was decoded ahead is used up.
_WARM_BATCHES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is fed, from where. `table` names single files with the images of `shards`."""

    model: str
    batch_size: int
    device: str
    shards: Path
    table: Path
    augmentation: str
    repetitions: int

    def pairs(self) -> Pairs:
        """The rows of the shards."""
        config = DataConfig(train=str(self.shards))
        return Pairs(read_table(config.train, config, DataRoots()).pairs)


def loader_rates(setting: Setting, workers: Sequence[int], images: int) -> list[Row]:
    """Images a second without a step, by the number of processes."""
    clip = build(ModelSource(name=setting.model), device=setting.device)
    pairs = setting.pairs()
    rows = []
    for count in workers:
        sides = {
            "fast": lambda count=count: _ours(setting, clip, pairs, count, images, exact=False),
            "exact": lambda count=count: _ours(setting, clip, pairs, count, images, exact=True),
            "peer": lambda count=count: _theirs(setting, clip, count, images),
        }
        found = medians(sides, setting.repetitions, warm=0)
        rows += [
            Row(
                case=f"{side} decode, processes: {count}",
                ours=found[side],
                peer=found["peer"],
                peer_name="open_clip's CSV data set in torch's DataLoader",
                unit="images/s",
            )
            for side in ("fast", "exact")
        ]
    return rows


def fed_steps(setting: Setting, workers: int, steps: int) -> list[Columns]:
    """Pairs a second of whole steps, on batches that lie ready and on those of the loader."""
    cuda = setting.device == "cuda"
    clip = build(ModelSource(name=setting.model), device=setting.device)
    make_lean(clip, choose_lean(clip))
    compile_towers(clip, Choice(subject="compile", value="on" if cuda else "off", reason="the benchmark's"))
    precision = Precision("bf16" if cuda else "fp32", setting.device)
    optimizer = build_optimizer(clip.model, learning_rate=1e-6, weight_decay=0.1)
    step = Step(clip, Objective(), optimizer, precision, clip_norm=1.0)
    clip.model.train()
    pairs = setting.pairs()

    def rate(*, ready: bool, exact: bool = False) -> float:
        with _loader(setting, clip, pairs, 1 if ready else workers, exact=exact) as loader:
            batches: Iterator[Batch] = loader.batches(0, _WARM_BATCHES + steps)
            if ready:
                one = next(batches)
                whole = replace(one, images_B3HW=one.images_B3HW[:])
                batches = itertools.repeat(whole, _WARM_BATCHES + steps)
            for _ in range(_WARM_BATCHES):
                step(next(batches), 1e-6)
            # As the loop does: a step's outcome is read when the next one is on its way.
            began, before = time.perf_counter(), None
            for batch in batches:
                launched = step.launch(batch, 1e-6)
                if before is not None:
                    before.result()
                before = launched
            synchronize(setting.device)
            return setting.batch_size * steps / (time.perf_counter() - began)

    rate(ready=True)  # compiles
    found = medians(
        {
            "ready": lambda: rate(ready=True),
            "fast": lambda: rate(ready=False),
            "exact": lambda: rate(ready=False, exact=True),
        },
        setting.repetitions,
        warm=0,
    )
    return [
        {
            "model": setting.model,
            "batch": setting.batch_size,
            "decode": decode,
            "processes": workers,
            "from_shards_per_s": found[decode],
            "ready_batches_per_s": found["ready"],
            "share": round(found[decode] / found["ready"], 4),
        }
        for decode in ("fast", "exact")
    ]


def _loader(setting: Setting, clip: Clip, pairs: Pairs, workers: int, *, exact: bool) -> Loader:
    return Loader(
        pairs,
        clip,
        batch_size=setting.batch_size,
        seed=0,
        augmentation=NAMED[setting.augmentation],
        exact=exact,
        workers=workers,
    )


def _ours(setting: Setting, clip: Clip, pairs: Pairs, workers: int, images: int, *, exact: bool) -> float:
    steps = max(images // setting.batch_size, 1)
    with _loader(setting, clip, pairs, workers, exact=exact) as loader:
        return _rate(loader.batches(0, _WARM_BATCHES + steps), setting, steps)


def _theirs(setting: Setting, clip: Clip, workers: int, images: int) -> float:
    steps = max(images // setting.batch_size, 1)
    data = CsvDataset(setting.table, clip, crop=setting.augmentation == "crop")
    batches = DataLoader(
        data,
        batch_size=setting.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=setting.device == "cuda",
        persistent_workers=workers > 0,  # for more than an epoch
    )
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    return _rate(itertools.islice(endless, _WARM_BATCHES + steps), setting, steps)


def _rate(batches: Iterator[object], setting: Setting, steps: int) -> float:
    for _ in range(_WARM_BATCHES):
        next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    return setting.batch_size * steps / (time.perf_counter() - began)


class CsvDataset(TorchDataset[tuple[Tensor, Tensor]]):
    """As `open_clip_train.data.CsvDataset`, which needs packages that are not installed here: it opens,
    transforms and tokenises one row after another."""

    def __init__(self, table: Path, clip: Clip, *, crop: bool) -> None:
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        self._images, self._captions = [row["image"] for row in rows], [row["caption"] for row in rows]
        self._transform = image_transform_v2(PreprocessCfg(**clip.preprocess_config), is_train=crop)
        self._tokenise = clip.tokenizer

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self._transform(Image.open(self._images[row])), self._tokenise([self._captions[row]])[0]
