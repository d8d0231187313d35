"""Models that the engine's tests serve: tiny, real, exported once for the session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import export_test_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "1"
    export_test_model(folder)
    return folder


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "2"
    export_test_model(folder, seed=7)
    return folder
