"""DataService over gRPC: a thin face of `Datasets`. Errors leave as exceptions, told by `rpc/errors.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from cliptune.v1 import data_pb2, data_pb2_grpc
from cliptune_server.datasets.datasets import Datasets

_Context = grpc.aio.ServicerContext[Any, Any]


class DataServicer(data_pb2_grpc.DataServiceServicer):
    """Each method is one of `Datasets`."""

    def __init__(self, datasets: Datasets) -> None:
        self._datasets = datasets

    async def BeginUpload(  # noqa: N802, D102
        self, request: data_pb2.BeginUploadRequest, context: _Context
    ) -> data_pb2.BeginUploadResponse:
        return await self._datasets.begin(request)

    async def UploadFiles(  # noqa: N802, D102
        self, request_iterator: AsyncIterator[data_pb2.UploadFilesRequest], context: _Context
    ) -> data_pb2.UploadFilesResponse:
        return data_pb2.UploadFilesResponse(received_bytes=await self._datasets.receive(request_iterator))

    async def FinishUpload(  # noqa: N802, D102
        self, request: data_pb2.FinishUploadRequest, context: _Context
    ) -> data_pb2.FinishUploadResponse:
        return data_pb2.FinishUploadResponse(dataset=await self._datasets.finish(request.upload_id))

    async def AbortUpload(  # noqa: N802, D102
        self, request: data_pb2.AbortUploadRequest, context: _Context
    ) -> data_pb2.AbortUploadResponse:
        await self._datasets.abort(request.upload_id)
        return data_pb2.AbortUploadResponse()

    async def ListDatasets(  # noqa: N802, D102
        self, request: data_pb2.ListDatasetsRequest, context: _Context
    ) -> data_pb2.ListDatasetsResponse:
        return await self._datasets.list()

    async def GetDataset(  # noqa: N802, D102
        self, request: data_pb2.GetDatasetRequest, context: _Context
    ) -> data_pb2.GetDatasetResponse:
        return await self._datasets.get(request)

    async def DeleteDataset(  # noqa: N802, D102
        self, request: data_pb2.DeleteDatasetRequest, context: _Context
    ) -> data_pb2.DeleteDatasetResponse:
        await self._datasets.delete(request.name)
        return data_pb2.DeleteDatasetResponse()
