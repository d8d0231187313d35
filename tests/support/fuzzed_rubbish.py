"""Requests that no client would make: bytes that are no message, claims that are not kept, torn bodies.

Each returns what it was told, after asserting that it was refused as the caller's fault, or that the
connection ended. Used by `fuzzing.py`.
"""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any, Final

import grpc
import httpx

from cliptune.internal.open_inference import open_inference_pb2 as pb
from cliptune.v1 import inference_pb2

_OURS: Final = "/cliptune.v1.InferenceService/"
_OPEN: Final = "/inference.GRPCInferenceService/ModelInfer"
_CALLERS_FAULT: Final = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.FAILED_PRECONDITION,
}
_ANSWER_S: Final = 30.0


async def grpc_rubbish(channel: grpc.aio.Channel, chance: random.Random) -> str:
    """One unary call of bytes."""
    images = inference_pb2.EmbedImagesRequest
    text = pb.ModelInferRequest.InferInputTensor(name="text", datatype="BYTES", shape=[2**40])
    pixels = pb.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=[2**31, 2**31, 3, 3])
    method, body, fault = chance.choice(
        [
            (_OURS + "EmbedImages", chance.randbytes(chance.randint(1, 300)), False),
            (_OURS + "EmbedTexts", b"\x0a\xff\xff\xff\xff\x0f", False),
            (_OPEN, chance.randbytes(chance.randint(1, 300)), False),
            (_OURS + "Nothing", b"", True),
            (_OURS + "EmbedImages", images(model="nobody@prod").SerializeToString(), True),
            (_OURS + "EmbedImages", images(model="a:b:c@@").SerializeToString(), True),
            (
                _OURS + "EmbedTexts",
                inference_pb2.EmbedTextsRequest(texts=["a"] * 4097).SerializeToString(),
                True,
            ),
            (
                _OURS + "EmbedTexts",
                inference_pb2.EmbedTextsRequest(texts=["a"], dimensions=7).SerializeToString(),
                True,
            ),
            (
                _OPEN,
                pb.ModelInferRequest(
                    model_name="shapes", inputs=[text], raw_input_contents=[b"abcd"]
                ).SerializeToString(),
                True,
            ),
            (
                _OPEN,
                pb.ModelInferRequest(
                    model_name="shapes", inputs=[pixels], raw_input_contents=[b"abcd"]
                ).SerializeToString(),
                True,
            ),
        ]
    )
    call: Any = channel.unary_unary(method)
    code = await call(body, timeout=_ANSWER_S).code()
    assert code is not grpc.StatusCode.DEADLINE_EXCEEDED, "rubbish was not answered"
    assert code is not grpc.StatusCode.UNAVAILABLE, "rubbish ended the connection"
    taken = not fault and code is grpc.StatusCode.OK  # some bytes are a message by chance
    assert taken or code in _CALLERS_FAULT, f"{method} {body[:80]!r}: {code}"
    return f"rubbish, {code.name}"


async def rest_rubbish(rest: httpx.AsyncClient, chance: random.Random) -> str:
    """One HTTP request with a whole body."""
    many = json.dumps({"input": ["a"] * 4097})
    path, body, kind = chance.choice(
        [
            ("/v1/embeddings", chance.randbytes(chance.randint(0, 300)), "application/json"),
            ("/v1/embeddings", b'{"input": ', "application/json"),
            ("/v1/embeddings", b'{"input": [[1, 2, 3]]}', "application/json"),
            ("/v1/embeddings", b'{"input": {"image": "%%%"}}', "application/json"),
            ("/v1/embeddings", b'{"input": "a", "encoding_format": "hex"}', "application/json"),
            ("/v1/embeddings", b'{"input": "a", "model": "../../etc"}', "application/json"),
            ("/v1/embeddings", b'{"input": {"image": "http://169.254.169.254/"}}', "application/json"),
            ("/v1/embeddings", b"[" * 5000, "application/json"),
            ("/v1/embeddings", many.encode(), "application/json"),
            (
                "/v1/embeddings",
                b'{"input": {"image": {"pixels": {"data": "", "dtype": "uint8", "shape": [9999999999]}}}}',
                "application/json",
            ),
            ("/v1/embed/images", b"--x\r\nnothing", "multipart/form-data; boundary=x"),
            ("/v1/embed/images", b"", "multipart/form-data"),
            ("/v1/similarity", b'{"images": "a", "texts": 7}', "application/json"),
            ("/v2/models/shapes/infer", chance.randbytes(chance.randint(1, 300)), "application/json"),
            (
                "/v2/models/shapes/infer",
                b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1099511627776], "data": []}]}',
                "application/json",
            ),
            (
                "/v2/models/shapes/infer",
                b'{"inputs": [{"name": "image", "datatype": "FP64", "shape": [1], "data": [1.5]}]}',
                "application/json",
            ),
            ("/v2/models/nobody/infer", b'{"inputs": []}', "application/json"),
            ("/v3/nothing", b"{}", "application/json"),
        ]
    )
    answer = await rest.post(path, content=body, headers={"Content-Type": kind})
    assert 400 <= answer.status_code < 500, f"{path} {body[:80]!r}: {answer.status_code} {answer.text}"
    answer.json()
    return f"rubbish, {answer.status_code}"


async def torn_http(host: str, port: int, chance: random.Random) -> str:
    """A connection that says too much, too little, or goes in the middle."""
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    given, whole = chance.choice(
        [
            (head + b"Content-Length: 999999999999\r\n\r\n{", True),
            (head + b"Content-Length: 1000000000\r\n\r\n" + b" " * 1000, True),
            (head + b"Content-Length: 5000\r\n\r\n{", False),
            (head + b"Transfer-Encoding: chunked\r\n\r\nffffff\r\n{", False),
            (head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", True),
            (head + b"Content-Length: -5\r\n\r\n", True),
            (head[: chance.randint(1, len(head) - 1)], False),
            (chance.randbytes(400) + b"\r\n\r\n", True),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", True),
        ]
    )
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(given)
        await writer.drain()
        if not whole:
            return "torn, left"
        async with asyncio.timeout(_ANSWER_S):
            answer = await reader.read(64)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer
        return "torn, refused"
    except ConnectionError:
        return "torn, refused"
    finally:
        writer.transport.abort()
