"""What a daemon serves to somebody who has configured nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from cliptune import Client
from cliptune.embedded import DEFAULT_MODEL as NAME
from cliptune.embedded import WEIGHTS
from cliptune.errors import ModelNotFoundError, ModelStateError
from tests.support.daemon import running_daemon
from tests.support.embedded import write_package
from tests.support.models import build_test_clip, publish_test_model

SERVE = ("--default-model", NAME)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with a tiny model, not yet importable."""
    return write_package(tmp_path / "site", build_test_clip(3), NAME)


def test_a_fresh_daemon_answers_with_the_embedded_model_until_another_is_served(
    package: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    publish_test_model(home, "shapes", seed=5)
    environment = {"PYTHONPATH": str(package.parent)}
    with running_daemon(home, flags=SERVE, environment=environment) as daemon, Client(daemon.grpc) as client:
        first = client.embed_texts(["a cat"])
        assert first.model == f"{NAME}:1"
        clip = build_test_clip(3)
        own = clip.encode_texts(clip.tokenize(["a cat"])).detach().numpy()
        np.testing.assert_allclose(np.asarray(first), own / np.linalg.norm(own), atol=1e-5)
        client.load_model("shapes")
        assert client.embed_texts(["a cat"]).model == "shapes:1"
        with pytest.raises(ModelStateError, match="not loaded"):
            client.embed_texts(["a cat"], model=NAME)
        client.load_model(NAME)  # asked for by name, it stays beside the other
        assert client.embed_texts(["a cat"], model=NAME).model == f"{NAME}:1"
    with running_daemon(home, flags=SERVE, environment=environment) as daemon, Client(daemon.grpc) as client:
        assert [model.version for model in client.list_models(NAME)] == [1]
        assert client.embed_texts(["a cat"], model="shapes").model == "shapes:1"


def test_the_model_that_ships_classifies_an_image_without_being_asked_for(tmp_path: Path) -> None:
    image = PIL.Image.new("RGB", (160, 120), "white")
    PIL.ImageDraw.Draw(image).ellipse((40, 20, 120, 100), fill="red")
    image.save(tmp_path / "circle.png")
    with running_daemon(tmp_path / "home", flags=SERVE) as daemon, Client(daemon.grpc) as client:
        (answer,) = client.classify([tmp_path / "circle.png"], ["a red circle", "a blue circle"])
        assert answer.label == "a red circle"
        assert [model.name for model in client.list_models()] == [NAME]
        assert "folded_towers = on" in daemon.log.read_text()


def test_a_damaged_package_is_not_served_and_the_daemon_says_why(package: Path, tmp_path: Path) -> None:
    path = package / NAME / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    environment = {"PYTHONPATH": str(package.parent)}
    with (
        running_daemon(tmp_path / "home", flags=SERVE, environment=environment) as daemon,
        Client(daemon.grpc) as client,
    ):
        with pytest.raises(ModelStateError, match="no model is loaded"):
            client.embed_texts(["a cat"])
        with pytest.raises(ModelNotFoundError):
            client.load_model(NAME)
        assert "cut short" in daemon.log.read_text()


def test_a_copy_that_was_damaged_after_it_was_taken_in_is_not_served(package: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    environment = {"PYTHONPATH": str(package.parent)}
    with running_daemon(home, flags=SERVE, environment=environment):
        pass
    path = home / "models" / NAME / "1" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.unlink()
    path.write_bytes(content)
    with running_daemon(home, flags=SERVE, environment=environment) as daemon, Client(daemon.grpc) as client:
        with pytest.raises(ModelStateError):
            client.embed_texts(["a cat"])
        assert "SHA-256" in daemon.log.read_text()
