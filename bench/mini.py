"""What cliptune-mini knows without fine-tuning, and how quick it is, measured on images it never saw.

    python -m bench.mini --data FOLDER      with the tars general_tuxpaint_stamps, general_clipart,
                                            medical_bccd, scientific_nuclei; solar cells: elpv-dataset

Stamps are named among all their distinct captions; no stamp is used for anything else, not even to centre.
Each figure stands beside chance; the interval is Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import csv
import io
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor
from torch.nn import functional as F

from bench.record import Columns, report
from cliptune_model.acceleration.folded import fold
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from cliptune_trainer.demo import elpv

BATCH = 32
Z_95 = 1.959964
TEMPLATES = ("{}", "a photo of {}", "an image of {}")
# What one would write without having seen the data's own captions.
CLASSES = {
    "medical_bccd": {
        "field": "many blood cells in a blood smear",
        "RBC": "a single red blood cell",
        "WBC": "a single white blood cell",
        "Platelets": "a single platelet",
    },
    "scientific_nuclei": {
        "fluorescence": "bright cell nuclei on a black background, fluorescence microscopy",
        "histology": "purple stained tissue, histology",
        "histology_light": "pale stained tissue, histology",
        "brightfield": "grey cells in brightfield microscopy",
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """An image with what is known of it."""

    image: PIL.Image.Image
    caption: str
    label: str


def examples(folder: Path, name: str, splits: Sequence[str]) -> list[Example]:
    """The rows of a data set's tar in these splits."""
    with tarfile.open(folder / f"{name}.tar") as archive:

        def member(path: str) -> bytes:
            file = archive.extractfile(f"{name}/{path}")
            assert file is not None
            return file.read()

        rows = csv.DictReader(io.StringIO(member("captions.csv").decode()))
        return [
            Example(
                image=PIL.Image.open(io.BytesIO(member(row["image"]))).convert("RGB"),
                caption=row["caption"],
                label=row["label"],
            )
            for row in rows
            if row["split"] in splits
        ]


def solar_cells() -> list[Example]:
    """The demo's test split."""
    folder = elpv.installed_folder()
    return [
        Example(
            image=PIL.Image.open(folder / cell.image).convert("RGB"), caption=cell.caption, label=cell.label
        )
        for cell in elpv.read_cells(folder)
        if cell.split == "test"
    ]


@torch.inference_mode()
def image_vectors(clip: Clip, found: Sequence[Example]) -> Tensor:
    """[N, D], unit length."""
    parts = [
        clip.encode_images(torch.stack([clip.preprocess(one.image) for one in found[begin : begin + BATCH]]))
        for begin in range(0, len(found), BATCH)
    ]
    return F.normalize(torch.cat(parts), dim=-1)


@torch.inference_mode()
def text_vectors(clip: Clip, texts: Sequence[str]) -> Tensor:
    """[N, D], unit length."""
    parts = [
        clip.encode_texts(clip.tokenize_trimmed(texts[at : at + 256])) for at in range(0, len(texts), 256)
    ]
    return F.normalize(torch.cat(parts), dim=-1)


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` (Wilson 1927)."""
    middle = (share + Z_95**2 / (2 * count)) / (1 + Z_95**2 / count)
    half = Z_95 / (1 + Z_95**2 / count) * (share * (1 - share) / count + Z_95**2 / (4 * count**2)) ** 0.5
    return middle - half, middle + half


def retrieval(clip: Clip, case: str, found: Sequence[Example]) -> list[Columns]:
    """Both ways, among all distinct captions; every image with the caption counts as right."""
    captions = sorted({one.caption for one in found})
    right_N = torch.tensor([captions.index(one.caption) for one in found])
    scores_NC = image_vectors(clip, found) @ text_vectors(clip, captions).T
    rank_N = (scores_NC > scores_NC.gather(1, right_N[:, None])).sum(1)
    matches_NC = right_N[:, None] == torch.arange(len(captions))
    best_C = scores_NC.masked_fill(~matches_NC, -2.0).amax(0)
    rank_C = ((scores_NC > best_C) & ~matches_NC).sum(0)
    rows: list[Columns] = []
    for way, rank, among in (
        ("image to caption", rank_N, len(captions)),
        ("caption to image", rank_C, len(found)),
    ):
        first, fifth = (float((rank < k).float().mean()) for k in (1, 5))
        low, high = wilson(first, len(rank))
        rows.append(
            {
                "case": f"{case}, {way}",
                "questions": len(rank),
                "among": among,
                "recall@1 %": round(100 * first, 1),
                "low": round(100 * low, 1),
                "high": round(100 * high, 1),
                "recall@5 %": round(100 * fifth, 1),
                "chance@1 %": round(100 / among, 2),
            }
        )
    return rows


def zero_shot(clip: Clip, case: str, found: Sequence[Example], prompts: dict[str, list[str]]) -> Columns:
    """Balanced accuracy: each class by the mean of its prompts' vectors."""
    labels = list(prompts)
    class_KD = torch.stack(
        [F.normalize(text_vectors(clip, prompts[label]).mean(0), dim=-1) for label in labels]
    )
    said = (image_vectors(clip, found) @ class_KD.T).argmax(1).tolist()
    known = [labels.index(one.label) for one in found]
    return {
        "case": case,
        "images": len(found),
        "classes": len(labels),
        "balanced accuracy %": round(100 * float(balanced_accuracy_score(known, said)), 1),
        "chance %": round(100 / len(labels), 1),
    }


def speed(name: str) -> Columns:
    """Seconds until it is ready as the engine serves it, and images a second, decoded already, in batches."""
    began = time.perf_counter()
    clip, _ = fold(build(ModelSource(name=name)))
    ready_s = time.perf_counter() - began
    noise = np.random.default_rng(0).integers(0, 256, (BATCH, 200, 240, 3), dtype=np.uint8)
    batch = torch.stack([clip.preprocess(PIL.Image.fromarray(one)) for one in noise])
    rates = []
    with torch.inference_mode():
        clip.encode_images(batch)
        for _ in range(7):
            began = time.perf_counter()
            clip.encode_images(batch)
            rates.append(BATCH / (time.perf_counter() - began))
    return {"case": name, "ready s": round(ready_s, 2), "images/s": round(sorted(rates)[3], 1)}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the tars")
    parser.add_argument("--model", default="cliptune-mini")
    arguments = parser.parse_args()
    speeds = [speed(arguments.model)]
    clip = build(ModelSource(name=arguments.model))
    rows = [
        *retrieval(
            clip, "stamps", examples(arguments.data, "general_tuxpaint_stamps", ("train", "val", "test"))
        ),
        *retrieval(clip, "clip art, test split", examples(arguments.data, "general_clipart", ("test",))),
    ]
    domains = [
        zero_shot(
            clip,
            name,
            examples(arguments.data, name, ("test",)),
            {label: [template.format(said) for template in TEMPLATES] for label, said in classes.items()},
        )
        for name, classes in CLASSES.items()
    ]
    domains.append(zero_shot(clip, "solar cells (ELPV)", solar_cells(), elpv.class_prompts()))
    report("mini", rows, more={"Zero-shot in three domains": domains, "Speed": speeds})


if __name__ == "__main__":
    main()
