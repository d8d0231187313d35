"""/v1/embeddings as OpenAI's own clients use it, and with images."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import pytest

from cliptune.errors import ImageDecodeError, InvalidInputError, RequestTooLargeError
from cliptune_server.gateway.image_urls import ImageUrls, UrlRules, fetch_all
from tests.support import images
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.models import publish_test_model

PNG = images.png("red")
DATA_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


class Pictures(BaseHTTPRequestHandler):
    """A web server with pictures, and with what a web server may do wrong."""

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        if self.path.startswith("/elsewhere"):
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{port}/red.png")
            self.end_headers()
        elif self.path == "/round":
            self.send_response(302)
            self.send_header("Location", "/round")
            self.end_headers()
        elif self.path == "/moved":
            self.send_response(301)
            self.send_header("Location", "/red.png?again")
            self.end_headers()
        elif self.path.startswith("/red.png"):
            self.answer(PNG)
        elif self.path == "/large":
            self.answer(b"x" * 50_000)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()  # neither a length nor an end: until the peer has enough
            try:
                while True:
                    self.wfile.write(b"x" * 4096)
            except OSError:
                pass
        elif self.path == "/silent":
            self.server.stop.wait(20)  # type: ignore[attr-defined]
        else:
            self.send_error(404)

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@contextmanager
def pictures() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as server:
        server.stop = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.stop.set()  # type: ignore[attr-defined]
            server.shutdown()


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with pictures() as address:
        yield address


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    home = tmp_path_factory.mktemp("openai") / "home"
    publish_test_model(home, "shapes", aliases=["prod"], serve=True)
    flags = ("--image-host", "127.0.0.1", "--private-image-hosts")
    with running_daemon(home, flags=flags) as running:
        yield running


@pytest.fixture(scope="module")
def rest(daemon: RunningDaemon) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=daemon.url, timeout=60) as client:
        yield client


def ask(rest: httpx.Client, given: Any, **more: Any) -> Any:
    answer = rest.post("/v1/embeddings", json={"model": "shapes@prod", "input": given, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(rest: httpx.Client, given: Any, **more: Any) -> tuple[int, dict[str, str]]:
    answer = rest.post("/v1/embeddings", json={"model": "shapes@prod", "input": given, **more})
    return answer.status_code, answer.json()["error"]


def test_a_string_a_list_and_an_object_of_text_mean_the_same_in_both_encodings(rest: httpx.Client) -> None:
    rows = [
        ask(rest, given)["data"][0]["embedding"]
        for given in ("a red circle", ["a red circle"], [{"text": "a red circle"}])
    ]
    assert rows[0] == rows[1] == rows[2]
    coded = ask(rest, "a red circle", encoding_format="base64")["data"][0]["embedding"]
    np.testing.assert_array_equal(
        np.frombuffer(base64.b64decode(coded), "<f4"), np.array(rows[0], np.float32)
    )


def test_an_image_is_an_object_a_data_url_or_any_string_of_the_image_modality(rest: httpx.Client) -> None:
    plain = DATA_URL.partition(",")[2]
    rows = [
        ask(rest, given, **more)["data"][0]["embedding"]
        for given, more in (
            ([{"image": DATA_URL}], {}),
            ([DATA_URL], {}),
            (DATA_URL, {"modality": "image"}),
            ([plain], {"modality": "image"}),
        )
    ]
    assert rows[0] == rows[1] == rows[2] == rows[3]
    as_text = ask(rest, [DATA_URL[:200]], modality="text")
    assert as_text["usage"]["texts"] == 1


def test_usage_counts_the_tokens_of_texts_and_the_images_beside_them(rest: httpx.Client) -> None:
    usage = ask(rest, ["a red circle", {"image": DATA_URL}, "crack"])["usage"]
    assert usage == {"prompt_tokens": 8, "total_tokens": 8, "texts": 2, "images": 1}


@pytest.mark.parametrize("tokens", [[1, 2, 3], [[1, 2], [3]]], ids=["one text", "several"])
def test_lists_of_tokens_are_refused_and_told_so(rest: httpx.Client, tokens: list[Any]) -> None:
    status, error = refused(rest, tokens)
    assert (status, error["type"], error["code"]) == (400, "invalid_request_error", "InvalidInputError")
    assert "token numbers are not taken" in error["message"]


@pytest.mark.parametrize(
    ("given", "more", "param"),
    [
        ([{"image": "data:image/png;base64,%%%"}], {}, "input[0].image"),
        (["no base64!"], {"modality": "image"}, "input[0]"),
        ([], {}, "input"),
        ("a", {"dimensions": 7}, "dimensions"),
        ("a", {"dimensions": 0}, "dimensions"),
        ("a", {"modality": "audio"}, "modality"),
        ("a", {"encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_a_wrong_field_is_named_as_openais_clients_read_it(
    rest: httpx.Client, given: Any, more: dict[str, Any], param: str
) -> None:
    status, error = refused(rest, given, **more)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"]


@pytest.mark.parametrize("told", [True, False], ids=["announced", "in parts"])
def test_json_that_would_take_gigabytes_to_parse_is_refused_unread(rest: httpx.Client, told: bool) -> None:
    head = b'{"input": ['
    parts = (head, *(b'"a",' * 262_144 for _ in range(40)))
    body = b"".join(parts) if told else iter(parts)
    try:
        answer = rest.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    except httpx.WriteError:  # the connection ends while the body is still being sent
        return
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "RequestTooLargeError")
    assert "33554432" in answer.json()["detail"]


def test_an_unknown_model_and_an_unknown_priority_are_told_in_the_same_form(rest: httpx.Client) -> None:
    answer = rest.post("/v1/embeddings", json={"model": "nobody", "input": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "ModelNotFoundError")
    hurried = {"X-Priority": "at once"}
    answer = rest.post("/v1/embeddings", json={"model": "shapes", "input": "a"}, headers=hurried)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    bulk = {"X-Priority": "bulk"}
    assert rest.post("/v1/embeddings", json={"input": "a"}, headers=bulk).status_code == 200


def test_an_image_behind_an_address_is_the_image(rest: httpx.Client, web: str) -> None:
    (direct,) = ask(rest, [{"image": DATA_URL}])["data"]
    for given, more in (
        ([{"image": f"{web}/red.png"}], {}),
        (f"{web}/red.png", {"modality": "image"}),
        ([{"image": f"{web}/moved"}], {}),
    ):
        (fetched,) = ask(rest, given, **more)["data"]
        assert fetched["embedding"] == direct["embedding"]


def test_an_image_that_is_not_there_fails_alone(rest: httpx.Client, web: str) -> None:
    answer = ask(rest, [{"image": f"{web}/nothing"}, "a text", {"image": f"{web}/red.png"}])
    assert [row["embedding"] is None for row in answer["data"]] == [True, False, False]
    assert [(each["index"], each["error"]["reason"]) for each in answer["errors"]] == [
        (0, "ImageDecodeError")
    ]
    assert answer["usage"]["images"] == 2
    assert refused(rest, [{"image": f"{web}/nothing"}])[0] == 400


def test_a_plain_string_that_is_an_address_is_a_text(rest: httpx.Client, web: str) -> None:
    assert ask(rest, f"{web}/red.png")["usage"]["texts"] == 1


async def fetched(rules: UrlRules, url: str) -> bytes | ImageDecodeError:
    (found,) = await fetch_all(ImageUrls(rules), [(0, url)])
    return found


LOCAL = UrlRules(hosts=("127.0.0.1",), private=True, limit_bytes=20_000, timeout_s=1.0)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x.png",
        "http://[::1]/x.png",
        "http://[::ffff:127.0.0.1]/x.png",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.8/x.png",
        "http://localhost/x.png",
        "http://0.0.0.0/x.png",
        "http://2130706433/x.png",
    ],
)
async def test_an_address_that_is_not_public_is_not_connected_to(url: str) -> None:
    host = httpx.URL(url).host
    rules = UrlRules(hosts=(host,)) if ":" not in host else UrlRules(hosts=("a",))
    with pytest.raises(InvalidInputError, match=r"not a public address|not fetched from"):
        await fetched(rules, url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://127.0.0.1/x.png", "no http or https"),
        ("http://user:secret@127.0.0.1/x.png", "without a user"),
        ("http://evil.example/x.png", "not fetched from 'evil.example'"),
        ("http://127.0.0.1.evil.example/x.png", "not fetched from"),
        ("http://127.0.0.1:99999/x.png", "is no address"),
        ("http:///x.png", "no http or https"),
    ],
)
async def test_an_address_outside_of_the_rules_is_refused(url: str, why: str) -> None:
    with pytest.raises(InvalidInputError, match=why):
        await fetched(LOCAL, url)


async def test_without_hosts_nothing_is_fetched_and_too_many_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="--image-host"):
        await fetched(UrlRules(), "http://127.0.0.1/x.png")
    many = [(place, "http://127.0.0.1/x.png") for place in range(65)]
    with pytest.raises(RequestTooLargeError):
        await fetch_all(ImageUrls(LOCAL), many)
    with pytest.raises(InvalidInputError, match="port 8080"):
        await fetched(UrlRules(hosts=("example.com",)), "http://example.com:8080/x.png")


def test_a_star_means_what_is_below_a_host_and_not_the_host() -> None:
    rules = UrlRules(hosts=("*.example.com", "images.test"))
    assert rules.allow("a.example.com")
    assert rules.allow("IMAGES.test.")
    assert not rules.allow("example.com")
    assert not rules.allow("badexample.com")
    with pytest.raises(InvalidInputError, match="no host"):
        UrlRules(hosts=("*",))


async def test_a_redirect_is_judged_like_an_address_of_its_own(web: str) -> None:
    with pytest.raises(InvalidInputError, match="not fetched from 'localhost'"):
        await fetched(LOCAL, f"{web}/elsewhere")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("large", "more than 20,000 bytes"),
        ("endless", "more than 20,000 bytes"),
        ("round", "more than 3 redirects"),
        ("silent", "no answer within 1 s"),
        ("nothing", "status 404"),
    ],
)
async def test_what_a_server_does_wrong_is_the_items_error_within_the_limits(
    web: str, path: str, why: str
) -> None:
    found = await fetched(LOCAL, f"{web}/{path}")
    assert isinstance(found, ImageDecodeError)
    assert why in found.message


async def test_a_port_where_nobody_listens_is_the_items_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = await fetched(LOCAL, f"http://127.0.0.1:{taken.getsockname()[1]}/x.png")
    assert isinstance(found, ImageDecodeError)
