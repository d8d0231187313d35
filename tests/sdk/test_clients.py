"""Both clients against a real daemon: the same answers, the same errors, the same events."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cliptune import (
    AsyncClient,
    Client,
    CliptuneError,
    DatasetNotFoundError,
    Evaluation,
    Health,
    ImageDecodeError,
    InvalidInputError,
    JobNotFoundError,
    JobPlan,
    JobState,
    JobStateError,
    ModelNotFoundError,
    ModelPublished,
    Progress,
    SpecError,
    StateChange,
    TextError,
    pause,
)
from tests.sdk.conftest import House
from tests.support import images

PNGS = [images.png(seed=seed) for seed in range(4)]
TEXTS = ["a red circle", "a blue square", "a green triangle"]
CLASSES = {"circle": ["a circle", "a round thing"], "square": "a square", "triangle": []}


async def test_inference_answers_alike_sync_and_async(house: House) -> None:
    one = house.client
    async with AsyncClient(house.daemon.grpc) as other:
        for kind, items in (("images", PNGS), ("texts", TEXTS)):
            vectors = getattr(one, f"embed_{kind}")(items, model="shapes@prod")
            again = await getattr(other, f"embed_{kind}")(items, model="shapes@prod")
            assert vectors.dtype == np.float32
            assert vectors.model == again.model == "shapes:1"
            np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
            np.testing.assert_allclose(vectors, again, atol=1e-6)
            np.testing.assert_allclose(vectors, one.embed_many(items, kind, model="shapes"), atol=1e-5)  # type: ignore[arg-type]
            bulk = await other.embed_many(items, kind, model="shapes")  # type: ignore[arg-type]
            np.testing.assert_allclose(vectors, bulk, atol=1e-5)
        found = one.similarity(PNGS, TEXTS, model="shapes")
        assert found.scores.shape == (4, 3)
        np.testing.assert_allclose(
            found.scores, (await other.similarity(PNGS, TEXTS, model="shapes")).scores, atol=1e-6
        )
        expected = one.embed_images(PNGS, model="shapes") @ one.embed_texts(TEXTS, model="shapes").T
        np.testing.assert_allclose(found.scores, expected, atol=1e-5)
        pairs = list(zip(PNGS[:3], TEXTS, strict=True))
        scored = one.score_pairs(pairs, model="shapes")
        np.testing.assert_allclose(scored.scores, np.diag(found.scores[:3]), atol=1e-5)
        np.testing.assert_allclose(
            scored.scores, (await other.score_pairs(pairs, model="shapes")).scores, atol=1e-6
        )
        classified = one.classify(PNGS, CLASSES, model="shapes")
        theirs = await other.classify(PNGS, CLASSES, model="shapes")
        assert classified.labels == theirs.labels == ("circle", "square", "triangle")
        np.testing.assert_allclose(classified.probabilities, theirs.probabilities, atol=1e-5)
        for answer, row in zip(classified, classified.probabilities, strict=True):
            assert answer.label == classified.labels[int(row.argmax())]
            assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)


async def test_a_profile_splits_a_calls_time_by_stage_sync_and_async(house: House) -> None:
    sent = [images.png(seed=seed) for seed in range(200, 270)]  # two requests
    one = house.client.embed_images(sent, model="shapes")
    async with AsyncClient(house.daemon.grpc, priority="bulk") as other:
        again = await other.embed_images(sent, model="shapes")
        pairs = await other.score_pairs([(sent[0], "a circle that nobody asked for")], model="shapes")
    first, second = one.profile, again.profile
    assert first is not None
    assert second is not None
    assert first.total_s > first.daemon_s > first.engine_s > first.forward_s > 0
    assert first.decode_s > 0
    assert first.transport_s == pytest.approx(first.total_s - first.daemon_s)
    assert first.batch_items >= 1
    assert (first.cached_items, second.cached_items) == (0, 70)
    assert second.forward_s == 0
    assert pairs.profile is not None
    assert pairs.profile.cached_items == 1
    assert (one[:1] * 2).profile is None


async def test_a_client_is_refused_a_priority_and_dimensions_that_there_are_not(house: House) -> None:
    with pytest.raises(InvalidInputError, match="urgent"):
        Client(house.daemon.grpc, priority="urgent")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="was trained for 32"):
        house.client.embed_texts(TEXTS, model="shapes", dimensions=8)


async def test_the_same_image_in_every_form_has_the_same_vector(house: House) -> None:
    import torch
    from PIL import Image

    image = images.draw(size=48)
    pixels = np.asarray(image)
    forms: list[Any] = [
        images.encoded(image, "PNG"),
        image,
        pixels,
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        Image.fromarray(pixels),
    ]
    vectors = house.client.embed_images(forms, model="shapes")
    np.testing.assert_allclose(vectors, np.stack([vectors[0]] * len(forms)), atol=1e-5)


BAD: list[tuple[Any, type[CliptuneError]]] = [
    (lambda c: c.embed_images([PNGS[0], b"no image"], model="shapes"), ImageDecodeError),
    (lambda c: c.embed_texts(["a", " "], model="shapes"), TextError),
    (lambda c: c.embed_texts(["a", "\ud800"], model="shapes"), TextError),
    (lambda c: c.embed_texts([], model="shapes"), InvalidInputError),
    (lambda c: c.embed_texts("a", model="shapes"), InvalidInputError),
    (lambda c: c.embed_images(PNGS[0], model="shapes"), InvalidInputError),
    (lambda c: c.classify(PNGS, ["alone"], model="shapes"), InvalidInputError),
    (lambda c: c.embed_texts(["a"], model="nobody"), ModelNotFoundError),
    (lambda c: c.get_model("nobody@prod"), ModelNotFoundError),
    (lambda c: c.get_job("nobody"), JobNotFoundError),
    (lambda c: c.create_job({"name": "x", "modle": {}}), SpecError),
    (lambda c: c.list_jobs(["DREAMING"]), InvalidInputError),
]


@pytest.mark.parametrize("number", range(len(BAD)))
async def test_a_wrong_call_fails_alike_sync_and_async(house: House, number: int) -> None:
    call, kind = BAD[number]
    with pytest.raises(kind) as caught:
        call(house.client)
    async with AsyncClient(house.daemon.grpc) as other:
        with pytest.raises(kind) as again:
            await call(other)
    assert type(caught.value) is type(again.value)
    assert caught.value.message == again.value.message
    assert caught.value.metadata == again.value.metadata


async def test_a_failed_item_is_named_or_returned_and_its_neighbours_are_answered(house: House) -> None:
    mixed: list[Any] = [PNGS[0], b"no image", PNGS[1], "/nowhere.png", images.truncated_jpeg()]
    with pytest.raises(CliptuneError) as caught:
        house.client.embed_images(mixed[:3], model="shapes")
    assert caught.value.metadata["index"] == "1"
    assert caught.value.metadata["count"] == "1"
    async with AsyncClient(house.daemon.grpc) as other:
        whole = house.client.embed_images(PNGS[:2], model="shapes")
        for found in (
            house.client.embed_images(mixed, model="shapes", on_error="return"),
            await other.embed_images(mixed, model="shapes", on_error="return"),
            house.client.embed_many(mixed, model="shapes", on_error="return"),
            await other.embed_many(mixed, model="shapes", on_error="return"),
        ):
            assert [item.index for item in found.errors] == [1, 3, 4]
            assert [type(item.error) for item in found.errors] == [
                ImageDecodeError,
                InvalidInputError,
                ImageDecodeError,
            ]
            np.testing.assert_allclose(found[[0, 2]], whole, atol=1e-5)
    scored = house.client.similarity(mixed, ["a", ""], model="shapes", on_error="return")
    assert np.isfinite(scored.scores).tolist() == [[i in (0, 2), False] for i in range(5)]
    answers = house.client.classify(mixed, ["a", "b"], model="shapes", on_error="return")
    assert [bool(answer.label) for answer in answers] == [True, False, True, False, False]
    with pytest.raises(ImageDecodeError):
        house.client.classify([b"no image"], ["a", "b"], model="shapes", on_error="return")


def test_models_are_listed_aliased_and_unloaded(house: House) -> None:
    client = house.client
    client.wait_ready()
    assert client.health() is Health.SERVING
    model = client.get_model("shapes")
    assert model.reference == "shapes:1"
    assert model.loaded
    assert model in client.list_models("shapes")
    assert "canary" in client.set_alias("shapes:1", "canary").aliases
    assert client.get_model("shapes@canary").version == 1
    client.delete_alias("shapes", "canary")
    assert client.get_model("shapes:1").aliases == ("prod",)
    assert client.load_model("shapes@prod").loaded


async def test_a_job_is_planned_trained_watched_and_refused_alike(house: House) -> None:
    client = house.client
    job = client.create_job(house.spec("clients"), idempotency_key="once")
    assert client.create_job(house.spec("clients"), idempotency_key="once").id == job.id
    events = list(client.watch_job(job.id))
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    kinds = [type(event.body) for event in events]
    for kind in (JobPlan, StateChange, Progress, Evaluation, ModelPublished):
        assert kind in kinds
    assert events[-1].final
    done = client.wait_job(job.id)
    assert done.state is JobState.SUCCEEDED
    assert done.model == "clients:1"
    assert done.plan is not None
    assert done in client.list_jobs(["succeeded"])
    assert done not in client.list_jobs([JobState.RUNNING])

    async with AsyncClient(house.daemon.grpc) as other:
        assert [event async for event in other.watch_job(job.id)] == events
        assert [event.number async for event in other.watch_job(job.id, after=5)] == [
            event.number for event in events[5:]
        ]
        assert await other.wait_job(job.id) == done
        with pytest.raises(JobStateError, match="SUCCEEDED"):
            client.pause_job(job.id)
        with pytest.raises(JobStateError, match="SUCCEEDED"):
            await other.pause_job(job.id)

        with client.session() as session:
            session.watch(job.id, after=2)
            assert list(session) == events[2:]
            with pytest.raises(JobNotFoundError):
                session.watch("nobody")
            with pytest.raises(JobStateError):
                session.control(job.id, pause())
        async with other.session() as session_aio:
            await session_aio.watch(job.id, after=2)
            assert [event async for event in session_aio] == events[2:]
            with pytest.raises(JobNotFoundError):
                await session_aio.watch("nobody")
            with pytest.raises(JobStateError):
                await session_aio.control(job.id, pause())

        await other.delete_job(job.id)
        with pytest.raises(JobNotFoundError):
            client.get_job(job.id)


def test_a_client_finds_the_daemon_of_its_home(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPTUNE_ADDRESS", raising=False)
    monkeypatch.setenv("CLIPTUNE_HOME", str(house.daemon.home))
    with Client() as client:
        assert client.address == house.daemon.grpc
        assert client.list_models()
    monkeypatch.setenv("CLIPTUNE_ADDRESS", "127.0.0.1:9")
    with Client() as client:
        assert client.address == "127.0.0.1:9"
    monkeypatch.delenv("CLIPTUNE_ADDRESS")
    monkeypatch.setenv("CLIPTUNE_HOME", str(house.daemon.home / "nowhere"))
    with Client() as client:
        assert client.address == "127.0.0.1:50051"


async def test_both_clients_see_one_data_set_and_a_job_reads_it_by_its_name(house: House) -> None:
    one = house.client
    made = one.upload_dataset(house.shapes.folder, name="shapes")
    async with AsyncClient(house.daemon.grpc) as other:
        assert (await other.list_datasets()).datasets == one.list_datasets().datasets == (made,)
        found, theirs = one.get_dataset("shapes", samples=2), await other.get_dataset("shapes", samples=2)
        assert found == theirs
        assert found.rows == len(house.shapes.rows)
        assert all(sample.jpeg for sample in found.samples)
        spec = house.spec("by-name")
        spec["data"]["train"] = made.reference
        job = one.create_job(spec, validate_only=True, timeout_s=120)
        assert job.plan is not None
        assert job.plan.train_samples == sum(row["split"] == "train" for row in house.shapes.rows)
        await other.delete_dataset("shapes")
        for call in (one.delete_dataset, one.get_dataset):
            with pytest.raises(DatasetNotFoundError):
                call("shapes")
