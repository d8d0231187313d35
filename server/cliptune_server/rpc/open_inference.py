"""The Open Inference Protocol over gRPC: a thin face of `OpenInference`. Errors leave as exceptions."""

from __future__ import annotations

from typing import Any

import grpc

from cliptune import priority
from cliptune.errors import TensorError
from cliptune.internal.open_inference import open_inference_pb2 as messages
from cliptune.internal.open_inference import open_inference_pb2_grpc
from cliptune_server.open_inference.inference import (
    EXTENSIONS,
    NAME,
    PLATFORM,
    InferRequest,
    OpenInference,
    TensorForm,
)
from cliptune_server.open_inference.tensors import BYTES, Tensor

_Context = grpc.aio.ServicerContext[Any, Any]
# Where the elements of each type stand in `InferTensorContents`; FP16 has raw contents alone.
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}


class OpenInferenceServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Each method hands its message to `OpenInference`."""

    def __init__(self, inference: OpenInference) -> None:
        self._inference = inference

    async def ServerLive(  # noqa: N802, D102
        self, request: messages.ServerLiveRequest, context: _Context
    ) -> messages.ServerLiveResponse:
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(  # noqa: N802, D102
        self, request: messages.ServerReadyRequest, context: _Context
    ) -> messages.ServerReadyResponse:
        return messages.ServerReadyResponse(ready=self._inference.ready)

    async def ModelReady(  # noqa: N802, D102
        self, request: messages.ModelReadyRequest, context: _Context
    ) -> messages.ModelReadyResponse:
        return messages.ModelReadyResponse(
            ready=await self._inference.model_ready(request.name, request.version)
        )

    async def ServerMetadata(  # noqa: N802, D102
        self, request: messages.ServerMetadataRequest, context: _Context
    ) -> messages.ServerMetadataResponse:
        return messages.ServerMetadataResponse(
            name=NAME, version=self._inference.version, extensions=EXTENSIONS
        )

    async def ModelMetadata(  # noqa: N802, D102
        self, request: messages.ModelMetadataRequest, context: _Context
    ) -> messages.ModelMetadataResponse:
        form = await self._inference.model_form(request.name, request.version)
        return messages.ModelMetadataResponse(
            name=form.name,
            versions=form.versions,
            platform=PLATFORM,
            inputs=map(_form, form.inputs),
            outputs=map(_form, form.outputs),
        )

    async def ModelInfer(  # noqa: N802, D102
        self, request: messages.ModelInferRequest, context: _Context
    ) -> messages.ModelInferResponse:
        answer = await self._inference.infer(
            InferRequest(
                model=request.model_name,
                version=request.model_version,
                inputs=_inputs(request),
                outputs=[output.name for output in request.outputs],
                parameters={name: _value(each) for name, each in request.parameters.items()},
            ),
            context.time_remaining(),
            bulk=priority.is_bulk(context.invocation_metadata()),
        )
        return messages.ModelInferResponse(
            model_name=request.model_name,
            model_version=answer.version,
            id=request.id,
            parameters={
                name: messages.InferParameter(string_param=text) for name, text in answer.parameters.items()
            },
            outputs=[
                messages.ModelInferResponse.InferOutputTensor(
                    name=output.name, datatype=output.datatype, shape=output.shape
                )
                for output in answer.outputs
            ],
            raw_output_contents=[output.raw() for output in answer.outputs],
        )


def _inputs(request: messages.ModelInferRequest) -> list[Tensor]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise TensorError(
            f"the request has {len(request.inputs)} inputs and raw contents for {len(raw)}", path="inputs"
        )
    found = []
    for place, given in enumerate(request.inputs):
        if raw:
            if given.HasField("contents"):
                raise TensorError(f"input {given.name!r} has contents, and raw contents too", path=given.name)
            found.append(Tensor.from_raw(given.name, given.datatype, given.shape, raw[place]))
            continue
        values = getattr(given.contents, _CONTENTS.get(given.datatype, BYTES), ())
        found.append(Tensor.from_elements(given.name, given.datatype, given.shape, values))
    return found


def _value(parameter: messages.InferParameter) -> object:
    chosen = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, chosen) if chosen else None


def _form(form: TensorForm) -> messages.ModelMetadataResponse.TensorMetadata:
    return messages.ModelMetadataResponse.TensorMetadata(
        name=form.name, datatype=form.datatype, shape=form.shape
    )
