"""While the daemon is away safe calls come again, others do not, and streams go on where they were."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from cliptune import AsyncClient, Client, DeadlineExceededError, RequestTooLargeError, UnavailableError
from cliptune.channel import SAFE_METHODS
from cliptune.tensors import pack
from cliptune.v1 import inference_pb2, job_pb2, training_pb2
from cliptune.wire import DETAILS_KEY, status_details
from tests.sdk.peer import LIMIT_BYTES, Peer, away, away_until, events, last_event, running_peer

SPEC = {"name": "a", "model": {"name": "m"}, "data": {"train": "x.csv"}}
JOB = job_pb2.Job(id="j", state=job_pb2.JOB_STATE_RUNNING)
IMAGE = b"\xff\xd8not decoded by this peer"

CALLS: dict[str, Callable[[Client], Any]] = {
    "TrainingService/CreateJob": lambda c: c.create_job(SPEC),
    "TrainingService/GetJob": lambda c: c.get_job("j"),
    "TrainingService/ListJobs": lambda c: c.list_jobs(),
    "TrainingService/DeleteJob": lambda c: c.delete_job("j"),
    "TrainingService/ControlJob": lambda c: c.pause_job("j"),
    "ModelService/ListModels": lambda c: c.list_models(),
    "ModelService/GetModel": lambda c: c.get_model("m"),
    "ModelService/LoadModel": lambda c: c.load_model("m"),
    "ModelService/UnloadModel": lambda c: c.unload_model("m"),
    "ModelService/SetAlias": lambda c: c.set_alias("m:1", "prod"),
    "ModelService/SetTraffic": lambda c: c.set_traffic("m@prod", {2: 0.1}),
    "ModelService/DeleteAlias": lambda c: c.delete_alias("m", "prod"),
    "ModelService/DeleteModel": lambda c: c.delete_model("m:1"),
    "DataService/ListDatasets": lambda c: c.list_datasets(),
    "DataService/GetDataset": lambda c: c.get_dataset("d"),
    "DataService/DeleteDataset": lambda c: c.delete_dataset("d"),
    "InferenceService/EmbedImages": lambda c: c.embed_images([IMAGE]),
    "InferenceService/EmbedTexts": lambda c: c.embed_texts(["a"]),
    "InferenceService/Similarity": lambda c: c.similarity([IMAGE], ["a"]),
    "InferenceService/ScorePairs": lambda c: c.score_pairs([(IMAGE, "a")]),
    "InferenceService/Classify": lambda c: c.classify([IMAGE], ["a", "b"]),
}


@pytest.fixture
def peer() -> Iterator[Peer]:
    with running_peer() as running:
        yield running


def test_only_safe_calls_are_sent_again_while_the_daemon_is_away(peer: Peer) -> None:
    with Client(peer.address, attempts=2) as client:
        for method, call in CALLS.items():
            with pytest.raises(UnavailableError, match="away"):
                call(client)
            assert peer.attempts[method.partition("/")[2]] == (2 if method in SAFE_METHODS else 1), method
    assert set(SAFE_METHODS) < set(CALLS)


async def test_an_error_shows_its_own_traceback_alone_and_keeps_the_failed_call(peer: Peer) -> None:
    with Client(peer.address, attempts=1) as client, pytest.raises(UnavailableError) as caught:
        client.get_job("j")
    async with AsyncClient(peer.address, attempts=1) as other:
        with pytest.raises(UnavailableError) as again:
            await other.get_job("j")
    for error in (caught.value, again.value):
        assert "RpcError" not in "".join(traceback.format_exception(error))
        assert isinstance(error.__context__, grpc.RpcError)


async def test_a_safe_call_succeeds_when_the_daemon_comes_back_sync_and_async(peer: Peer) -> None:
    peer.handlers["GetJob"] = away_until(3, training_pb2.GetJobResponse(job=JOB))
    with Client(peer.address) as client:
        assert client.get_job("j").id == "j"
    assert peer.attempts["GetJob"] == 3
    peer.attempts.clear()
    async with AsyncClient(peer.address) as client_aio:
        assert (await client_aio.get_job("j")).id == "j"
    assert peer.attempts["GetJob"] == 3


def test_one_create_carries_one_idempotency_key_however_often_it_is_sent(peer: Peer) -> None:
    keys: list[str] = []

    def create(request: training_pb2.CreateJobRequest, context: grpc.ServicerContext, attempt: int) -> Any:
        keys.append(request.idempotency_key)
        if attempt < 3:
            away(request, context, attempt)
        return training_pb2.CreateJobResponse(job=JOB)

    peer.handlers["CreateJob"] = create
    with Client(peer.address) as client:
        client.create_job(SPEC)
        client.create_job(SPEC)
    assert len(set(keys[:3])) == 1
    assert keys[0]
    assert keys[3] != keys[0]


def test_a_large_request_is_sent_again_too(peer: Peer) -> None:
    answer = inference_pb2.EmbedImagesResponse(model="m:1", embeddings=pack(np.ones((1, 4), np.float32)))
    peer.handlers["EmbedImages"] = away_until(2, answer)
    with Client(peer.address) as client:
        assert client.embed_images([bytes(8_000_000)]).shape == (1, 4)


def test_a_request_beyond_the_daemon_s_limit_is_an_error_of_its_own_class(peer: Peer) -> None:
    with Client(peer.address) as client, pytest.raises(RequestTooLargeError):
        client.embed_images([bytes(LIMIT_BYTES + 1)])


def test_a_deadline_names_the_call_and_the_time(peer: Peer) -> None:
    def wait_for_the_end(request: Any, context: grpc.ServicerContext, attempt: int) -> Any:
        import threading

        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait(30)
        return training_pb2.GetJobResponse()

    peer.handlers["GetJob"] = wait_for_the_end
    with Client(peer.address) as client, pytest.raises(DeadlineExceededError, match=r"GetJob .* 0\.2 s"):
        client.get_job("j", timeout_s=0.2)


def test_nobody_at_the_address_is_an_error_that_says_what_to_do() -> None:
    with Client("127.0.0.1:1", attempts=1) as client, pytest.raises(UnavailableError) as caught:
        client.list_jobs()
    assert "127.0.0.1:1" in caught.value.message
    assert "cliptune serve" in caught.value.message


def broken_watch(request: Any, context: grpc.ServicerContext, attempt: int) -> Iterator[Any]:
    """Breaks off twice, once repeats what was seen, once leaves a gap."""
    assert request.after_number == {1: 0, 2: 3, 3: 5, 4: 5}[attempt]
    match attempt:
        case 1:
            yield from events(range(1, 4))
            away(request, context, attempt)
        case 2:
            yield from events(range(2, 6))
            away(request, context, attempt)
        case 3:
            yield from events(range(7, 9))
        case _:
            yield from events(range(6, 9))
            yield last_event(9)


async def test_a_watch_that_breaks_misses_nothing_and_repeats_nothing(peer: Peer) -> None:
    peer.handlers["WatchJob"] = broken_watch
    with Client(peer.address) as client:
        assert [event.number for event in client.watch_job("j")] == list(range(1, 10))
    peer.attempts.clear()
    async with AsyncClient(peer.address) as client_aio:
        assert [event.number async for event in client_aio.watch_job("j")] == list(range(1, 10))


def test_a_watch_gives_up_when_the_daemon_stays_away(peer: Peer) -> None:
    def once(request: Any, context: grpc.ServicerContext, attempt: int) -> Iterator[Any]:
        if attempt == 1:
            yield from events(range(1, 3))
        away(request, context, attempt)

    peer.handlers["WatchJob"] = once
    seen = []
    with Client(peer.address) as client, pytest.raises(UnavailableError):
        seen.extend(event.number for event in client.watch_job("j", reconnect_s=0.3))
    assert peer.attempts["WatchJob"] >= 2


class Embedder:
    """Answers a bulk stream backwards in pairs, and loses it after some answers."""

    def __init__(self, *, lose_after: int = 0, fail: frozenset[str] = frozenset()) -> None:
        self.lose_after, self.fail = lose_after, fail
        self.models: list[str] = []
        self.ids: list[int] = []

    def __call__(self, requests: Any, context: grpc.ServicerContext, attempt: int) -> Iterator[Any]:
        held: list[Any] = []
        answered = 0
        for request in requests:
            self.models.append(request.model)
            self.ids.append(int(request.id))
            held.append(request)
            # The first is answered alone, since the client waits for its model.
            if len(held) < 2 and len(self.ids) > 1 and int(request.id) % 5 != 0:
                continue
            yield from (self.one(waiting) for waiting in reversed(held))
            answered += len(held)
            held.clear()
            if attempt == 1 and self.lose_after and answered >= self.lose_after:
                away(requests, context, attempt)
        yield from (self.one(waiting) for waiting in held)

    def one(self, request: Any) -> inference_pb2.EmbedStreamResponse:
        answer = inference_pb2.EmbedStreamResponse(id=request.id, model="m:1")
        if request.text in self.fail:
            answer.error.reason, answer.error.message = "TextError", "not this one"
        else:
            answer.embedding.CopyFrom(pack(np.full(4, float(request.text), np.float32)))
        return answer


@pytest.mark.parametrize("lose_after", [0, 4])
async def test_bulk_answers_come_in_the_input_s_order_also_after_a_lost_stream(
    peer: Peer, lose_after: int
) -> None:
    texts = [str(number) for number in range(37)]
    for asynchronous in (False, True):
        peer.attempts.clear()
        embedder = Embedder(lose_after=lose_after)
        peer.handlers["EmbedStream"] = embedder
        if asynchronous:
            async with AsyncClient(peer.address) as client_aio:
                vectors = await client_aio.embed_many(iter(texts), "texts", max_in_flight=8)
        else:
            with Client(peer.address) as client:
                vectors = client.embed_many(iter(texts), "texts", max_in_flight=8)
        assert vectors[:, 0].tolist() == [float(text) for text in texts]
        assert vectors.model == "m:1"
        # The first request asks for whatever is served, the others for what answered it.
        assert embedder.models[0] == ""
        assert set(embedder.models[1:]) == {"m:1"}
        assert peer.attempts["EmbedStream"] == (2 if lose_after else 1)


async def test_bulk_reads_no_further_ahead_than_its_window(peer: Peer) -> None:
    embedder = Embedder()
    peer.handlers["EmbedStream"] = embedder
    read = 0

    def source() -> Iterator[str]:
        nonlocal read
        for number in range(200):
            read += 1
            yield str(number)

    with Client(peer.address) as client:
        for embedded in client.embed_stream(source(), "texts", max_in_flight=8):
            assert read <= embedded.index + 8 + 8
            if embedded.index == 100:
                break
    assert read < 125


async def test_failed_items_of_a_bulk_are_nan_rows_or_the_first_error(peer: Peer) -> None:
    peer.handlers["EmbedStream"] = Embedder(fail=frozenset({"3", "5"}))
    texts: list[Any] = [str(number) for number in range(9)]
    texts[7] = 7  # not a text: refused before it is sent
    with Client(peer.address) as client:
        vectors = client.embed_many(texts, "texts", on_error="return")
        assert np.isnan(vectors).any(axis=1).tolist() == [i in (3, 5, 7) for i in range(9)]
        assert [item.index for item in vectors.errors] == [3, 5, 7]
        with pytest.raises(Exception, match=r"texts\[\d\]") as caught:
            client.embed_many(texts, "texts")
        assert int(caught.value.metadata["index"]) in (3, 5, 7)  # type: ignore[attr-defined]


async def test_what_the_caller_s_iterator_raises_is_raised_to_the_caller(peer: Peer) -> None:
    peer.handlers["EmbedStream"] = Embedder()

    def broken() -> Iterator[str]:
        yield "1"
        yield "2"
        raise LookupError("no more rows")

    with Client(peer.address) as client, pytest.raises(LookupError, match="no more rows"):
        client.embed_many(broken(), "texts")
    async with AsyncClient(peer.address) as client_aio:
        with pytest.raises(LookupError, match="no more rows"):
            await client_aio.embed_many(broken(), "texts")


def test_a_long_list_goes_out_in_several_requests_of_one_version(peer: Peer) -> None:
    seen: list[tuple[str, int]] = []

    def embed(request: Any, context: grpc.ServicerContext, attempt: int) -> Any:
        seen.append((request.model, len(request.texts)))
        rows = np.array([[float(text)] * 2 for text in request.texts], np.float32)
        return inference_pb2.EmbedTextsResponse(model="m:4", embeddings=pack(rows))

    peer.handlers["EmbedTexts"] = embed
    with Client(peer.address) as client:
        vectors = client.embed_texts([str(number) for number in range(150)], model="m@prod")
    assert vectors[:, 1].tolist() == list(range(150))
    assert seen == [("m@prod", 64), ("m:4", 64), ("m:4", 22)]


def test_a_metadata_rich_error_reaches_the_caller_whole(peer: Peer) -> None:
    from cliptune import SpecError

    def refuse(request: Any, context: grpc.ServicerContext, attempt: int) -> Any:
        error = SpecError("train.epochs is 0", path="train.epochs", allowed=">= 1")
        context.set_trailing_metadata(((DETAILS_KEY, status_details(error)),))
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)

    peer.handlers["CreateJob"] = refuse
    with Client(peer.address) as client, pytest.raises(SpecError) as caught:
        client.create_job(SPEC)
    assert caught.value.metadata == {"path": "train.epochs", "allowed": ">= 1"}
