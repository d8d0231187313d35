"""From a published base to an adapter that is trained over it, published by itself, and named in requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import cliptune
from cliptune_model.exported import load_exported
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.datasets import write_shapes
from tests.support.models import publish_test_model

TEXTS = ["a red circle", "a drawing of a blue square", "rust"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_shapes(folder).csv.rename(folder / "captions.csv")
    publish_test_model(folder / "home", "base", seed=3)
    return folder


@pytest.fixture(scope="module")
def daemon(folder: Path) -> Iterator[RunningDaemon]:
    with running_daemon(folder / "home", data_roots=[folder]) as daemon:
        yield daemon


@torch.no_grad()
def expected(path: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    clip = load_exported(Path(path))
    return F.normalize(clip.encode_texts(clip.tokenize(TEXTS)), dim=-1).numpy()


def test_an_adapter_is_trained_published_by_itself_and_served_beside_its_base(
    daemon: RunningDaemon, folder: Path
) -> None:
    spec = cliptune.spec_from_mapping(
        {
            "name": "adapted",
            "model": {"name": "registry:base"},
            "data": {"train": str(folder / "captions.csv")},
            "train": {"max_steps": 3, "learning_rate": 0.02},
            "adapter": {"kind": "lora"},
            "publish": {"form": "adapter"},
            "guard": {"off": True},
            "evaluation": {"bootstrap_samples": 0},
            "resources": {"device": "cpu", "threads": 1},
        }
    )
    with cliptune.Client(daemon.grpc) as client:
        job = client.wait_job(client.create_job(spec).id)
        assert job.state == "SUCCEEDED", job.state_reason
        base, adapter = client.load_model("base"), client.get_model("adapted")
        assert adapter.loaded
        assert adapter.bytes < base.bytes / 4
        answers = {
            model.name: np.asarray(client.embed_texts(TEXTS, model=model.name)) for model in (base, adapter)
        }
    for model in (base, adapter):
        np.testing.assert_allclose(answers[model.name], expected(model.path), atol=1e-5)
    assert not np.allclose(answers["base"], answers["adapted"], atol=1e-3)
