"""What models take and give in the Open Inference Protocol, over the daemon's application objects.

Enters: a `InferRequest`, the same from either transport. Leaves: an `InferAnswer`, or an error of
`cliptune.errors`. Made by `daemon.py`; called by the two faces.

    input   datatype and shape                                                output
    image   BYTES [N], files; UINT8 or FP32 (in [0, 1]) [N, H, W, 3]          image_embedding [N, D]
    text    BYTES [M]                                                         text_embedding [M, D]
    both                                                                      similarity [N, M], if asked for

The protocol knows no error of one item: in a request of several its row is NaN, and the parameter `errors` of
the answer says why, as JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from cliptune.errors import CliptuneError, InvalidInputError, ModelNotFoundError, TensorError
from cliptune.tensors import pack, unpack
from cliptune.v1 import error_pb2, inference_pb2, model_pb2, tensor_pb2
from cliptune_server.open_inference.tensors import BYTES, Tensor
from cliptune_server.readiness import Part, Readiness

if TYPE_CHECKING:
    from cliptune_server.catalog.models import Models
    from cliptune_server.inference.router import Router

NAME: Final = "cliptune"
PLATFORM: Final = "pytorch_open_clip"
EXTENSIONS: Final = ("binary_tensor_data",)
IMAGE, TEXT = "image", "text"
IMAGE_OUT, TEXT_OUT, SIMILARITY_OUT = "image_embedding", "text_embedding", "similarity"
_OUTPUTS: Final = (IMAGE_OUT, TEXT_OUT, SIMILARITY_OUT)
# The protocol's own unit of a deadline.
_MICROSECONDS: Final = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class InferRequest:
    """One request."""

    model: str
    version: str
    inputs: Sequence[Tensor]
    outputs: Sequence[str] = ()
    """Names that are asked for. Empty: the embeddings of what was given."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """`timeout` in microseconds; `priority`: 0 and 1 are interactive, anything above is bulk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InferAnswer:
    """Its answer."""

    model: str
    version: str
    outputs: Sequence[Tensor]
    parameters: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorForm:
    """What a model takes or gives under a name; -1: any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelForm:
    """A model as the protocol describes it."""

    name: str
    versions: tuple[str, ...]
    inputs: tuple[TensorForm, ...]
    outputs: tuple[TensorForm, ...]


class OpenInference:
    """The protocol's calls."""

    def __init__(self, *, router: Router, models: Models, readiness: Readiness) -> None:
        self._router: Final = router
        self._models: Final = models
        self._readiness: Final = readiness
        self.version: Final = importlib.metadata.version(NAME)

    @property
    def ready(self) -> bool:
        """Requests are answered."""
        return self._readiness.report().of(Part.ENGINE, Part.MODELS)

    async def model_ready(self, model: str, version: str) -> bool:
        """This version is loaded and the engine answers. `ModelNotFoundError`: there is none."""
        reference = reference_of(model, version)
        try:
            await self._models.catalog.resolve(reference)
        except ModelNotFoundError:
            raise
        except CliptuneError:
            return False
        return self._readiness.report().of(Part.ENGINE)

    async def model_form(self, model: str, version: str) -> ModelForm:
        """What it takes and gives."""
        found = await self._models.get(reference_of(model, version))
        all_versions = await self._models.list(model_pb2.ListModelsRequest(name=found.name))
        loaded = sorted(one.version for one in all_versions.models if one.loaded)
        return ModelForm(
            name=model,
            versions=tuple(map(str, loaded)),
            inputs=(
                TensorForm(name=IMAGE, datatype=BYTES, shape=(-1,)),
                TensorForm(name=TEXT, datatype=BYTES, shape=(-1,)),
            ),
            outputs=(
                TensorForm(name=IMAGE_OUT, datatype="FP32", shape=(-1, found.embedding_dim)),
                TensorForm(name=TEXT_OUT, datatype="FP32", shape=(-1, found.embedding_dim)),
                TensorForm(name=SIMILARITY_OUT, datatype="FP32", shape=(-1, -1)),
            ),
        )

    async def infer(self, request: InferRequest, timeout_s: float | None, *, bulk: bool) -> InferAnswer:
        """Embeddings of what was given, and what else was asked for."""
        timeout_s = _sooner(timeout_s, request.parameters.get("timeout"))
        bulk = bulk or _lower(request.parameters.get("priority"))
        images, texts = _items(request.inputs)
        wanted = _wanted(request.outputs, images is not None, texts is not None)
        model = reference_of(request.model, request.version)
        arrays: dict[str, tensor_pb2.Tensor] = {}
        errors: list[error_pb2.ItemError] = []
        if IMAGE_OUT in wanted:
            asked = inference_pb2.EmbedImagesRequest(model=model, images=images)
            embedded = await self._router.embed_images(asked, timeout_s, bulk=bulk)
            # The same version for all that one request asks, also while an alias moves.
            model, arrays[IMAGE_OUT] = embedded.model, embedded.embeddings
            errors += embedded.errors
        if TEXT_OUT in wanted:
            named = inference_pb2.EmbedTextsRequest(model=model, texts=texts)
            described = await self._router.embed_texts(named, timeout_s, bulk=bulk)
            model, arrays[TEXT_OUT] = described.model, described.embeddings
            errors += described.errors
        if SIMILARITY_OUT in wanted:
            compared = inference_pb2.SimilarityRequest(model=model, images=images, texts=texts)
            similar = await self._router.similarity(compared, timeout_s, bulk=bulk)
            model, arrays[SIMILARITY_OUT] = similar.model, similar.scores
            if IMAGE_OUT not in wanted:
                errors += [error for error in similar.errors if error.field == "images"]
            if TEXT_OUT not in wanted:
                errors += [error for error in similar.errors if error.field == "texts"]
        name, _, version = model.rpartition(":")
        return InferAnswer(
            model=name,
            version=version,
            outputs=[_output(name, arrays[name]) for name in wanted],
            parameters={"errors": _told(errors)} if errors else {},
        )


def reference_of(model: str, version: str) -> str:
    """("shapes", "2") → "shapes:2"; a name may be a reference itself, then without a version."""
    if version and ("@" in model or ":" in model):
        raise InvalidInputError(f"{model!r} names a version already, and the request names {version!r} too")
    return f"{model}:{version}" if version else model


def _items(inputs: Sequence[Tensor]) -> tuple[list[tensor_pb2.Image] | None, list[str] | None]:
    images: list[tensor_pb2.Image] | None = None
    texts: list[str] | None = None
    for tensor in inputs:
        if tensor.name == IMAGE and images is None:
            images = list(_images(tensor))
        elif tensor.name == TEXT and texts is None:
            texts = list(_texts(tensor))
        elif tensor.name in (IMAGE, TEXT):
            raise TensorError(f"input {tensor.name!r} stands twice", path=tensor.name)
        else:
            allowed = f"{IMAGE}, {TEXT}"
            raise TensorError(
                f"there is no input {tensor.name!r}; allowed: {allowed}", path=tensor.name, allowed=allowed
            )
    if images is None and texts is None:
        raise InvalidInputError(f"the request has no input; allowed: {IMAGE}, {TEXT}", path="inputs")
    return images, texts


def _images(tensor: Tensor) -> Iterable[tensor_pb2.Image]:
    if tensor.datatype == BYTES:
        _check_list(tensor)
        return (tensor_pb2.Image(encoded=each) for each in tensor.elements)
    array = tensor.array
    if array is None or tensor.datatype not in ("UINT8", "FP32"):
        raise TensorError(
            f"images are BYTES, UINT8 or FP32, not {tensor.datatype}",
            path=IMAGE,
            allowed="BYTES, UINT8, FP32",
        )
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[3] != 3:
        raise TensorError(f"images have shape [N, H, W, 3], not {list(tensor.shape)}", path=IMAGE)
    return (tensor_pb2.Image(pixels=pack(pixels)) for pixels in array)


def _texts(tensor: Tensor) -> Iterable[str]:
    if tensor.datatype != BYTES:
        raise TensorError(f"texts are BYTES, not {tensor.datatype}", path=TEXT, allowed=BYTES)
    _check_list(tensor)
    for place, each in enumerate(tensor.elements):
        try:
            yield each.decode("utf-8")
        except UnicodeDecodeError as error:
            raise TensorError(f"text {place} is not UTF-8: {error.reason}", path=TEXT) from None


def _check_list(tensor: Tensor) -> None:
    """[N] or [N, 1], as clients with and without a batch dimension send it."""
    if len(tensor.shape) > 2 or tensor.shape[1:] not in ((), (1,)):
        raise TensorError(f"{tensor.name}s have shape [N], not {list(tensor.shape)}", path=tensor.name)


def _wanted(asked: Sequence[str], images: bool, texts: bool) -> list[str]:
    given = [name for name, there in ((IMAGE_OUT, images), (TEXT_OUT, texts)) if there]
    possible = [*given, *([SIMILARITY_OUT] if images and texts else [])]
    for name in asked:
        if name not in _OUTPUTS:
            allowed = ", ".join(_OUTPUTS)
            raise TensorError(f"there is no output {name!r}; allowed: {allowed}", path=name, allowed=allowed)
        if name not in possible:
            raise TensorError(f"output {name!r} needs an input that the request has not", path=name)
    return list(dict.fromkeys(asked)) or given


def _output(name: str, found: tensor_pb2.Tensor) -> Tensor:
    array = np.asarray(unpack(found), dtype="<f4")
    return Tensor(name=name, datatype="FP32", shape=array.shape, array=array)


def _told(errors: Sequence[error_pb2.ItemError]) -> str:
    return json.dumps(
        [
            {
                "input": error.field.removesuffix("s"),
                "index": error.index,
                "reason": error.error.reason,
                "message": error.error.message,
            }
            for error in errors
        ]
    )


def _sooner(timeout_s: float | None, microseconds: object) -> float | None:
    if not isinstance(microseconds, int | float) or isinstance(microseconds, bool) or microseconds <= 0:
        return timeout_s
    told_s = microseconds / _MICROSECONDS
    return told_s if timeout_s is None else min(timeout_s, told_s)


def _lower(priority: object) -> bool:
    return isinstance(priority, int) and priority > 1
