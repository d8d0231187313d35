"""ModelService over gRPC: a thin face of `Models`. Errors leave as exceptions."""

from __future__ import annotations

from typing import Any

import grpc

from cliptune.v1 import model_pb2, model_pb2_grpc
from cliptune_server.catalog.models import Models
from cliptune_server.catalog.traffic import Traffic

_Context = grpc.aio.ServicerContext[Any, Any]


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Each method is one of `Models`."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def ListModels(  # noqa: N802, D102
        self, request: model_pb2.ListModelsRequest, context: _Context
    ) -> model_pb2.ListModelsResponse:
        return await self._models.list(request)

    async def GetModel(  # noqa: N802, D102
        self, request: model_pb2.GetModelRequest, context: _Context
    ) -> model_pb2.GetModelResponse:
        return model_pb2.GetModelResponse(model=await self._models.get(request.model))

    async def LoadModel(  # noqa: N802, D102
        self, request: model_pb2.LoadModelRequest, context: _Context
    ) -> model_pb2.LoadModelResponse:
        return model_pb2.LoadModelResponse(model=await self._models.load(request.model))

    async def UnloadModel(  # noqa: N802, D102
        self, request: model_pb2.UnloadModelRequest, context: _Context
    ) -> model_pb2.UnloadModelResponse:
        return model_pb2.UnloadModelResponse(model=await self._models.unload(request.model))

    async def SetAlias(  # noqa: N802, D102
        self, request: model_pb2.SetAliasRequest, context: _Context
    ) -> model_pb2.SetAliasResponse:
        return model_pb2.SetAliasResponse(model=await self._models.set_alias(request.model, request.alias))

    async def SetTraffic(  # noqa: N802, D102
        self, request: model_pb2.SetTrafficRequest, context: _Context
    ) -> model_pb2.SetTrafficResponse:
        traffic = Traffic.of(request.traffic)
        return model_pb2.SetTrafficResponse(model=await self._models.set_traffic(request.model, traffic))

    async def DeleteAlias(  # noqa: N802, D102
        self, request: model_pb2.DeleteAliasRequest, context: _Context
    ) -> model_pb2.DeleteAliasResponse:
        await self._models.delete_alias(request.name, request.alias)
        return model_pb2.DeleteAliasResponse()

    async def DeleteModel(  # noqa: N802, D102
        self, request: model_pb2.DeleteModelRequest, context: _Context
    ) -> model_pb2.DeleteModelResponse:
        await self._models.delete(request.model)
        return model_pb2.DeleteModelResponse()
