"""Every error as problem+json, through the real app."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import Any

import pytest
from fastapi import FastAPI

from cliptune.errors import CliptuneError, OverloadedError, all_errors, wire_status
from cliptune.wire import PROBLEM_MEDIA_TYPE, error_from_problem
from cliptune_server.gateway.problems import problem_response
from tests.server.gateway.bare import MAX_BODY_BYTES, bare_app, client_of

JSON = {"content-type": "application/json"}
MULTIPART = {"content-type": "multipart/form-data; boundary=x"}


def app_that_raises(error: BaseException) -> FastAPI:
    app = bare_app()

    @app.get("/raise/{place}")
    async def fail(place: str) -> None:
        raise error

    return app


@pytest.mark.parametrize("cls", all_errors().values(), ids=lambda cls: cls.__name__)
async def test_each_error_class_crosses_rest_and_comes_back_as_itself(cls: type[CliptuneError]) -> None:
    error = cls("what was wrong: “ü”", path="train.epochs", limit=3)
    async with client_of(app_that_raises(error)) as client:
        answer = await client.get("/raise/x")
    assert answer.status_code == wire_status(cls).http == answer.json()["status"]
    assert answer.headers["content-type"] == PROBLEM_MEDIA_TYPE
    assert answer.json()["instance"] == "/raise/x"
    back = error_from_problem(answer.json())
    assert type(back) is cls
    assert (back.message, back.metadata) == (error.message, error.metadata)


async def test_a_bug_is_answered_500_without_a_word_of_it_and_logged_with_its_stack(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR):
        async with client_of(app_that_raises(ValueError("secret detail"))) as client:
            answer = await client.get("/raise/x")
    assert answer.status_code == 500
    assert answer.json()["reason"] == "InternalError"
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert "secret detail" in caplog.text


async def test_a_full_disk_is_told_as_such_wherever_it_is_met() -> None:
    async with client_of(app_that_raises(OSError(errno.ENOSPC, "No space left on device"))) as client:
        answer = await client.get("/raise/x")
    assert (answer.status_code, answer.json()["reason"]) == (507, "DiskFullError")


async def test_when_to_come_back_is_told_in_a_header() -> None:
    from cliptune.errors import UnavailableError

    async with client_of(app_that_raises(UnavailableError("away", retry_after_s=2.5))) as client:
        answer = await client.get("/raise/x")
    assert answer.headers["retry-after"] == "3"


async def test_what_takes_longer_than_the_callers_limit_is_cut_off_with_504() -> None:
    app = bare_app()
    cancelled = asyncio.Event()

    @app.get("/endless")
    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with client_of(app) as client:
        answer = await client.get("/endless", headers={"X-Request-Timeout-S": "0.05"})
    assert (answer.status_code, answer.json()["reason"]) == (504, "DeadlineExceededError")
    assert cancelled.is_set()


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", ""])
async def test_a_time_limit_that_is_none_is_refused(value: str) -> None:
    async with client_of(bare_app()) as client:
        answer = await client.get("/v1/jobs", headers={"X-Request-Timeout-S": value})
    assert (answer.status_code, answer.json()["reason"]) == (400, "InvalidInputError")


async def test_an_unknown_path_and_a_wrong_method_are_problems_too() -> None:
    async with client_of(bare_app()) as client:
        unknown = await client.get("/v1/nothing")
        wrong = await client.patch("/v1/jobs")
        deeper = await client.put("/v1/jobs/one")
    assert (unknown.status_code, unknown.json()["reason"]) == (404, "NotFoundError")
    assert wrong.status_code == wrong.json()["status"] == 405
    assert wrong.headers["allow"] == wrong.json()["metadata"]["allowed"] == "GET, POST"
    assert wrong.json()["detail"] == "/v1/jobs does not take PATCH, but GET, POST"
    assert deeper.headers["allow"] == "GET, DELETE"
    assert wrong.headers["content-type"] == PROBLEM_MEDIA_TYPE


BAD_BODIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "no body": ("/v1/embeddings", {}, "body"),
    "no content type": ("/v1/embeddings", {"content": b'{"input": "a"}'}, "Content-Type: application/json"),
    "malformed JSON": ("/v1/embeddings", {"content": b"{bad", "headers": JSON}, "not JSON"),
    "JSON too deep": ("/v1/embeddings", {"content": b"[" * 9000, "headers": JSON}, "recursion"),
    "not UTF-8": ("/v1/embeddings", {"content": b'{"input": "\xff"}', "headers": JSON}, "utf-8"),
    "lone surrogate": ("/v1/embeddings", {"content": b'{"input": "\\ud800"}', "headers": JSON}, "Unicode"),
    "a number beyond all bounds": (
        "/v1/jobs/x/learning-rate",
        {"content": b'{"learning_rate": ' + b"9" * 5000 + b"}", "headers": JSON},
        "",
    ),
    "a yield for too long": ("/v1/jobs/x/yield", {"json": {"seconds": 61}}, "60"),
    "NaN": ("/v1/jobs/x/learning-rate", {"content": b'{"learning_rate": NaN}', "headers": JSON}, "finite"),
    "no input": ("/v1/embeddings", {"json": {"input": []}}, "input is empty"),
    "token numbers": ("/v1/embeddings", {"json": {"input": [1, 2]}}, "input[0]: an input is a text"),
    "an unknown field": ("/v1/similarity", {"json": {"images": [], "texts": [], "modle": ""}}, "modle"),
    "not base64": (
        "/v1/embeddings",
        {"json": {"input": [{"image": "@@@@"}]}},
        "input[0].image is not base64",
    ),
    "base64 of a wrong length": ("/v1/similarity", {"json": {"images": ["a"], "texts": ["b"]}}, "images[0]"),
    "a data URL without base64": (
        "/v1/similarity",
        {"json": {"images": ["data:image/png,x"], "texts": ["b"]}},
        "data URL",
    ),
    "an address": (
        "/v1/similarity",
        {"json": {"images": ["https://example.com/a.jpg"], "texts": ["b"]}},
        "not fetched",
    ),
    "an image that is nothing": ("/v1/similarity", {"json": {"images": [{}], "texts": ["b"]}}, "either"),
    "an image that is a number": ("/v1/similarity", {"json": {"images": [7], "texts": ["b"]}}, "an image is"),
    "a wrong encoding": (
        "/v1/embeddings",
        {"json": {"input": "a", "encoding_format": "hex"}},
        "encoding_format",
    ),
    "a form without its boundary": (
        "/v1/embed/images",
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        "boundary",
    ),
    "a form that is none": ("/v1/embed/images", {"content": b"garbage", "headers": MULTIPART}, "multipart"),
    "a form without images": (
        "/v1/embed/images",
        {"data": {"model": "m"}, "files": {"other": b"x"}},
        "images",
    ),
    "a form without classes": ("/v1/classify", {"files": {"images": b"x"}}, "classes"),
    "a form with classes that are none": (
        "/v1/classify",
        {"files": {"images": b"x"}, "data": {"classes": "[1]"}},
        "classes[0]: a class is",
    ),
    "a form with classes that are no JSON": (
        "/v1/classify",
        {"files": {"images": b"x"}, "data": {"classes": "a,b"}},
        'the field is JSON, such as ["cracked cell", "intact cell"]',
    ),
    "a form with a text for an image": (
        "/v1/classify",
        {"data": {"images": "x", "classes": '["a", "b"]'}, "files": {"more": b"x"}},
        "images[0] is a text",
    ),
    "neither form nor JSON": ("/v1/classify", {"content": b"\xff"}, "JSON"),
    "a state that is none": ("/v1/jobs?state=asleep", {"method": "GET"}, "PREPARING, QUEUED, RUNNING"),
    "a page of nothing": ("/v1/jobs?page_size=0", {"method": "GET"}, "page_size"),
    "a number below all events": ("/v1/jobs/x/events?after=-1", {"method": "GET"}, "after"),
    "an event id that is no number": (
        "/v1/jobs/x/events",
        {"method": "GET", "headers": {"Last-Event-ID": "abc"}},
        "Last-Event-ID",
    ),
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_bad_input_is_told_with_400_and_its_place(name: str) -> None:
    path, request, told = BAD_BODIES[name]
    async with client_of(bare_app()) as client:
        answer = await client.request(request.pop("method", "POST"), path, **request)
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == PROBLEM_MEDIA_TYPE
    assert answer.json()["reason"] in ("InvalidInputError", "TextError")
    assert told in answer.json()["detail"]


async def test_an_unknown_dtype_of_pixels_is_a_tensor_error() -> None:
    pixels = {"pixels": {"data": "AAAA", "dtype": "complex64", "shape": [1, 1, 3]}}
    async with client_of(bare_app()) as client:
        answer = await client.post("/v1/similarity", json={"images": [pixels], "texts": ["a"]})
    assert (answer.status_code, answer.json()["reason"]) == (400, "TensorError")
    assert "float32" in answer.json()["metadata"]["allowed"]


async def test_a_body_beyond_the_limit_is_refused_by_its_length_alone() -> None:
    async def never() -> Any:
        raise AssertionError("the body was read")
        yield b""

    async with client_of(bare_app()) as client:
        answer = await client.post(
            "/v1/embeddings", content=never(), headers={**JSON, "content-length": str(10**12)}
        )
    assert (answer.status_code, answer.json()["reason"]) == (413, "RequestTooLargeError")
    assert answer.json()["metadata"]["limit"] == str(MAX_BODY_BYTES)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/classify", "/v1/embed/images"])
async def test_a_body_that_does_not_tell_its_length_is_read_up_to_the_limit(path: str) -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
        while True:
            sent += 4000
            yield b"x" * 4000

    headers = JSON if path == "/v1/embeddings" else MULTIPART
    async with client_of(bare_app()) as client:
        answer = await client.post(path, content=endless(), headers=headers)
    assert (answer.status_code, answer.json()["reason"]) == (413, "RequestTooLargeError")
    assert sent <= 2 * MAX_BODY_BYTES


@pytest.mark.parametrize(("told", "sent"), [("0.1", "1"), ("2.5", "3"), ("4", "4")])
def test_retry_after_is_never_sooner_than_the_error_says(told: str, sent: str) -> None:
    response = problem_response(OverloadedError("full", retry_after_s=told), "/v1/embeddings")
    assert response.headers["Retry-After"] == sent
