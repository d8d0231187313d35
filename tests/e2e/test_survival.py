"""What a user keeps when processes are killed: the job, its events, the model, the answers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from cliptune import (
    AsyncClient,
    Client,
    Evaluation,
    JobEvent,
    JobState,
    ModelPublished,
    Progress,
    UnavailableError,
)
from cliptune_model.exported import load_exported
from cliptune_trainer.data.loading.decode import Decoder
from cliptune_trainer.data.loading.images import Normalisation
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.datasets import Shapes, write_shapes

EVENT_LIMIT_S = 120.0


def spec(shapes: Shapes, name: str, steps: int) -> dict[str, object]:
    return {
        "name": name,
        "model": {"name": "cliptune-test-vit"},
        "data": {"train": str(shapes.csv), "label_column": "label", "split_column": "split"},
        "train": {"max_steps": steps, "epochs": steps, "batch_size": 6, "learning_rate": 1e-3},
        "evaluation": {"every_epochs": 0},
        "checkpoint": {"every_steps": 200},
        "publish": {"model": name, "aliases": ["prod"]},
        "resources": {"device": "cpu", "threads": 1},
    }


class Watcher(threading.Thread):
    """Collects a job's events as a user's program would, over whatever happens to the daemon."""

    def __init__(self, client: Client, job_id: str) -> None:
        super().__init__(daemon=True)
        self.client, self.job_id = client, job_id
        self.events: list[JobEvent] = []
        self.changed = threading.Condition()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            for event in self.client.watch_job(self.job_id):
                with self.changed:
                    self.events.append(event)
                    self.changed.notify_all()
        except Exception as error:
            self.error = error

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            return any(isinstance(e.body, Progress) and e.body.step >= step for e in self.events)

        with self.changed:
            assert self.changed.wait_for(reached, EVENT_LIMIT_S), [e.body for e in self.events][-3:]


def engine_of(daemon: RunningDaemon) -> int:
    """Process id of the daemon's engine."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    (pid,) = [
        int(p) for p, parent, args in rows if int(parent) == daemon.pid and "cliptune_server.engine" in args
    ]
    return pid


def embed_until_it_fails(client: Client, image: Path) -> None:
    while True:  # the daemon may take a moment to see the death of its engine
        client.embed_images([image], model="survivor@prod")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module")
def shapes(folder: Path) -> Shapes:
    return write_shapes(folder / "shapes")


@pytest.fixture(scope="module")
def finished(folder: Path, shapes: Shapes) -> Iterator[tuple[RunningDaemon, Watcher]]:
    """A job whose daemon was killed on the way, with its watcher and the daemon that took it back."""
    home = folder / "home"
    with running_daemon(home, data_roots=[folder]) as first:
        port = first.grpc.rpartition(":")[2]
        client = Client(first.grpc)
        watcher = Watcher(client, client.create_job(spec(shapes, "survivor", steps=400)).id)
        watcher.start()
        watcher.wait_for_step(3)
        first.kill()
    with client, running_daemon(home, data_roots=[folder], flags=["--grpc-port", port]) as second:
        watcher.join(EVENT_LIMIT_S)
        assert not watcher.is_alive()
        yield second, watcher


def test_a_watcher_of_a_killed_daemon_misses_nothing_and_sees_nothing_twice(
    finished: tuple[RunningDaemon, Watcher],
) -> None:
    _, watcher = finished
    assert watcher.error is None
    assert [event.number for event in watcher.events] == list(range(1, len(watcher.events) + 1))
    steps = [event.body.step for event in watcher.events if isinstance(event.body, Progress)]
    assert steps == list(range(1, 401)), "the trainer went on by itself: no step was repeated"
    assert {event.attempt for event in watcher.events} <= {0, 1}
    assert any(isinstance(event.body, ModelPublished) for event in watcher.events)
    assert [e.body.occasion for e in watcher.events if isinstance(e.body, Evaluation)] == ["before", "after"]


async def test_fifty_watchers_see_the_same_events(finished: tuple[RunningDaemon, Watcher]) -> None:
    daemon, watcher = finished
    total = len(watcher.events)

    async def numbers(client: AsyncClient, after: int) -> list[int]:
        return [event.number async for event in client.watch_job(watcher.job_id, after=after)]

    async with AsyncClient(daemon.grpc) as client:
        seen = await asyncio.gather(*(numbers(client, after=10 * place) for place in range(50)))
    assert seen == [list(range(10 * place + 1, total + 1)) for place in range(50)]


def test_trainer_server_and_plain_open_clip_agree_on_the_same_bytes(
    finished: tuple[RunningDaemon, Watcher], shapes: Shapes
) -> None:
    daemon, _ = finished
    paths = sorted((shapes.folder / "images").iterdir())[:4]
    texts = ["a red circle", "a blue square"]
    with Client(daemon.grpc) as client:
        folder = Path(client.get_model("survivor@prod").path)
        served_images = client.embed_images(paths, model="survivor@prod")
        served_texts = client.embed_texts(texts, model="survivor@prod")

    plain, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    plain.eval()
    trained = load_exported(folder)
    decode = Decoder.of(trained.preprocess_config)
    normalise = Normalisation.of(trained.preprocess_config, trained.device)
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(path)) for path in paths])
        plain_images = plain.encode_image(pixels, normalize=True).numpy()
        plain_texts = plain.encode_text(tokenizer(texts), normalize=True).numpy()
        decoded = torch.from_numpy(np.stack([decode(path) for path in paths]))
        trainer_images = torch.nn.functional.normalize(
            trained.encode_images(normalise(decoded)), dim=-1
        ).numpy()
    np.testing.assert_allclose(served_images, plain_images, atol=1e-5, rtol=0)
    np.testing.assert_allclose(trainer_images, plain_images, atol=1e-5, rtol=0)
    np.testing.assert_allclose(served_texts, plain_texts, atol=1e-5, rtol=0)


def test_a_killed_engine_is_replaced_and_the_running_job_is_untouched(
    finished: tuple[RunningDaemon, Watcher], shapes: Shapes
) -> None:
    daemon, _ = finished
    image = next((shapes.folder / "images").iterdir())
    with Client(daemon.grpc, attempts=1) as client:
        before = client.embed_images([image], model="survivor@prod")
        watcher = Watcher(client, client.create_job(spec(shapes, "untouched", steps=200)).id)
        watcher.start()
        watcher.wait_for_step(2)
        os.kill(engine_of(daemon), signal.SIGKILL)
        with pytest.raises(UnavailableError):
            embed_until_it_fails(client, image)
        daemon.wait_ready()
        np.testing.assert_array_equal(client.embed_images([image], model="survivor@prod"), before)
        watcher.join(EVENT_LIMIT_S)
        assert not watcher.is_alive()
        assert client.get_job(watcher.job_id).state is JobState.SUCCEEDED
    steps = [event.body.step for event in watcher.events if isinstance(event.body, Progress)]
    assert steps == list(range(1, 201))
