"""Inference over REST against a real daemon: the same answers as over gRPC, and the same errors.

The last bits of a vector depend on who shared its batch, on either transport; a request of one item has its
batch for itself here, so there the faces must agree bit for bit.
"""

from __future__ import annotations

import base64
import io
import json
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from PIL import Image

from cliptune.errors import all_errors, wire_status
from cliptune.tensors import pack, unpack
from cliptune.v1 import inference_pb2, inference_pb2_grpc, spec_pb2, tensor_pb2
from cliptune.wire import error_from_rpc
from tests.support import images
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.models import publish_test_model

IMAGES = [images.png("red"), images.jpeg("blue", "square"), images.png("green", "triangle", size=97)]
TEXTS = ["a red circle", "a blue square", "ein grünes Dreieck"]
LABELS = ["red", "green", "blue"]
NAN_PIXELS = np.full((8, 8, 3), np.nan, np.float32)
BAD_IMAGES = {
    "no image": (tensor_pb2.Image(encoded=images.not_an_image()), "ImageDecodeError"),
    "no bytes": (tensor_pb2.Image(encoded=b""), "ImageDecodeError"),
    "truncated": (tensor_pb2.Image(encoded=images.truncated_jpeg()), "ImageDecodeError"),
    "bomb": (tensor_pb2.Image(encoded=images.header_only_png(30_000, 30_000)), "ImageSizeError"),
    "0 pixels": (tensor_pb2.Image(encoded=images.header_only_png(0, 10)), "ImageSizeError"),
    "50,000 wide": (tensor_pb2.Image(encoded=images.wide_png()), "ImageSizeError"),
    "0 raw pixels": (tensor_pb2.Image(pixels=pack(np.zeros((0, 8, 3), np.uint8))), "ImageSizeError"),
    "NaN": (tensor_pb2.Image(pixels=pack(NAN_PIXELS)), "TensorError"),
    "bytes that do not fill the shape": (
        tensor_pb2.Image(
            pixels=tensor_pb2.Tensor(data=b"abc", dtype=tensor_pb2.DATA_TYPE_UINT8, shape=[2, 2, 3])
        ),
        "TensorError",
    ),
}
BAD_TEXTS = {"empty": "", "blank": " \n\t", "100,000 characters": "x" * 100_000}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    home = tmp_path_factory.mktemp("rest") / "home"
    publish_test_model(home, "shapes", aliases=["prod"], serve=True)
    with running_daemon(home) as running:
        yield running


@pytest.fixture(scope="module")
def rest(daemon: RunningDaemon) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=daemon.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def rpc(daemon: RunningDaemon) -> Iterator[inference_pb2_grpc.InferenceServiceStub]:
    with grpc.insecure_channel(daemon.grpc) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def as_json(image: tensor_pb2.Image) -> Any:
    """An image as a REST client writes it."""
    if image.WhichOneof("source") == "encoded":
        return b64(image.encoded)
    names = {tensor_pb2.DATA_TYPE_FLOAT32: "float32", tensor_pb2.DATA_TYPE_UINT8: "uint8"}
    pixels = image.pixels
    return {"pixels": {"data": b64(pixels.data), "dtype": names[pixels.dtype], "shape": list(pixels.shape)}}


def encoded_messages() -> list[tensor_pb2.Image]:
    return [tensor_pb2.Image(encoded=data) for data in IMAGES]


def floats(rows: Any) -> bytes:
    return np.array(rows, np.float32).tobytes()


@pytest.mark.parametrize("place", range(3))
def test_one_embedding_equals_the_grpc_answer_bit_for_bit_in_every_form(
    rest: httpx.Client, rpc: inference_pb2_grpc.InferenceServiceStub, place: int
) -> None:
    data, text = IMAGES[place], TEXTS[place]
    images_request = inference_pb2.EmbedImagesRequest(images=[tensor_pb2.Image(encoded=data)])
    image_1D = rpc.EmbedImages(images_request).embeddings.data
    text_1D = rpc.EmbedTexts(inference_pb2.EmbedTextsRequest(texts=[text])).embeddings.data

    def embedded(given: Any, **more: Any) -> Any:
        (row,) = rest.post("/v1/embeddings", json={"input": given, **more}).json()["data"]
        return row["embedding"]

    url = f"data:image/png;base64,{b64(data)}"
    for given in (text, [text], {"text": text}):
        assert floats(embedded(given)) == text_1D
    for given in (
        {"image": url},
        [{"image": b64(data)}],
        {"image": {"encoded": url}},
    ):
        assert floats(embedded(given, model="shapes@prod")) == image_1D
    assert base64.b64decode(embedded({"image": url}, encoding_format="base64")) == image_1D
    uploaded = rest.post("/v1/embed/images", files={"images": ("x", data)}, data={"model": "shapes"}).json()
    assert floats(uploaded["data"][0]["embedding"]) == image_1D
    assert uploaded["usage"] == {"prompt_tokens": 0, "total_tokens": 0, "texts": 0, "images": 1}

    with Image.open(io.BytesIO(data)) as opened:
        raw = tensor_pb2.Image(pixels=pack(np.asarray(opened.convert("RGB"))))
    assert floats(embedded({"image": as_json(raw)})) == image_1D


def test_images_and_texts_come_back_in_the_order_they_were_given(
    rest: httpx.Client, rpc: inference_pb2_grpc.InferenceServiceStub
) -> None:
    image_ND = unpack(rpc.EmbedImages(inference_pb2.EmbedImagesRequest(images=encoded_messages())).embeddings)
    text_ND = unpack(rpc.EmbedTexts(inference_pb2.EmbedTextsRequest(texts=TEXTS)).embeddings)
    given: list[Any] = []
    for text, data in zip(TEXTS, IMAGES, strict=True):
        given += [text, {"image": b64(data)}]
    mixed = rest.post("/v1/embeddings", json={"input": given}).json()
    assert [row["index"] for row in mixed["data"]] == list(range(6))
    rows = [row["embedding"] for row in mixed["data"]]
    np.testing.assert_allclose(rows[0::2], text_ND, atol=1e-6)
    np.testing.assert_allclose(rows[1::2], image_ND, atol=1e-6)
    assert mixed["errors"] == []
    assert mixed["model"] == "shapes:1"
    files = [("images", (f"{i}.png", data)) for i, data in enumerate(IMAGES)]
    uploaded = rest.post("/v1/embed/images", files=files).json()
    np.testing.assert_allclose([row["embedding"] for row in uploaded["data"]], image_ND, atol=1e-6)


def test_similarity_pair_and_classes_of_one_image_equal_the_grpc_answers_bit_for_bit(
    rest: httpx.Client, rpc: inference_pb2_grpc.InferenceServiceStub
) -> None:
    message, string = encoded_messages()[0], b64(IMAGES[0])

    scores = rpc.Similarity(inference_pb2.SimilarityRequest(images=[message], texts=TEXTS[:1]))
    body = rest.post("/v1/similarity", json={"images": [string], "texts": TEXTS[:1]}).json()
    assert floats(body["scores"]) == scores.scores.data
    assert body["logit_scale"] == scores.logit_scale

    pair = inference_pb2.ImageTextPair(image=message, text=TEXTS[0])
    score = rpc.ScorePairs(inference_pb2.ScorePairsRequest(pairs=[pair]))
    body = rest.post("/v1/score-pairs", json={"pairs": [{"image": string, "text": TEXTS[0]}]}).json()
    assert floats(body["scores"]) == score.scores.data

    classes = [spec_pb2.ClassPrompts(label=label) for label in LABELS]
    classes[0].prompts.extend(["something red", "a red thing"])
    told = rpc.Classify(inference_pb2.ClassifyRequest(images=[message], classes=classes))
    wanted = [{"label": "red", "prompts": ["something red", "a red thing"]}, "green", "blue"]
    body = rest.post("/v1/classify", json={"images": [string], "classes": wanted}).json()
    assert body["labels"] == list(told.labels) == LABELS
    assert floats(body["probabilities"]) == told.probabilities.data
    assert floats(body["scores"]) == told.scores.data
    best = int(unpack(told.probabilities)[0].argmax())
    assert body["predictions"] == [{"label": LABELS[best], "probability": body["probabilities"][0][best]}]
    form = rest.post(
        "/v1/classify",
        files={"images": ("x.png", IMAGES[0])},
        data={"classes": json.dumps(wanted), "model": "shapes@prod"},
    )
    assert form.json() == body


def test_matrices_of_many_items_agree_with_grpc(
    rest: httpx.Client, rpc: inference_pb2_grpc.InferenceServiceStub
) -> None:
    messages, strings = encoded_messages(), [b64(data) for data in IMAGES]
    scores = rpc.Similarity(inference_pb2.SimilarityRequest(images=messages, texts=TEXTS))
    body = rest.post("/v1/similarity", json={"images": strings, "texts": TEXTS}).json()
    np.testing.assert_allclose(body["scores"], unpack(scores.scores), atol=1e-6)
    pairs = [{"image": image, "text": text} for image, text in zip(strings, TEXTS, strict=True)]
    body = rest.post("/v1/score-pairs", json={"pairs": pairs}).json()
    np.testing.assert_allclose(body["scores"], unpack(scores.scores).diagonal(), atol=1e-6)


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_alone_is_an_error_of_its_own_class_over_both_transports(
    rest: httpx.Client, rpc: inference_pb2_grpc.InferenceServiceStub, name: str
) -> None:
    image, reason = BAD_IMAGES[name]
    with pytest.raises(grpc.RpcError) as failed:
        rpc.EmbedImages(inference_pb2.EmbedImagesRequest(images=[image]))
    told = error_from_rpc(failed.value)
    assert type(told).__name__ == reason

    answers = [
        rest.post("/v1/embeddings", json={"input": {"image": as_json(image)}}),
        rest.post("/v1/similarity", json={"images": [as_json(image)], "texts": ["a"]}),
        rest.post("/v1/classify", json={"images": [as_json(image)], "classes": LABELS}),
    ]
    if image.WhichOneof("source") == "encoded":
        answers.append(rest.post("/v1/embed/images", files={"images": ("x.png", image.encoded)}))
    assert [answer.status_code for answer in answers] == [wire_status(all_errors()[reason]).http] * len(
        answers
    )
    assert {answer.json()["reason"] for answer in answers} == {reason}
    assert answers[0].json()["detail"] == told.message
    assert answers[0].json()["metadata"] == told.metadata


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_bad_text_alone_is_a_text_error_over_both_transports(
    rest: httpx.Client, rpc: inference_pb2_grpc.InferenceServiceStub, name: str
) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        rpc.EmbedTexts(inference_pb2.EmbedTextsRequest(texts=[BAD_TEXTS[name]]))
    answer = rest.post("/v1/embeddings", json={"input": BAD_TEXTS[name]})
    assert answer.status_code == 400
    assert answer.json()["reason"] == type(error_from_rpc(failed.value)).__name__ == "TextError"


def test_among_neighbours_each_bad_item_fails_alone(
    rest: httpx.Client, rpc: inference_pb2_grpc.InferenceServiceStub
) -> None:
    good = {"image": b64(IMAGES[0])}
    bad = [(name, {"image": as_json(image)}, reason) for name, (image, reason) in BAD_IMAGES.items()]
    bad += [(name, text, "TextError") for name, text in BAD_TEXTS.items()]
    given: list[Any] = [good, TEXTS[0]]
    for _, item, _ in bad:
        given += [item, good, TEXTS[0]]
    body = rest.post("/v1/embeddings", json={"input": given})
    assert body.status_code == 200, body.text
    answer = body.json()
    failed = {error["index"]: error["error"]["reason"] for error in answer["errors"]}
    assert failed == {2 + 3 * i: reason for i, (_, _, reason) in enumerate(bad)}
    assert {error["field"] for error in answer["errors"]} == {"input"}
    rows = [row["embedding"] for row in answer["data"]]
    assert [i for i, row in enumerate(rows) if row is None] == sorted(failed)

    image_D = unpack(
        rpc.EmbedImages(inference_pb2.EmbedImagesRequest(images=encoded_messages()[:1])).embeddings
    )
    np.testing.assert_allclose(rows[0], image_D[0], atol=1e-6)
    np.testing.assert_allclose(rows[3], image_D[0], atol=1e-6)


def test_a_bad_image_beside_a_text_leaves_the_text_its_vector(rest: httpx.Client) -> None:
    body = rest.post("/v1/embeddings", json={"input": [{"image": b64(b"nothing")}, "a red circle"]}).json()
    assert [row["embedding"] is None for row in body["data"]] == [True, False]
    assert [(e["index"], e["error"]["reason"]) for e in body["errors"]] == [(0, "ImageDecodeError")]


def test_matrices_have_null_where_an_item_failed(rest: httpx.Client) -> None:
    both = [b64(IMAGES[0]), b64(b"nothing")]
    body = rest.post("/v1/similarity", json={"images": both, "texts": ["a", ""]}).json()
    assert [[value is None for value in row] for row in body["scores"]] == [[False, True], [True, True]]
    assert {(e["field"], e["index"]) for e in body["errors"]} == {("images", 1), ("texts", 1)}
    body = rest.post("/v1/classify", json={"images": both, "classes": LABELS}).json()
    assert body["probabilities"][1] is body["scores"][1] is body["predictions"][1] is None
    assert sum(body["probabilities"][0]) == pytest.approx(1)


def test_an_unknown_model_and_a_wrong_size_are_told_by_name(rest: httpx.Client) -> None:
    unknown = rest.post("/v1/embeddings", json={"model": "shapez", "input": "a"})
    assert (unknown.status_code, unknown.json()["reason"]) == (404, "ModelNotFoundError")
    assert "shapez" in unknown.json()["detail"]
    assert rest.get("/v1/models/shapes:9").json()["reason"] == "ModelNotFoundError"
    wrong = rest.post("/v1/embeddings", json={"input": "a", "dimensions": 7})
    assert (wrong.status_code, wrong.json()["reason"]) == (400, "InvalidInputError")
    one = rest.post("/v1/classify", json={"images": [b64(IMAGES[0])], "classes": ["only"]})
    assert (one.status_code, one.json()["reason"]) == (400, "InvalidInputError")


def test_the_answers_are_in_openais_form(rest: httpx.Client) -> None:
    models = rest.get("/v1/models").json()
    assert models["object"] == "list"
    card = models["data"][0]
    assert {"id", "object", "created", "owned_by"} <= set(card)
    assert (card["id"], card["object"]) == ("shapes:1", "model")
    assert isinstance(card["created"], int)
    body = rest.post(
        "/v1/embeddings", json={"input": "a", "model": card["id"], "user": "someone", "dimensions": None}
    ).json()
    assert body["object"] == "list"
    assert body["data"][0]["object"] == "embedding"
    assert set(body["usage"]) >= {"prompt_tokens", "total_tokens"}


def test_a_body_too_long_is_refused_before_it_is_sent_and_the_connection_ends(daemon: RunningDaemon) -> None:
    host, _, port = daemon.http.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 999999999999\r\n\r\n{"
        )
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"RequestTooLargeError"' in answer


def test_requests_and_items_show_up_in_the_metrics(rest: httpx.Client) -> None:
    rest.post("/v1/embeddings", json={"input": "a"}).raise_for_status()
    text = rest.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    assert 'cliptune_http_requests_total{method="POST",route="/v1/embeddings",status="200"}' in text.text
    assert 'cliptune_inference_items_total{model="shapes:1",tower="text"}' in text.text
    assert "cliptune_engine_ready 1.0" in text.text
