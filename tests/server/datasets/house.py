"""Real `Datasets` on a real folder, alone or behind a real gRPC server on a free port, in this process."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cliptune.v1 import data_pb2, data_pb2_grpc
from cliptune_server.config import DatasetsConfig, Limits
from cliptune_server.datasets.datasets import Datasets, Users
from cliptune_server.datasets.stored import StoredDatasets
from cliptune_server.readiness import Readiness
from cliptune_server.rpc.data import DataServicer
from cliptune_server.rpc.server import RpcServer

Files = Mapping[str, bytes]
FILES: Files = {"captions.csv": b"image,caption\na.png,a cell\n", "a.png": b"not really", "empty.txt": b""}


def nobody(name: str, files: Path) -> tuple[str, ...]:
    """No job uses it."""
    return ()


@asynccontextmanager
async def open_datasets(root: Path, *, users: Users = nobody, **config: Any) -> AsyncIterator[Datasets]:
    await asyncio.to_thread(root.mkdir, exist_ok=True)
    datasets = Datasets(StoredDatasets(root), config=DatasetsConfig(**config), users=users)
    await datasets.start()
    try:
        yield datasets
    finally:
        datasets.stop()


@asynccontextmanager
async def serving(datasets: Datasets, port: int = 0) -> AsyncIterator[str]:
    """ "HOST:PORT" of a server with these data sets, which stops as a daemon does."""
    rpc = RpcServer(limits=Limits(), readiness=Readiness(), observe=lambda method, code, seconds: None)
    data_pb2_grpc.add_DataServiceServicer_to_server(DataServicer(datasets), rpc.server)
    port = rpc.bind("127.0.0.1", port)
    await rpc.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        datasets.end_uploads()
        await rpc.stop(20.0)


def begin_request(name: str = "cells", files: Files = FILES, entry: str = "") -> data_pb2.BeginUploadRequest:
    told = [
        data_pb2.DataFile(path=path, bytes=len(content), sha256=hashlib.sha256(content).digest())
        for path, content in files.items()
    ]
    return data_pb2.BeginUploadRequest(name=name, files=told, entry=entry)


async def chunks(
    upload_id: str, files: Files = FILES, *, held: list[int] | None = None, chunk_bytes: int = 7
) -> AsyncIterator[data_pb2.UploadFilesRequest]:
    for index, content in enumerate(files.values()):
        for offset in range(held[index] if held else 0, len(content), chunk_bytes):
            chunk = content[offset : offset + chunk_bytes]
            yield data_pb2.UploadFilesRequest(upload_id=upload_id, file=index, offset=offset, chunk=chunk)


async def upload(
    datasets: Datasets, name: str = "cells", files: Files = FILES, entry: str = ""
) -> data_pb2.Dataset:
    begun = await datasets.begin(begin_request(name, files, entry))
    await datasets.receive(chunks(begun.upload_id, files, held=list(begun.held_bytes), chunk_bytes=1 << 20))
    return await datasets.finish(begun.upload_id)


def folder_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
