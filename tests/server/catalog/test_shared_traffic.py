"""An alias whose requests are shared among versions, and copied to one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from cliptune import Client, ModelNotFoundError, ModelStateError
from cliptune.cli.main import main
from cliptune.errors import InvalidInputError
from cliptune_server.catalog.traffic import Traffic, read_rules, write_rules
from tests.support import images
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.models import publish_test_model

PICTURE = images.png()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("traffic") / "home"
    for seed in (1, 2, 3):
        publish_test_model(home, "shapes", seed=seed)
    publish_test_model(home, "shapes", seed=4, aliases=["prod"], serve=True)
    return home


@pytest.fixture
def daemon(home: Path) -> Iterator[RunningDaemon]:
    with running_daemon(home) as daemon:
        yield daemon


def test_each_version_has_its_share_and_the_aliass_own_the_rest() -> None:
    traffic = Traffic(shares={2: 0.1, 3: 0.25})
    chance = random.Random(5)
    chosen = Counter(traffic.choose(chance.random(), 1) for _ in range(20_000))
    assert {version: round(count / 20_000, 2) for version, count in chosen.items()} == {
        1: 0.65,
        2: 0.1,
        3: 0.25,
    }
    assert Traffic(shares={2: 1.0}).choose(0.999999, 1) == 2
    assert Traffic().choose(0.0, 1) == 1
    assert Traffic.of(traffic.message()) == traffic


@pytest.mark.parametrize(
    "wrong", [{"shares": {2: 0.0}}, {"shares": {2: 0.6, 3: 0.6}}, {"shares": {0: 0.5}}, {"shadow": -1}]
)
def test_shares_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        Traffic(**wrong)  # type: ignore[arg-type]


def test_a_damaged_file_shares_nothing_and_harms_no_other(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    write_rules(tmp_path, "good", {("good", "prod"): Traffic(shares={2: 0.5}), ("other", "x"): Traffic()})
    (tmp_path / "bad" / "traffic.json").write_text('{"prod": {"shares": {"2": 7}}}')
    assert read_rules(tmp_path, ["bad", "good", "none"]) == {("good", "prod"): Traffic(shares={2: 0.5})}


def test_requests_are_shared_copied_remembered_and_the_trial_ends_when_the_alias_moves(
    home: Path, daemon: RunningDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(client: Client) -> set[int]:
        return {model.version for model in client.list_models("shapes") if model.loaded}

    with Client(daemon.grpc) as client:
        own = client.embed_images([PICTURE], model="shapes:4")
        model = client.set_traffic("shapes@prod", {2: 0.5}, shadow=3)
        assert (model.version, model.message.traffic["prod"].shadow_version) == (4, 3)
        assert loaded(client) == {2, 3, 4}
        seen = Counter(client.embed_images([PICTURE], model="shapes@prod").model for _ in range(60))
        assert set(seen) == {"shapes:2", "shapes:4"}
        assert min(seen.values()) > 10
        assert {client.embed_texts(["a"], model="shapes:4").model for _ in range(10)} == {"shapes:4"}
        texts = [f"text {number}" for number in range(200)]
        assert np.isfinite(client.embed_texts(texts, model="shapes@prod")).all()  # four requests, one version

        while 'outcome="ok"' not in (text := httpx.get(f"{daemon.url}/metrics").text):
            pass
        assert 'cliptune_shadow_requests_total{model="shapes:3",outcome="ok"}' in text
        with pytest.raises(ModelStateError):
            client.delete_model("shapes:2")
        with pytest.raises(ModelNotFoundError):
            client.set_traffic("shapes@prod", {9: 0.5})
        with pytest.raises(InvalidInputError, match="no alias"):
            client.set_traffic("shapes", {2: 0.5})
        with pytest.raises(InvalidInputError, match="at most 1"):
            client.set_traffic("shapes@prod", {2: 0.9, 3: 0.9})
    daemon.kill()

    with running_daemon(home) as again, Client(again.grpc) as client:
        assert loaded(client) == {2, 3, 4}
        assert {client.embed_images([PICTURE], model="shapes@prod").model for _ in range(40)} == {
            "shapes:2",
            "shapes:4",
        }
        body = {"shares": {"2": 0.25}}
        card = httpx.put(f"{again.url}/v1/models/shapes/aliases/prod/traffic", json=body).json()
        assert card["traffic"] == {"prod": {"shares": [{"version": 2, "share": 0.25}], "shadow_version": 0}}
        assert loaded(client) == {2, 4}

        command = ["models", "traffic", "shapes@prod", "2=25%", "--shadow", "3", "--address", again.grpc]
        assert main(command) == 0
        assert client.get_model("shapes@prod").message.traffic["prod"].shadow_version == 3
        assert main(["models", "show", "shapes@prod", "--address", again.grpc]) == 0
        assert "of prod's requests 0.25 to 2, copies to 3" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            main(["models", "traffic", "shapes@prod", "2:25", "--address", again.grpc])

        client.set_alias("shapes:2", "prod")
        assert loaded(client) == {2}
        assert not client.get_model("shapes:2").message.traffic
        client.set_alias("shapes:4", "prod")
        np.testing.assert_allclose(client.embed_images([PICTURE], model="shapes@prod"), own, atol=1e-6)
        refused = httpx.put(f"{again.url}/v1/models/shapes/aliases/prod/traffic", json={"share": {}})
        assert refused.status_code == 400


def test_copies_are_few_at_a_time_and_their_failures_are_counted() -> None:
    import asyncio

    from cliptune.errors import UnavailableError
    from cliptune_server.inference.shadowing import Shadowing

    async def run() -> Counter[tuple[str, str]]:
        shadowing, free = Shadowing(), asyncio.Event()

        async def ask() -> object:
            await free.wait()
            raise UnavailableError("gone")

        for _ in range(20):
            shadowing.send("m:2", ask)
        free.set()
        await shadowing.settled()
        return shadowing.outcomes

    assert asyncio.run(run()) == {("m:2", "failed"): 16, ("m:2", "dropped"): 4}
