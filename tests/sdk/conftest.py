"""One real daemon with one small loaded model, for all tests of the SDK that need one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cliptune import Client
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.datasets import Shapes, write_shapes
from tests.support.models import publish_test_model


@dataclass(frozen=True, kw_only=True, slots=True)
class House:
    """A running daemon, its data, and a client of it."""

    daemon: RunningDaemon
    shapes: Shapes
    client: Client

    def spec(self, name: str, **train: Any) -> dict[str, Any]:
        """A job of a few steps over the shapes."""
        return {
            "name": name,
            "model": {"name": "cliptune-test-vit"},
            "data": {"train": str(self.shapes.csv), "label_column": "label", "split_column": "split"},
            "train": {"epochs": 1, "batch_size": 6, "learning_rate": 1e-3, **train},
            "publish": {"serve": False},
            "resources": {"device": "cpu", "threads": 1},
        }


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder: Path = tmp_path_factory.mktemp("sdk")
    shapes = write_shapes(folder / "data", rows=16)
    publish_test_model(folder / "home", "shapes", aliases=("prod",), serve=True)
    with (
        running_daemon(folder / "home", data_roots=[folder], flags=["--no-standby"]) as daemon,
        Client(daemon.grpc) as client,
    ):
        yield House(daemon=daemon, shapes=shapes, client=client)
