"""Images and texts, good and broken, each with what must come of it.

Made from a seed, so that the same seed asks the same. A good item's vector is asked for once, alone; among
others its last bits may differ. Used by `fuzzing.py`.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cliptune.tensors import pack, unpack
from cliptune.v1 import inference_pb2, inference_pb2_grpc, tensor_pb2
from tests.support import images
from tests.support.images import COLOURS, SHAPES, caption

Vector = npt.NDArray[np.float32]
_TOLERANCE = 2e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image or text. `wanted`: its [D] vector, or the class of its error."""

    image: tensor_pb2.Image | None = None
    text: str = ""
    wanted: Vector | str = ""

    @property
    def good(self) -> bool:
        """It has a vector."""
        return not isinstance(self.wanted, str)

    def check(self, row: Any, reason: str | None) -> None:
        """`row`: its vector or None or NaN; `reason`: the class of its error. AssertionError."""
        if isinstance(self.wanted, str):
            assert reason == self.wanted, f"{self.wanted} was wanted, {reason} was told"
            assert row is None or np.isnan(row).all()
        else:
            assert reason is None, f"a good item failed with {reason}"
            np.testing.assert_allclose(np.asarray(row, np.float32), self.wanted, atol=_TOLERANCE)

    @property
    def json(self) -> Any:
        """As an input of /v1/embeddings."""
        if self.image is None:
            return self.text
        if self.image.WhichOneof("source") == "encoded":
            return {"image": base64.b64encode(self.image.encoded).decode()}
        pixels = self.image.pixels
        name = {tensor_pb2.DATA_TYPE_FLOAT32: "float32", tensor_pb2.DATA_TYPE_UINT8: "uint8"}
        data = base64.b64encode(pixels.data).decode()
        shape = list(pixels.shape)
        return {"image": {"pixels": {"data": data, "dtype": name[pixels.dtype], "shape": shape}}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """All that requests are made of."""

    images: Sequence[Item]
    texts: Sequence[Item]

    def some(
        self, chance: random.Random, kind: str, *, most: int = 6, files_only: bool = False
    ) -> list[Item]:
        """A few items; `kind`: "images", "texts" or "both". Most are good."""
        found = {"images": self.images, "texts": self.texts, "both": [*self.images, *self.texts]}[kind]
        if files_only:
            found = [item for item in found if item.image is not None and item.image.encoded]
        good = [item for item in found if item.good]
        bad = [item for item in found if not item.good]
        return [
            chance.choice(good if chance.random() < 0.75 else bad) for _ in range(chance.randint(1, most))
        ]


def pool(stub: inference_pb2_grpc.InferenceServiceStub, seed: int) -> Pool:
    """`stub` tells the vectors of what is good."""
    chance = random.Random(seed)
    good_images = [*_files(chance), *_pixels(chance)]
    good_texts = [caption(colour, shape) for colour in COLOURS for shape in SHAPES]
    good_texts += ["ein grünes Dreieck", "赤い丸", "x" * 300, "a\nb\tc", "🟥" * 40, "it's 7 < 9 & 'so' on"]
    return Pool(
        images=[Item(image=image, wanted=_image_vector(stub, image)) for image in good_images]
        + [Item(image=image, wanted=reason) for image, reason in _bad_images(chance)],
        texts=[Item(text=text, wanted=_text_vector(stub, text)) for text in good_texts]
        + [Item(text=text, wanted="TextError") for text in ("", " \n\t", "y" * 100_000)],
    )


def _files(chance: random.Random) -> list[tensor_pb2.Image]:
    found = [images.png("red"), images.jpeg("blue", "square"), images.png("green", "triangle", size=97)]
    found += [images.jpeg("yellow", size=chance.randint(20, 400), seed=chance.randrange(9)) for _ in range(6)]
    found += [images.encoded(images.draw("red", size=120), form) for form in ("WEBP", "GIF", "BMP")]
    return [tensor_pb2.Image(encoded=data) for data in found]


def _pixels(chance: random.Random) -> list[tensor_pb2.Image]:
    found = [np.asarray(images.draw("blue", size=side)) for side in (1, 16, 64, 224)]
    found.append(np.asarray(images.draw("green", size=64), np.float32) / 255)
    large = np.random.default_rng(chance.randrange(99)).integers(0, 255, (900, 1200, 3), dtype=np.uint8)
    return [tensor_pb2.Image(pixels=pack(np.ascontiguousarray(each))) for each in (*found, large)]


def _bad_images(chance: random.Random) -> list[tuple[tensor_pb2.Image, str]]:
    whole = images.jpeg(size=160)
    found = [
        (images.not_an_image(), "ImageDecodeError"),
        (b"", "ImageDecodeError"),
        (images.truncated_jpeg(), "ImageDecodeError"),
        (images.png()[:40], "ImageDecodeError"),
        (images.header_only_png(30_000, 30_000), "ImageSizeError"),
        (images.header_only_png(0, 10), "ImageSizeError"),
        (images.wide_png(), "ImageSizeError"),
        (chance.randbytes(2000), "ImageDecodeError"),
        (whole[: chance.randint(200, 500)], "ImageDecodeError"),
    ]
    bad = [(tensor_pb2.Image(encoded=data), reason) for data, reason in found]
    uint8, float32 = tensor_pb2.DATA_TYPE_UINT8, tensor_pb2.DATA_TYPE_FLOAT32
    for data, dtype, shape, reason in (
        (b"abc", uint8, [2, 2, 3], "TensorError"),
        (b"abc", uint8, [2**20, 2**20, 3], "TensorError"),
        (bytes(48), float32, [4, 4, 3], "TensorError"),
        (bytes(16), uint8, [4, 4], "TensorError"),
        (bytes(4 * 4 * 4), uint8, [4, 4, 4], "TensorError"),
        (b"", uint8, [0, 8, 3], "ImageSizeError"),
        (np.full((4, 4, 3), np.nan, np.float32).tobytes(), float32, [4, 4, 3], "TensorError"),
    ):
        bad.append((tensor_pb2.Image(pixels=tensor_pb2.Tensor(data=data, dtype=dtype, shape=shape)), reason))
    return bad


def _image_vector(stub: inference_pb2_grpc.InferenceServiceStub, image: tensor_pb2.Image) -> Vector:
    answer = stub.EmbedImages(inference_pb2.EmbedImagesRequest(images=[image]))
    row: Vector = unpack(answer.embeddings)[0]
    return row


def _text_vector(stub: inference_pb2_grpc.InferenceServiceStub, text: str) -> Vector:
    row: Vector = unpack(stub.EmbedTexts(inference_pb2.EmbedTextsRequest(texts=[text])).embeddings)[0]
    return row
