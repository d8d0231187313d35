from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from tests.trainer.daemon import LinkServer
from tests.trainer.jobs import TrainerJob

MakeJob = Callable[..., TrainerJob]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty noisy tiles in three colours, one file a row, two captions a colour; `tiles.csv` names them."""
    folder = tmp_path_factory.mktemp("tiles")
    random = np.random.default_rng(7)
    with (folder / "tiles.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "label", "module"])
        for row in range(60):
            colour = ["red", "green", "blue"][row % 3]
            pixels = random.integers(0, 90, (40, 44, 3), dtype=np.uint8)
            pixels[..., row % 3] += 150
            Image.fromarray(pixels).save(folder / f"{row}.png")
            writer.writerow([f"{row}.png", f"a {colour} tile, number {row % 2}", colour, f"m{row // 5}"])
    return folder


def job_on(
    tiles: Path, folder: Path, name: str = "job", root: Path | None = None, **parts: Any
) -> TrainerJob:
    """A job on the tiles, in a folder of `folder`; keyword arguments replace parts of its spec."""
    spec: dict[str, Any] = {
        "name": name,
        "model": {"name": "cliptune-test-vit"},
        "data": {"train": str(tiles / "tiles.csv"), "label_column": "label", "augmentation": "crop"},
        "train": {"epochs": 5, "batch_size": 8, "learning_rate": 1e-3, "seed": 3},
        "checkpoint": {"every_steps": 4},
        "resources": {"device": "cpu", "threads": 1},
    }
    for part, values in parts.items():
        spec[part] = {**spec.get(part, {}), **values}
    return TrainerJob(folder / name, root or tiles, spec)


@pytest.fixture
def make_job(tmp_path: Path, tiles: Path) -> Iterator[MakeJob]:
    """Makes a job on the tiles; keyword arguments replace parts of its spec."""

    jobs: list[TrainerJob] = []

    def make(name: str = "job", root: Path = tiles, **parts: dict[str, Any]) -> TrainerJob:
        jobs.append(job_on(tiles, tmp_path, name, root, **parts))
        return jobs[-1]

    yield make
    for job in jobs:
        job.end()


@pytest.fixture
def socket() -> Iterator[Path]:
    """A short path: a Unix socket's holds about a hundred characters."""
    with tempfile.TemporaryDirectory(prefix="ct-") as folder:
        yield Path(folder) / "link.sock"


@pytest.fixture
def daemon(socket: Path) -> Iterator[LinkServer]:
    with LinkServer(socket) as server:
        yield server


@pytest.fixture
def clip() -> Clip:
    return build(ModelSource(name="cliptune-test-vit"), seed=1)
