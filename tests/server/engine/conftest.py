"""Models that the engine's tests serve: tiny, real, exported once for the session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cliptune_model.clip import Clip, build
from cliptune_model.exported import Manifest, export_model
from cliptune_model.source import ModelSource

torch.set_num_threads(1)


def export_tiny(folder: Path, *, seed: int = 0) -> Clip:
    clip = build(ModelSource(name="cliptune-test-vit"), seed=seed)
    export_model(clip, folder, Manifest.of(clip))
    return clip


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "1"
    export_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "2"
    export_tiny(folder, seed=7)
    return folder
