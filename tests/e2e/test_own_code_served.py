"""From a user's file to served answers: trained with, exported, loaded again and compared by; one daemon."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import cliptune
from cliptune_model import own_code
from cliptune_model.clip import Clip
from cliptune_model.exported import export_model, load_exported, manifest_of
from cliptune_model.similarity import Lorentz
from cliptune_model.zero_shot import class_embeddings
from cliptune_server.catalog.model_files import ModelFiles
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.datasets import write_shapes
from tests.support.models import build_test_clip

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "your-own-loss.md"
TEXTS = ["a red circle", "a drawing of a blue square", "rust"]
CLASSES = {"circle": ["a circle", "a drawing of a circle"], "square": ["a square"]}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def curved_clip() -> Clip:
    """A model that has learned something of its hyperboloid."""
    clip = build_test_clip(seed=4)
    similarity = Lorentz(clip.embedding_dim, {"curvature": 0.5})
    with torch.no_grad():
        similarity.log_curvature.add_(0.3)
        similarity.log_text_scale.sub_(0.2)
    return replace(clip, similarity=similarity)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guide presumes, its files and `captions.csv`; and a model of another similarity."""
    folder = tmp_path_factory.mktemp("own")
    write_shapes(folder).csv.rename(folder / "captions.csv")
    (folder / "code").mkdir()
    for block in blocks("python"):
        if named := re.match(r"# (\w+\.py)\n", block):
            (folder / "code" / named[1]).write_text(block)
    (spec,) = (block for block in blocks("toml") if block.startswith("# spec.toml"))
    (folder / "spec.toml").write_text(spec)
    files = ModelFiles(folder / "home" / "models")
    files.root.mkdir(parents=True)
    clip = curved_clip()
    export_model(clip, folder / "export", manifest_of(clip))
    files.publish(folder / "export", name="curved", job_id="", metrics={})
    return folder


@pytest.fixture(scope="module")
def daemon(folder: Path) -> Iterator[RunningDaemon]:
    flags = ["--allow-code", str(folder / "code")]
    with running_daemon(folder / "home", data_roots=[folder], flags=flags) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def client(daemon: RunningDaemon) -> Iterator[cliptune.Client]:
    with cliptune.Client(daemon.grpc) as client:
        yield client


@torch.no_grad()
def assert_answers_by(clip: Clip, client: cliptune.Client, model: str, images: list[Path]) -> None:
    """Every answer of the daemon is what the model's own similarity makes of its towers' features."""
    pixels = torch.stack([clip.preprocess(Image.open(path).convert("RGB")) for path in images])
    image, text = clip.encode_images(pixels), clip.encode_texts(clip.tokenize(TEXTS))
    similarity = clip.similarity

    def close(found: object, expected: Tensor) -> None:
        np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=1e-4, atol=1e-5)

    close(client.embed_images(images, model=model), similarity.image_vectors(image))
    close(client.embed_texts(TEXTS, model=model), similarity.text_vectors(text))
    scored = client.similarity(images, TEXTS, model=model)
    close(scored.scores, similarity(image, text))
    assert scored.logit_scale == pytest.approx(clip.logit_scale)
    close(
        client.score_pairs(list(zip(images, TEXTS, strict=True)), model=model).scores,
        similarity.pairs(image, text),
    )
    scores = similarity(image, class_embeddings(clip, list(CLASSES.items())))
    answers = client.classify(images, CLASSES, model=model)
    close([[answer.scores[label] for label in CLASSES] for answer in answers], scores)
    probabilities = (clip.logit_scale * scores).softmax(dim=1)
    close([[answer.probabilities[label] for label in CLASSES] for answer in answers], probabilities)


def images_of(folder: Path) -> list[Path]:
    return sorted((folder / "images").glob("*.png"))[: len(TEXTS)]


def test_a_model_is_served_by_the_similarity_of_its_manifest(client: cliptune.Client, folder: Path) -> None:
    model = client.load_model("curved")
    assert model.similarity == "lorentz"
    assert model.similarity_parameters["curvature"] == pytest.approx(0.5 * math.exp(0.3))
    assert_answers_by(curved_clip(), client, model.reference, images_of(folder))


def test_the_guides_spec_trains_and_is_served_by_its_own_similarity(
    client: cliptune.Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.wait_job(client.create_job(cliptune.load_spec(folder / "spec.toml")).id)
    assert job.state == "SUCCEEDED", job.state_reason
    told = {decision.subject: decision for decision in job.message.plan.decisions}
    assert told["own loss"].choice == "focal.py:focal"
    assert "gradient as finite differences" in told["own loss"].reason
    model = client.get_model(job.model)
    assert model.similarity == f"{folder / 'code' / 'heavy_tailed.py'}:HeavyTailed"
    assert model.similarity_parameters["degrees"] == pytest.approx(2.0, rel=0.2)
    assert model.similarity_parameters["degrees"] != pytest.approx(2.0, rel=1e-7)  # it has learned

    monkeypatch.setenv(own_code.ENVIRONMENT, str(folder / "code"))
    assert_answers_by(load_exported(Path(model.path)), client, model.reference, images_of(folder))
