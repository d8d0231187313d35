"""ModelService on a real daemon with a real engine: load, alias, swap under load, remember."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from cliptune.errors import InvalidInputError, ModelNotFoundError, ModelStateError
from cliptune.tensors import unpack
from cliptune.v1 import inference_pb2, inference_pb2_grpc, model_pb2, model_pb2_grpc, tensor_pb2
from cliptune.wire import error_from_rpc
from tests.support import images
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.models import publish_test_model

PICTURE = tensor_pb2.Image(encoded=images.png())


class Client:
    """Bare stubs of one daemon; errors come as our own classes."""

    def __init__(self, daemon: RunningDaemon) -> None:
        self.channel = grpc.insecure_channel(daemon.grpc)
        self.models = model_pb2_grpc.ModelServiceStub(self.channel)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)

    def embed(self, model: str) -> tuple[str, Any]:
        request = inference_pb2.EmbedImagesRequest(model=model, images=[PICTURE])
        try:
            answer = self.inference.EmbedImages(request, timeout=60)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        return answer.model, unpack(answer.embeddings)[0]

    def call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self.models, method)(request, timeout=120)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None

    def load(self, model: str) -> model_pb2.Model:
        return self.call("LoadModel", model_pb2.LoadModelRequest(model=model)).model

    def unload(self, model: str) -> model_pb2.Model:
        return self.call("UnloadModel", model_pb2.UnloadModelRequest(model=model)).model

    def alias(self, model: str, alias: str) -> model_pb2.Model:
        return self.call("SetAlias", model_pb2.SetAliasRequest(model=model, alias=alias)).model

    def loaded(self) -> set[str]:
        models = self.call("ListModels", model_pb2.ListModelsRequest()).models
        return {f"{model.name}:{model.version}" for model in models if model.loaded}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    home = tmp_path_factory.mktemp("models") / "home"
    for seed in (1, 2, 3):
        publish_test_model(home, "shapes", seed=seed)
    publish_test_model(home, "spare", seed=4, aliases=["prod"])
    with running_daemon(home) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: RunningDaemon) -> Iterator[Client]:
    """A client of a daemon that serves nothing, whatever the test before left."""
    client = Client(daemon)
    for key in client.loaded():
        client.unload(key)
    with client.channel:
        yield client


def test_models_are_listed_newest_first_with_what_their_manifests_say(client: Client) -> None:
    models = client.call("ListModels", model_pb2.ListModelsRequest(name="shapes")).models
    assert [model.version for model in models] == [3, 2, 1]
    one = client.call("GetModel", model_pb2.GetModelRequest(model="shapes:1")).model
    assert one == models[-1]
    assert (one.architecture, one.embedding_dim, one.image_size) == ("cliptune-test-vit", 32, 32)
    assert one.bytes > 1_000_000
    assert one.created.seconds > 1_700_000_000
    assert (Path(one.path) / "open_clip_config.json").is_file()
    assert (one.loaded, one.device, list(one.aliases)) == (False, "", [])


def test_a_loaded_model_answers_under_each_of_its_names(client: Client) -> None:
    loaded = client.load("spare@prod")
    assert (loaded.loaded, loaded.device, list(loaded.aliases)) == (True, "cpu", ["prod"])
    answers = [client.embed(name) for name in ("spare@prod", "spare:1", "spare", "")]
    assert {key for key, _ in answers} == {"spare:1"}
    for _, vector in answers:
        np.testing.assert_array_equal(vector, answers[0][1])


def test_several_versions_are_served_at_once_and_differ(client: Client) -> None:
    client.load("shapes:1")
    client.load("shapes:2")
    assert client.loaded() == {"shapes:1", "shapes:2"}
    first, second = client.embed("shapes:1"), client.embed("shapes:2")
    assert (first[0], second[0]) == ("shapes:1", "shapes:2")
    assert not np.allclose(first[1], second[1])
    assert client.embed("shapes")[0] == "shapes:2"
    with pytest.raises(InvalidInputError, match="shapes:1, shapes:2"):
        client.embed("")


def test_a_model_that_is_not_served_is_refused_with_the_reason(client: Client) -> None:
    with pytest.raises(ModelStateError, match="no model is loaded"):
        client.embed("")
    with pytest.raises(ModelStateError, match="cliptune models load shapes:1"):
        client.embed("shapes:1")
    for missing in ("nothing", "shapes:9", "shapes@prod"):
        with pytest.raises(ModelNotFoundError):
            client.embed(missing)
        with pytest.raises(ModelNotFoundError):
            client.load(missing)
    with pytest.raises(InvalidInputError):
        client.embed("shapes:one")
    with pytest.raises(ModelStateError, match="not loaded"):
        client.unload("shapes:1")


def test_an_alias_that_moves_swaps_the_version_without_failing_a_request(client: Client) -> None:
    client.alias("shapes:1", "live")
    client.load("shapes@live")
    answered: list[str] = []
    failures: list[BaseException] = []
    swapped = threading.Event()
    progress = threading.Condition()

    def call_until_swapped() -> None:
        while not swapped.is_set():
            try:
                key, _ = client.embed("shapes@live")
            except BaseException as error:
                failures.append(error)
                return
            with progress:
                answered.append(key)
                progress.notify_all()

    callers = [threading.Thread(target=call_until_swapped) for _ in range(4)]
    for caller in callers:
        caller.start()
    try:
        for version in (2, 3, 1, 2):
            key = f"shapes:{version}"
            with progress:
                count = len(answered)
                assert progress.wait_for(lambda count=count: len(answered) >= count + 8 or failures, 60)
            assert list(client.alias(key, "live").aliases) == ["live"]
            assert client.embed("shapes@live")[0] == key
            assert client.loaded() == {key}
    finally:
        swapped.set()
        for caller in callers:
            caller.join()
    assert not failures
    assert set(answered) == {"shapes:1", "shapes:2", "shapes:3"}


def test_a_bulk_stream_keeps_its_version_until_it_ends(client: Client) -> None:
    client.alias("shapes:1", "live")
    client.load("shapes@live")
    requests: queue.SimpleQueue[inference_pb2.EmbedStreamRequest | None] = queue.SimpleQueue()
    stream = client.inference.EmbedStream(iter(requests.get, None), timeout=120)

    def ask(model: str) -> str:
        requests.put(inference_pb2.EmbedStreamRequest(id="1", model=model, image=PICTURE))
        answer = next(stream)
        assert not answer.error.message, answer.error
        return answer.model

    assert ask("shapes@live") == "shapes:1"
    client.alias("shapes:2", "live")
    assert client.loaded() == {"shapes:2"}
    assert client.embed("shapes@live")[0] == "shapes:2"
    assert [ask("shapes@live"), ask("shapes:1")] == ["shapes:1", "shapes:1"]
    with pytest.raises(ModelStateError, match="a bulk stream still uses it"):
        client.call("DeleteModel", model_pb2.DeleteModelRequest(model="shapes:1"))

    client.load("shapes:1")  # it has not left the engine
    assert client.embed("shapes:1")[0] == "shapes:1"
    unloading = threading.Thread(target=client.unload, args=("shapes:1",))
    unloading.start()
    while "shapes:1" in client.loaded():
        pass
    with pytest.raises(ModelStateError):
        client.embed("shapes:1")
    assert ask("shapes@live") == "shapes:1"
    assert unloading.is_alive()
    requests.put(None)
    assert list(stream) == []
    unloading.join(60)
    assert not unloading.is_alive()


def test_a_version_that_was_loaded_by_number_stays_when_an_alias_leaves_it(client: Client) -> None:
    client.alias("shapes:1", "live")
    client.load("shapes:1")
    client.alias("shapes:2", "live")
    assert client.loaded() == {"shapes:1", "shapes:2"}


def test_an_alias_that_nobody_serves_moves_without_loading_anything(client: Client) -> None:
    client.alias("shapes:1", "idle")
    client.alias("shapes:3", "idle")
    assert client.loaded() == set()
    assert client.call("GetModel", model_pb2.GetModelRequest(model="shapes@idle")).model.version == 3
    client.call("DeleteAlias", model_pb2.DeleteAliasRequest(name="shapes", alias="idle"))
    with pytest.raises(ModelNotFoundError):
        client.call("GetModel", model_pb2.GetModelRequest(model="shapes@idle"))


def test_a_loaded_or_aliased_version_is_not_deleted(client: Client, daemon: RunningDaemon) -> None:
    def delete(reference: str) -> None:
        client.call("DeleteModel", model_pb2.DeleteModelRequest(model=reference))

    with pytest.raises(ModelStateError, match="spare@prod"):
        delete("spare:1")
    client.load("spare:1")
    with pytest.raises(ModelStateError, match="loaded"):
        delete("spare:1")
    with pytest.raises(InvalidInputError, match="NAME:VERSION"):
        delete("spare")
    client.unload("spare")
    client.call("DeleteAlias", model_pb2.DeleteAliasRequest(name="spare", alias="prod"))
    delete("spare:1")
    assert not (daemon.home / "models" / "spare" / "1").exists()
    with pytest.raises(ModelNotFoundError):
        delete("spare:1")


def test_what_was_served_is_served_again_after_a_kill(tmp_path: Path) -> None:
    home = tmp_path / "home"
    publish_test_model(home, "shapes", seed=1, aliases=["prod"])
    publish_test_model(home, "shapes", seed=2)
    with running_daemon(home) as daemon:
        client = Client(daemon)
        client.load("shapes@prod")
        before = client.embed("shapes@prod")
        client.channel.close()
        daemon.kill()
    with running_daemon(home) as daemon:
        client = Client(daemon)
        assert client.loaded() == {"shapes:1"}
        key, vector = client.embed("shapes@prod")
        assert key == "shapes:1"
        np.testing.assert_array_equal(vector, before[1])
        client.channel.close()
