"""The Open Inference Protocol over both transports, by its documented wire forms."""

from __future__ import annotations

import io
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from PIL import Image

from cliptune.errors import RequestTooLargeError, TensorError
from cliptune.internal.open_inference import open_inference_pb2 as pb
from cliptune.internal.open_inference import open_inference_pb2_grpc
from cliptune.tensors import unpack
from cliptune.v1 import inference_pb2, inference_pb2_grpc, tensor_pb2
from cliptune.wire import error_from_rpc
from cliptune_server.open_inference.tensors import Tensor
from tests.support import images
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.models import publish_test_model

FILES = [images.png("red"), images.jpeg("blue", "square")]
TEXTS = ["a red circle", "a blue square", "ein grünes Dreieck"]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    home = tmp_path_factory.mktemp("oip") / "home"
    publish_test_model(home, "shapes", aliases=["prod"], serve=True)
    with running_daemon(home) as running:
        yield running


@pytest.fixture(scope="module")
def rest(daemon: RunningDaemon) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=daemon.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def channel(daemon: RunningDaemon) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(daemon.grpc) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> open_inference_pb2_grpc.GRPCInferenceServiceStub:
    return open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def ours(channel: grpc.Channel) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """The vectors of FILES and TEXTS by our own service."""
    service = inference_pb2_grpc.InferenceServiceStub(channel)
    encoded = [tensor_pb2.Image(encoded=file) for file in FILES]
    image = service.EmbedImages(inference_pb2.EmbedImagesRequest(images=encoded))
    text = service.EmbedTexts(inference_pb2.EmbedTextsRequest(texts=TEXTS))
    return {"image": unpack(image.embeddings), "text": unpack(text.embeddings)}


def raw(elements: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(each)) + each for each in elements)


def tensor(name: str, datatype: str, shape: list[int]) -> pb.ModelInferRequest.InferInputTensor:
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)


def both(**more: Any) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(
        model_name="shapes",
        inputs=[tensor("image", "BYTES", [2]), tensor("text", "BYTES", [3, 1])],
        raw_input_contents=[raw(FILES), raw([text.encode() for text in TEXTS])],
        **more,
    )


def outputs(answer: pb.ModelInferResponse) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {
        output.name: np.frombuffer(contents, "<f4").reshape(tuple(output.shape))
        for output, contents in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


def test_server_and_model_describe_themselves_alike_over_both_transports(
    rest: httpx.Client, stub: open_inference_pb2_grpc.GRPCInferenceServiceStub
) -> None:
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="shapes", version="1")).ready
    assert [
        rest.get(f"/v2/{path}").status_code
        for path in (
            "health/live",
            "health/ready",
            "models/shapes/ready",
            "models/shapes/versions/1/ready",
            "models/shapes@prod/ready",
        )
    ] == [200] * 5
    server = stub.ServerMetadata(pb.ServerMetadataRequest())
    assert rest.get("/v2").json() == {
        "name": server.name,
        "version": server.version,
        "extensions": list(server.extensions),
    }
    model = stub.ModelMetadata(pb.ModelMetadataRequest(name="shapes"))
    told = rest.get("/v2/models/shapes").json()
    assert told["versions"] == list(model.versions) == ["1"]
    assert told["inputs"] == [
        {"name": "image", "datatype": "BYTES", "shape": [-1]},
        {"name": "text", "datatype": "BYTES", "shape": [-1]},
    ]
    assert [(each["name"], each["shape"]) for each in told["outputs"]] == [
        (each.name, list(each.shape)) for each in model.outputs
    ]
    assert ("image_embedding", [-1, 32]) in [(each["name"], each["shape"]) for each in told["outputs"]]


def test_raw_contents_over_grpc_give_our_own_vectors(
    stub: open_inference_pb2_grpc.GRPCInferenceServiceStub,
    ours: dict[str, np.ndarray],  # type: ignore[type-arg]
) -> None:
    answer = stub.ModelInfer(both(id="42"))
    assert (answer.model_name, answer.model_version, answer.id) == ("shapes", "1", "42")
    found = outputs(answer)
    assert set(found) == {"image_embedding", "text_embedding"}
    np.testing.assert_allclose(found["image_embedding"], ours["image"], atol=1e-6)
    np.testing.assert_allclose(found["text_embedding"], ours["text"], atol=1e-6)


def test_outputs_are_those_that_are_asked_for(
    stub: open_inference_pb2_grpc.GRPCInferenceServiceStub,
    ours: dict[str, np.ndarray],  # type: ignore[type-arg]
) -> None:
    wanted = [pb.ModelInferRequest.InferRequestedOutputTensor(name="similarity")]
    found = outputs(stub.ModelInfer(both(outputs=wanted)))
    assert list(found) == ["similarity"]
    np.testing.assert_allclose(found["similarity"], ours["image"] @ ours["text"].T, atol=1e-5)


def test_elements_one_by_one_and_pixels_are_taken_too(
    stub: open_inference_pb2_grpc.GRPCInferenceServiceStub,
    ours: dict[str, np.ndarray],  # type: ignore[type-arg]
) -> None:
    texts = tensor("text", "BYTES", [3])
    texts.contents.bytes_contents.extend(text.encode() for text in TEXTS)
    found = outputs(stub.ModelInfer(pb.ModelInferRequest(model_name="shapes", inputs=[texts])))
    np.testing.assert_allclose(found["text_embedding"], ours["text"], atol=1e-6)

    with Image.open(io.BytesIO(FILES[0])) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    shape = [1, *pixels.shape]
    for datatype, array in (("UINT8", pixels), ("FP32", (pixels / 255).astype("<f4"))):
        request = pb.ModelInferRequest(
            model_name="shapes",
            inputs=[tensor("image", datatype, shape)],
            raw_input_contents=[array.tobytes()],
        )
        found = outputs(stub.ModelInfer(request))
        np.testing.assert_allclose(found["image_embedding"], ours["image"][:1], atol=1e-6)


def test_json_and_binary_bodies_over_rest_give_our_own_vectors(
    rest: httpx.Client,
    ours: dict[str, np.ndarray],  # type: ignore[type-arg]
) -> None:
    plain = rest.post(
        "/v2/models/shapes/infer",
        json={"id": "7", "inputs": [{"name": "text", "datatype": "BYTES", "shape": [3], "data": TEXTS}]},
    ).json()
    assert (plain["model_name"], plain["model_version"], plain["id"]) == ("shapes", "1", "7")
    (output,) = plain["outputs"]
    assert (output["datatype"], output["shape"]) == ("FP32", [3, 32])
    np.testing.assert_allclose(np.reshape(output["data"], (3, 32)), ours["text"], atol=1e-6)

    blob = raw(FILES)
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "image",
                    "datatype": "BYTES",
                    "shape": [2],
                    "parameters": {"binary_data_size": len(blob)},
                }
            ],
            "parameters": {"binary_data_output": True, "timeout": 30_000_000, "priority": 2},
        }
    ).encode()
    answer = rest.post(
        "/v2/models/shapes/versions/1/infer",
        content=head + blob,
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    length = int(answer.headers["inference-header-content-length"])
    (output,) = json.loads(answer.content[:length])["outputs"]
    assert output["parameters"]["binary_data_size"] == len(answer.content) - length == 2 * 32 * 4
    rows = np.frombuffer(answer.content[length:], "<f4").reshape(output["shape"])
    np.testing.assert_allclose(rows, ours["image"], atol=1e-6)


def test_a_bad_item_fails_alone_and_the_answer_says_why(
    rest: httpx.Client, stub: open_inference_pb2_grpc.GRPCInferenceServiceStub
) -> None:
    request = pb.ModelInferRequest(
        model_name="shapes",
        inputs=[tensor("image", "BYTES", [2])],
        raw_input_contents=[raw([images.truncated_jpeg(), FILES[0]])],
    )
    answer = stub.ModelInfer(request)
    rows = outputs(answer)["image_embedding"]
    assert [bool(np.isnan(row).all()) for row in rows] == [True, False]
    (told,) = json.loads(answer.parameters["errors"].string_param)
    assert (told["input"], told["index"], told["reason"]) == ("image", 0, "ImageDecodeError")
    texts = [{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["", "fine"]}]
    body = rest.post("/v2/models/shapes/infer", json={"inputs": texts}).json()
    assert body["outputs"][0]["data"][0] is None
    assert json.loads(body["parameters"]["errors"])[0]["reason"] == "TextError"


BAD_REQUESTS: dict[str, tuple[pb.ModelInferRequest, grpc.StatusCode]] = {
    "no input": (pb.ModelInferRequest(model_name="shapes"), grpc.StatusCode.INVALID_ARGUMENT),
    "an unknown input": (
        pb.ModelInferRequest(
            model_name="shapes", inputs=[tensor("INPUT0", "FP32", [1])], raw_input_contents=[b"abcd"]
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "an input twice": (
        pb.ModelInferRequest(
            model_name="shapes",
            inputs=[tensor("text", "BYTES", [1])] * 2,
            raw_input_contents=[raw([b"a"])] * 2,
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "texts as floats": (
        pb.ModelInferRequest(
            model_name="shapes", inputs=[tensor("text", "FP32", [1])], raw_input_contents=[b"abcd"]
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "an unknown datatype": (
        pb.ModelInferRequest(
            model_name="shapes", inputs=[tensor("text", "STRING", [1])], raw_input_contents=[b"abcd"]
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "images of mixed shapes in one tensor": (
        pb.ModelInferRequest(
            model_name="shapes",
            inputs=[tensor("image", "UINT8", [2, 8, 8, 3])],
            raw_input_contents=[bytes(8 * 8 * 3 + 4 * 4 * 3)],
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "images of int64": (
        pb.ModelInferRequest(
            model_name="shapes",
            inputs=[tensor("image", "INT64", [1, 1, 1, 3])],
            raw_input_contents=[bytes(24)],
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "a shape that its elements do not fill": (
        pb.ModelInferRequest(
            model_name="shapes", inputs=[tensor("text", "BYTES", [3])], raw_input_contents=[raw([b"a"])]
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "an element longer than its tensor": (
        pb.ModelInferRequest(
            model_name="shapes",
            inputs=[tensor("text", "BYTES", [1])],
            raw_input_contents=[struct.pack("<I", 2**31) + b"a"],
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "a batch above the limit": (
        pb.ModelInferRequest(
            model_name="shapes",
            inputs=[tensor("text", "BYTES", [4097])],
            raw_input_contents=[raw([b"a"] * 4097)],
        ),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ),
    "an unknown model": (
        pb.ModelInferRequest(
            model_name="nobody", inputs=[tensor("text", "BYTES", [1])], raw_input_contents=[raw([b"a"])]
        ),
        grpc.StatusCode.NOT_FOUND,
    ),
    "a version twice": (
        pb.ModelInferRequest(
            model_name="shapes@prod",
            model_version="1",
            inputs=[tensor("text", "BYTES", [1])],
            raw_input_contents=[raw([b"a"])],
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "an output that there is not": (
        both(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="logits")]),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "raw contents for another number of inputs": (
        pb.ModelInferRequest(
            model_name="shapes",
            inputs=[tensor("text", "BYTES", [1])],
            raw_input_contents=[raw([b"a"]), b""],
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "text that is not UTF-8": (
        pb.ModelInferRequest(
            model_name="shapes", inputs=[tensor("text", "BYTES", [1])], raw_input_contents=[raw([b"\xff"])]
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "a bad image alone": (
        pb.ModelInferRequest(
            model_name="shapes",
            inputs=[tensor("image", "BYTES", [1])],
            raw_input_contents=[raw([images.not_an_image()])],
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_a_status_with_a_message_and_the_same_error_over_rest(
    rest: httpx.Client, stub: open_inference_pb2_grpc.GRPCInferenceServiceStub, name: str
) -> None:
    request, code = BAD_REQUESTS[name]
    with pytest.raises(grpc.RpcError) as failed:
        stub.ModelInfer(request)
    assert failed.value.code() is code  # type: ignore[attr-defined]
    message = error_from_rpc(failed.value).message

    head = json.dumps(
        {
            "inputs": [
                {
                    "name": each.name,
                    "datatype": each.datatype,
                    "shape": list(each.shape),
                    "parameters": {"binary_data_size": len(blob)},
                }
                for each, blob in zip(request.inputs, request.raw_input_contents, strict=False)
            ],
            "outputs": [{"name": each.name} for each in request.outputs],
        }
    ).encode()
    version = f"/versions/{request.model_version}" if request.model_version else ""
    answer = rest.post(
        f"/v2/models/{request.model_name}{version}/infer",
        content=head + b"".join(request.raw_input_contents),
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    if name == "raw contents for another number of inputs":
        assert answer.status_code == 200  # its second blob has no bytes, and says nothing over REST
        return
    wanted = {"NOT_FOUND": 404, "RESOURCE_EXHAUSTED": 413, "INVALID_ARGUMENT": 400}[code.name]
    assert (answer.status_code, answer.json()) == (wanted, {"error": message})


@pytest.mark.parametrize(
    ("content", "headers", "why"),
    [
        (b"{", {}, "not JSON"),
        (b"{}", {}, "inputs"),
        (b'{"inputs": []}', {"Inference-Header-Content-Length": "99"}, "the body has 14 bytes"),
        (b'{"inputs": []}', {"Inference-Header-Content-Length": "-1"}, "Inference-Header-Content-Length"),
        (b'{"inputs": []}rest', {"Inference-Header-Content-Length": "14"}, "belong to no input"),
        (b"\x1f\x8b", {"Content-Encoding": "gzip"}, "uncompressed"),
        (
            b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["%%%"]}]}',
            {},
            "not base64",
        ),
        (
            b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [7]}]}',
            {},
            "is no string",
        ),
        (
            b'{"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1], "data": [256]}]}',
            {},
            "is not UINT8",
        ),
        (
            b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1],'
            b' "parameters": {"binary_data_size": 10}}]}',
            {},
            "bytes follow",
        ),
    ],
)
def test_a_body_that_is_no_request_is_told_in_the_protocols_form(
    rest: httpx.Client, content: bytes, headers: dict[str, str], why: str
) -> None:
    answer = rest.post("/v2/models/shapes/infer", content=content, headers=headers)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert why in answer.json()["error"]


def test_a_model_that_is_not_there_and_an_unknown_path_are_told_in_the_protocols_form(
    rest: httpx.Client, stub: open_inference_pb2_grpc.GRPCInferenceServiceStub
) -> None:
    for path in ("/v2/models/nobody", "/v2/models/nobody/ready", "/v2/nothing"):
        answer = rest.get(path)
        assert (answer.status_code, list(answer.json())) == (404, ["error"])
    with pytest.raises(grpc.RpcError) as failed:
        stub.ModelMetadata(pb.ModelMetadataRequest(name="nobody"))
    assert failed.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


def test_a_body_too_long_is_refused_before_it_is_read(daemon: RunningDaemon) -> None:
    host, _, port = daemon.http.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /v2/models/shapes/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n{"
        )
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413")
    assert answer.endswith(b'{"error": "a request body may hold 268435456 bytes"}')


def test_a_tensor_holds_just_the_elements_of_its_shape() -> None:
    elements = [b"", b"a", b"\x00" * 5]
    found = Tensor.from_raw("text", "BYTES", [3], raw(elements))
    assert (found.elements, found.raw()) == (tuple(elements), raw(elements))
    for shape, blob in (([2], raw(elements)), ([4], raw(elements)), ([3], raw(elements) + b"\x00")):
        with pytest.raises(TensorError):
            Tensor.from_raw("text", "BYTES", shape, blob)
    with pytest.raises(RequestTooLargeError):
        Tensor.from_raw("text", "BYTES", [2**20, 2**10], b"")
    for odd in ([], [-1], [2**40], [1] * 9):
        with pytest.raises(TensorError):
            Tensor.from_raw("text", "FP32", odd, b"")
