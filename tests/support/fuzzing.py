"""Requests of every face in their thousands, good and bad, patient and not, against a real daemon.

Enters: a daemon's addresses and a seed. Leaves: how many requests had which outcome; AssertionError at the
first that was not answered, or answered wrongly. `test_fuzzed_requests.py` sends some, `python -m bench.fuzz`
as many as one likes.

A request is *patient* (its answer must be right), *hurried* (its deadline may be over before: then it must
say so) or *leaving* (its client cancels it).
"""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

import grpc
import httpx
import numpy as np

from cliptune.internal.open_inference import open_inference_pb2 as pb
from cliptune.internal.open_inference import open_inference_pb2_grpc
from cliptune.tensors import unpack
from cliptune.v1 import inference_pb2, inference_pb2_grpc
from cliptune.wire import error_from_rpc
from tests.support.fuzzed_items import Item, Pool, pool
from tests.support.fuzzed_rubbish import grpc_rubbish, rest_rubbish, torn_http

ANSWER_LIMIT_S: Final = 120.0
# What somebody with too little time may be told, and anybody whose daemon has too much to do.
_LATE: Final = {"DeadlineExceededError", "OverloadedError"}
_LATE_STATUS: Final = {429, 503, 504}
_REST_FIELDS: Final = {"encoding_format": "float"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner:
    """How a client asks. `timeout_s`: its deadline; `leaves_s`: when it cancels."""

    name: str = "patient"
    timeout_s: float | None = None
    leaves_s: float | None = None
    bulk: bool = False

    @classmethod
    def any(cls, chance: random.Random) -> Manner:
        """Seven of ten are patient."""
        bulk = chance.random() < 0.3
        drawn = chance.random()
        if drawn < 0.7:
            return cls(bulk=bulk)
        if drawn < 0.85:
            return cls(name="hurried", timeout_s=chance.choice([0.001, 0.01, 0.05, 0.3]), bulk=bulk)
        return cls(name="leaving", leaves_s=chance.uniform(0.0, 0.05), bulk=bulk)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of gRPC."""
        return (("cliptune-priority", "bulk"),) if self.bulk else ()

    @property
    def headers(self) -> dict[str, str]:
        """Of HTTP."""
        said = {"X-Priority": "bulk"} if self.bulk else {}
        return said if self.timeout_s is None else {**said, "X-Request-Timeout-S": str(self.timeout_s)}


class Fuzzer:
    """One run. Its faces take turns by chance."""

    def __init__(self, address: str, url: str, known: Pool) -> None:
        self._channel: Final = grpc.aio.insecure_channel(address)
        self._ours: Final[Any] = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._open: Final[Any] = open_inference_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        limits = httpx.Limits(max_connections=64)
        self._rest: Final = httpx.AsyncClient(base_url=url, timeout=ANSWER_LIMIT_S, limits=limits)
        self._url: Final = httpx.URL(url)
        self._known: Final = known
        self.outcomes: Final[Counter[str]] = Counter()

    async def run(self, requests: int, seed: int, at_a_time: int = 12) -> None:
        """Each request is made from the seed and its number; so many are under way together."""
        numbers = iter(range(requests))

        async def ask() -> None:
            for number in numbers:
                chance = random.Random(f"{seed}/{number}")
                try:
                    async with asyncio.timeout(ANSWER_LIMIT_S):
                        await self._one(chance)
                except asyncio.CancelledError as error:
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise
                    raise AssertionError(f"request {number} of {seed} was cancelled by nobody") from error
                except BaseException as error:
                    error.add_note(f"request {number} of seed {seed}")
                    raise

        try:
            async with asyncio.TaskGroup() as asking:
                for _ in range(at_a_time):
                    asking.create_task(ask())
        finally:
            await self._rest.aclose()
            await self._channel.close()

    async def _one(self, chance: random.Random) -> None:
        manner = Manner.any(chance)
        faces: tuple[Callable[[random.Random, Manner], Coroutine[Any, Any, str]], ...] = (
            self._embed_images,
            self._embed_texts,
            self._similarity,
            self._stream,
            self._embeddings,
            self._upload,
            self._open_grpc,
            self._open_rest,
            self._rubbish,
        )
        face = chance.choice(faces)
        name = face.__name__.strip("_")
        if manner.leaves_s is None:
            outcome = await face(chance, manner)
        else:
            task = asyncio.ensure_future(face(chance, manner))
            done, _ = await asyncio.wait({task}, timeout=manner.leaves_s)
            task.cancel()
            (found,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(found, BaseException) and not isinstance(found, asyncio.CancelledError):
                raise found
            outcome = found if done and isinstance(found, str) else "left"
        self.outcomes[f"{name}: {outcome}"] += 1

    async def _embed_images(self, chance: random.Random, manner: Manner) -> str:
        items = self._known.some(chance, "images")
        request = inference_pb2.EmbedImagesRequest(images=[item.image for item in items if item.image])
        return await self._unary(self._ours.EmbedImages, request, items, manner)

    async def _embed_texts(self, chance: random.Random, manner: Manner) -> str:
        items = self._known.some(chance, "texts")
        request = inference_pb2.EmbedTextsRequest(texts=[item.text for item in items])
        return await self._unary(self._ours.EmbedTexts, request, items, manner)

    async def _unary(self, method: Any, request: Any, items: list[Item], manner: Manner) -> str:
        try:
            answer = await method(request, timeout=manner.timeout_s, metadata=manner.metadata)
        except grpc.aio.AioRpcError as error:
            return _refused(type(error_from_rpc(error)).__name__, items, manner)
        reasons = {failed.index: failed.error.reason for failed in answer.errors}
        for place, (item, row) in enumerate(zip(items, unpack(answer.embeddings), strict=True)):
            item.check(row, reasons.get(place))
        return "answered"

    async def _similarity(self, chance: random.Random, manner: Manner) -> str:
        pictures = [item for item in self._known.some(chance, "images") if item.good]
        texts = [item for item in self._known.some(chance, "texts") if item.good]
        request = inference_pb2.SimilarityRequest(
            images=[item.image for item in pictures if item.image], texts=[item.text for item in texts]
        )
        try:
            answer = await self._ours.Similarity(request, timeout=manner.timeout_s, metadata=manner.metadata)
        except grpc.aio.AioRpcError as error:
            return _refused(type(error_from_rpc(error)).__name__, [*pictures, *texts], manner)
        if pictures and texts:
            wanted_NM = (
                np.stack([np.asarray(item.wanted) for item in pictures])
                @ np.stack([np.asarray(item.wanted) for item in texts]).T
            )
            np.testing.assert_allclose(unpack(answer.scores), wanted_NM, atol=1e-4)
        return "answered"

    async def _stream(self, chance: random.Random, manner: Manner) -> str:
        items = self._known.some(chance, "both", most=24)
        waits = chance.random() < 0.2

        async def requests() -> AsyncIterator[inference_pb2.EmbedStreamRequest]:
            for number, item in enumerate(items):
                if item.image is None:
                    yield inference_pb2.EmbedStreamRequest(id=str(number), text=item.text)
                else:
                    yield inference_pb2.EmbedStreamRequest(id=str(number), image=item.image)
                if waits:
                    await asyncio.sleep(0)

        found: set[int] = set()
        call = self._ours.EmbedStream(requests(), timeout=manner.timeout_s, metadata=manner.metadata)
        try:
            async for answer in call:
                row = unpack(answer.embedding) if answer.HasField("embedding") else None
                reason = answer.error.reason if answer.HasField("error") else None
                assert int(answer.id) not in found, "an item was answered twice"
                found.add(int(answer.id))
                items[int(answer.id)].check(row, reason)
        except grpc.aio.AioRpcError as error:
            if manner.timeout_s is not None and error.details() == "Internal error from Core":
                return "DeadlineExceededError"  # the library's word where it still sends when time is over
            return _refused(type(error_from_rpc(error)).__name__, [], manner)
        finally:
            call.cancel()
        assert found == set(range(len(items))), "items of a stream were not answered"
        return "answered"

    async def _embeddings(self, chance: random.Random, manner: Manner) -> str:
        items = self._known.some(chance, "both")
        body = {"input": [item.json for item in items], **_REST_FIELDS}
        answer = await self._rest.post("/v1/embeddings", json=body, headers=manner.headers)
        return _rest_answer(answer, items, manner)

    async def _upload(self, chance: random.Random, manner: Manner) -> str:
        items = self._known.some(chance, "images", files_only=True)
        files = [("images", (f"{i}", item.image.encoded)) for i, item in enumerate(items) if item.image]
        answer = await self._rest.post("/v1/embed/images", files=files, headers=manner.headers)
        return _rest_answer(answer, items, manner)

    async def _open_grpc(self, chance: random.Random, manner: Manner) -> str:
        items, request = self._open_request(chance)
        try:
            answer = await self._open.ModelInfer(request, timeout=manner.timeout_s, metadata=manner.metadata)
        except grpc.aio.AioRpcError as error:
            return _refused(type(error_from_rpc(error)).__name__, items, manner)
        rows = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(len(items), -1)
        told = answer.parameters["errors"].string_param if "errors" in answer.parameters else "[]"
        reasons = {failed["index"]: failed["reason"] for failed in json.loads(told)}
        for place, item in enumerate(items):
            item.check(rows[place], reasons.get(place))
        return "answered"

    async def _open_rest(self, chance: random.Random, manner: Manner) -> str:
        items, request = self._open_request(chance)
        (given,), (blob,) = request.inputs, request.raw_input_contents
        head = json.dumps(
            {
                "inputs": [
                    {
                        "name": given.name,
                        "datatype": "BYTES",
                        "shape": [len(items)],
                        "parameters": {"binary_data_size": len(blob)},
                    }
                ]
            }
        ).encode()
        headers = {"Inference-Header-Content-Length": str(len(head)), **manner.headers}
        answer = await self._rest.post("/v2/models/shapes/infer", content=head + blob, headers=headers)
        if answer.status_code != 200:
            assert list(answer.json()) == ["error"]
            alone = len(items) == 1 and not items[0].good
            assert answer.status_code in _LATE_STATUS or (alone and answer.status_code in (400, 413))
            return _refused("OverloadedError" if answer.status_code in _LATE_STATUS else "", items, manner)
        body = answer.json()
        reasons = {
            failed["index"]: failed["reason"]
            for failed in json.loads(body.get("parameters", {}).get("errors", "[]"))
        }
        rows = np.array(body["outputs"][0]["data"], dtype=object).reshape(len(items), -1)
        for place, item in enumerate(items):
            row = None if place in reasons else rows[place].astype(np.float32)
            item.check(row, reasons.get(place))
        return "answered"

    def _open_request(self, chance: random.Random) -> tuple[list[Item], pb.ModelInferRequest]:
        kind = chance.choice(["images", "texts"])
        items = self._known.some(chance, kind, files_only=kind == "images")
        elements = [item.text.encode() if item.image is None else item.image.encoded for item in items]
        request = pb.ModelInferRequest(
            model_name="shapes",
            inputs=[
                pb.ModelInferRequest.InferInputTensor(
                    name="image" if kind == "images" else "text", datatype="BYTES", shape=[len(items)]
                )
            ],
            raw_input_contents=[b"".join(struct.pack("<I", len(each)) + each for each in elements)],
        )
        return items, request

    async def _rubbish(self, chance: random.Random, manner: Manner) -> str:
        kind = chance.choice([grpc_rubbish, rest_rubbish, torn_http])
        if kind is grpc_rubbish:
            return await grpc_rubbish(self._channel, chance)
        if kind is rest_rubbish:
            return await rest_rubbish(self._rest, chance)
        return await torn_http(self._url.host, self._url.port or 80, chance)


def _refused(reason: str, items: list[Item], manner: Manner) -> str:
    """A whole request was refused: for want of time or room, or for its only item."""
    if reason in _LATE:
        assert manner.name != "patient" or reason == "OverloadedError", "a patient caller was late"
        return reason
    assert len(items) == 1, f"refused as a whole with {reason}"
    assert not items[0].good, f"a good item was refused with {reason}"
    assert reason in ("", items[0].wanted)
    return "its only item was refused"


def _rest_answer(answer: httpx.Response, items: list[Item], manner: Manner) -> str:
    body = answer.json()
    if answer.status_code != 200:
        return _refused(body["reason"], items, manner)
    reasons = {failed["index"]: failed["error"]["reason"] for failed in body["errors"]}
    assert [row["index"] for row in body["data"]] == list(range(len(items)))
    for place, (item, row) in enumerate(zip(items, body["data"], strict=True)):
        item.check(row["embedding"], reasons.get(place))
    return "answered"


async def fuzz(address: str, url: str, *, requests: int, seed: int) -> Counter[str]:
    """The whole of it: asks for the vectors of what is good, then sends so many requests."""

    def known() -> Pool:
        with grpc.insecure_channel(address) as channel:
            return pool(inference_pb2_grpc.InferenceServiceStub(channel), seed)

    fuzzer = Fuzzer(address, url, await asyncio.to_thread(known))
    await fuzzer.run(requests, seed)
    return fuzzer.outcomes
