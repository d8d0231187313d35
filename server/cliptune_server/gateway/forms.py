"""Bodies of the inference routes: pydantic models in, protobuf messages and JSON numbers out.

Pure: no request, no router. Images come as base64 or data URLs (or as packed pixels), are only unwrapped here
and decoded by the engine. Floats leave as the exact value of their float32, so that a client that reads them
back into float32 has the gRPC answer bit for bit; a failed item's row is null.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from cliptune.errors import InvalidInputError, TensorError
from cliptune.tensors import unpack
from cliptune.v1 import inference_pb2, spec_pb2, tensor_pb2
from cliptune_server.gateway.messages import ItemErrorJson

Encoding = Literal["float", "base64"]
_DTYPES: Final = {
    "float32": tensor_pb2.DATA_TYPE_FLOAT32,
    "float16": tensor_pb2.DATA_TYPE_FLOAT16,
    "uint8": tensor_pb2.DATA_TYPE_UINT8,
    "int64": tensor_pb2.DATA_TYPE_INT64,
}
ModelField = Annotated[
    str,
    Field(
        description="NAME, NAME:VERSION or NAME@ALIAS. Empty: the only one loaded.",
        examples=["solar-cells@prod"],
    ),
]
_EXAMPLE_IMAGE: Final = "data:image/png;base64,iVBORw0KGgo…"


def _one_of(tags: Mapping[type, str | Callable[[Any], str]], message: str) -> Discriminator:
    """Chooses the branch of a union by the type of what was given, so that an error speaks of that branch."""

    def tag(given: object) -> str | None:
        named = tags.get(type(given))
        return named(given) if callable(named) else named

    return Discriminator(tag, custom_error_type="wrong_kind", custom_error_message=message)


def _input_tag(given: Mapping[str, object]) -> str:
    return "<text object>" if "text" in given else "<image>"


class Strict(BaseModel):
    """A body in which an unknown field is a mistake."""

    model_config = ConfigDict(extra="forbid")


class Pixels(Strict):
    """Raw pixels [H, W, 3], RGB: uint8 0-255 or float32 in [0, 1]."""

    data: str = Field(description="Base64 of the elements, little-endian, row-major.")
    dtype: str = Field(examples=["uint8", "float32"])
    shape: list[int] = Field(examples=[[224, 224, 3]])


class ImageBody(Strict):
    """An image: either the base64 of a file or raw pixels."""

    encoded: str | None = Field(default=None, description="Base64 or a data URL of an image file.")
    pixels: Pixels | None = None


ImageField = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[ImageBody, Tag("<object>")],
    _one_of(
        {str: "<text>", dict: "<object>", ImageBody: "<object>"},
        'an image is base64, a data URL, {"encoded": …} or {"pixels": …}',
    ),
]


class ImageInput(Strict):
    """An image among the inputs of /v1/embeddings."""

    image: ImageField = Field(examples=[_EXAMPLE_IMAGE])


class TextInput(Strict):
    """A text among the inputs of /v1/embeddings; a plain string means the same."""

    text: str


Input = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[ImageInput, Tag("<image>")]
    | Annotated[TextInput, Tag("<text object>")],
    _one_of(
        {str: "<text>", ImageInput: "<image>", TextInput: "<text object>", dict: _input_tag},
        'an input is a text, {"text": …} or {"image": …}; token numbers are not taken',
    ),
]
Inputs = Annotated[
    Annotated[Input, Tag("<one>")] | Annotated[list[Input], Tag("<list>")],
    Discriminator(lambda given: "<list>" if isinstance(given, list) else "<one>"),
]


ResolutionField = Annotated[
    str,
    Field(
        description="Size that images are brought to: 224, 224x320, or fast, balanced or best of the sizes"
        " that the model was measured at. Empty: its serving size.",
        max_length=16,
    ),
]


class EmbeddingsBody(BaseModel):
    """OpenAI's request, where inputs may also be images. Other fields of OpenAI's are ignored."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "solar-cells@prod", "input": ["a cracked cell", {"image": _EXAMPLE_IMAGE}]},
            ]
        }
    )
    model: ModelField = ""
    input: Inputs
    encoding_format: Encoding = "float"
    dimensions: int | None = Field(
        default=None,
        ge=1,
        description="Fewer numbers an embedding, for a model that was trained for it; or its own size.",
    )
    resolution: ResolutionField = ""
    modality: Literal["text", "image"] | None = Field(
        default=None,
        description="What plain strings are. Left out: images where they are data URLs of one, else texts.",
    )


class SimilarityBody(Strict):
    """Every image against every text."""

    model: ModelField = ""
    images: list[ImageField] = Field(examples=[[_EXAMPLE_IMAGE]])
    texts: list[str] = Field(examples=[["a cracked cell", "an intact cell"]])
    resolution: ResolutionField = ""


class PairBody(Strict):
    """An image and its text."""

    image: ImageField
    text: str


class ScorePairsBody(Strict):
    """Image i against text i."""

    model: ModelField = ""
    pairs: list[PairBody]
    resolution: ResolutionField = ""


class ClassBody(Strict):
    """A class and its prompts. Without prompts: its label in "a photo of a {label}"."""

    label: str
    prompts: list[str] = []


ClassField = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[ClassBody, Tag("<object>")],
    _one_of(
        {str: "<text>", dict: "<object>", ClassBody: "<object>"},
        'a class is a label or {"label": …, "prompts": […]}',
    ),
]


class ClassifyBody(Strict):
    """Zero-shot classification. A class is a label, or a label with prompts."""

    model: ModelField = ""
    images: list[ImageField] = Field(examples=[[_EXAMPLE_IMAGE]])
    classes: list[ClassField] = Field(examples=[["cracked cell", "intact cell"]])
    resolution: ResolutionField = ""


class EmbeddingCard(BaseModel):
    """One embedding, in OpenAI's form."""

    object: str = Field(default="embedding", description="Always `embedding`.")
    index: int
    embedding: list[float] | str | None = Field(
        description="Of unit length where the model is compared by the cosine. A string: base64 of float32,"
        " little-endian. null: see `errors`."
    )


class Usage(BaseModel):
    """OpenAI's counters: tokens of the texts, those of start and end included; images have none."""

    prompt_tokens: int
    total_tokens: int
    texts: int
    images: int


class EmbeddingsAnswer(BaseModel):
    """OpenAI's answer, and the items that failed."""

    object: str = Field(default="list", description="Always `list`.")
    model: str = Field(description="The version that answered.")
    data: list[EmbeddingCard]
    usage: Usage
    errors: list[ItemErrorJson]


class SimilarityAnswer(BaseModel):
    """[N images][M texts]; null where an image or a text failed."""

    model: str
    scores: list[list[float | None]]
    logit_scale: float
    errors: list[ItemErrorJson]


class ScorePairsAnswer(BaseModel):
    """[N]; null where a pair failed."""

    model: str
    scores: list[float | None]
    logit_scale: float
    errors: list[ItemErrorJson]


class Prediction(BaseModel):
    """The likeliest class."""

    label: str
    probability: float


class ClassifyAnswer(BaseModel):
    """[N images][C classes]; a failed image's row is null."""

    model: str
    labels: list[str]
    predictions: list[Prediction | None]
    probabilities: list[list[float | None] | None]
    scores: list[list[float | None] | None]
    errors: list[ItemErrorJson]


def image_message(image: ImageField, place: str) -> tensor_pb2.Image:
    """An image as the contract has it; `place` ("images[3]") is told when it is not even base64."""
    if isinstance(image, str):
        return tensor_pb2.Image(encoded=unwrap(image, place))
    if (image.encoded is None) == (image.pixels is None):
        raise InvalidInputError(f"{place} needs either `encoded` or `pixels`", path=place)
    if image.encoded is not None:
        return tensor_pb2.Image(encoded=unwrap(image.encoded, f"{place}.encoded"))
    assert image.pixels is not None
    pixels = image.pixels
    if pixels.dtype not in _DTYPES:
        allowed = ", ".join(_DTYPES)
        raise TensorError(
            f"{place}.pixels.dtype {pixels.dtype!r} is none of {allowed}", path=place, allowed=allowed
        )
    if any(not 0 <= side < 2**31 for side in pixels.shape):
        raise TensorError(f"{place}.pixels.shape is {pixels.shape}", path=place)
    data = unwrap(pixels.data, f"{place}.pixels.data")
    return tensor_pb2.Image(
        pixels=tensor_pb2.Tensor(data=data, dtype=_DTYPES[pixels.dtype], shape=pixels.shape)
    )


def image_messages(images: Sequence[ImageField], field: str = "images") -> list[tensor_pb2.Image]:
    """Several images."""
    return [image_message(image, f"{field}[{i}]") for i, image in enumerate(images)]


def class_messages(classes: Iterable[str | ClassBody]) -> list[spec_pb2.ClassPrompts]:
    """Classes as the contract has them."""
    named = (ClassBody(label=each) if isinstance(each, str) else each for each in classes)
    return [spec_pb2.ClassPrompts(label=each.label, prompts=each.prompts) for each in named]


def is_data_url(text: str) -> bool:
    """Whether a string is an image in the form of a data URL."""
    return text[:11].lower() == "data:image/"


def unwrap(text: str, place: str) -> bytes:
    """The bytes behind base64 or a data URL. InvalidInputError for anything else."""
    payload = text
    if text[:5].lower() == "data:":
        head, comma, payload = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InvalidInputError(f"{place}: a data URL must be of the form data:…;base64,…", path=place)
    elif text[:8].lower().startswith(("http://", "https://", "file://")):
        raise InvalidInputError(f"{place}: addresses are not fetched; send the image itself", path=place)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError(f"{place} is not base64: {error}", path=place) from None


def float_rows(tensor: tensor_pb2.Tensor) -> list[list[float | None] | None]:
    """[N, K] as JSON rows: null for a row without a number, and for a number that is none."""
    array = unpack(tensor)
    finite = np.isfinite(array)
    if bool(finite.all()):
        return list(array.tolist())
    return [numbers(row) if ok.any() else None for row, ok in zip(array, finite, strict=True)]


def numbers(array: npt.NDArray[Any]) -> list[float | None]:
    """[K] as JSON numbers, null for NaN."""
    return [value if ok else None for value, ok in zip(array.tolist(), np.isfinite(array), strict=True)]


def embedding_values(tensor: tensor_pb2.Tensor, encoding: Encoding) -> list[list[float] | str | None]:
    """[N, D] as OpenAI's `embedding` values; null for a failed item."""
    array = unpack(tensor).astype("<f4", copy=False)
    rows = [row if bool(np.isfinite(row).all()) else None for row in array]
    if encoding == "base64":
        return [None if row is None else base64.b64encode(row.tobytes()).decode() for row in rows]
    return [None if row is None else row.tolist() for row in rows]


def predictions(answer: inference_pb2.ClassifyResponse) -> list[dict[str, Any] | None]:
    """The likeliest class of each image; null for a failed one."""
    best: list[dict[str, Any] | None] = []
    for row in unpack(answer.probabilities):
        if not bool(np.isfinite(row).all()):
            best.append(None)
            continue
        place = int(row.argmax())
        best.append({"label": answer.labels[place], "probability": float(row[place])})
    return best
