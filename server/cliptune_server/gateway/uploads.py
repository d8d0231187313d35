"""Routes that bring data sets to the daemon: `/v1/uploads`, resumable, and a small one in a single form.

POST /v1/uploads                    what there is to come → which bytes are held already
PUT  /v1/uploads/ID/files/0         a file, or a part of it by Content-Range
POST /v1/uploads/ID/finish          → the data set
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Final

from fastapi import APIRouter, File, Form, Header, Path, UploadFile
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from cliptune.errors import CancelledError, InvalidInputError
from cliptune.v1 import data_pb2
from cliptune_server.gateway.context import context_of
from cliptune_server.gateway.messages import DatasetJson, json_form
from cliptune_server.gateway.problems import problems

router = APIRouter(prefix="/v1/uploads", tags=["data"])
UploadId = Annotated[str, Path(description="As the beginning of the upload answered.")]
_FAILURES: Final = problems(400, 409, 507)
_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(?:\d+|\*)")
_CHUNK_BYTES: Final = 1024 * 1024


class FileBody(BaseModel):
    """A file to come."""

    model_config = ConfigDict(extra="forbid")
    path: str = Field(description='Relative, "/" between folders.', examples=["images/0001.png"])
    bytes: int = Field(ge=0)
    sha256: str = Field(description="Of its content, in hex.", pattern="^[0-9a-fA-F]{64}$")


class UploadBody(BaseModel):
    """A data set to come."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(examples=["solar-cells"])
    files: list[FileBody]
    entry: str = Field(
        default="",
        description="The table, shard pattern or folder among the files that a job reads. Empty: the only "
        "table, or all.",
        examples=["captions.csv"],
    )


class Begun(BaseModel):
    """Where an upload stands."""

    upload_id: str
    held_bytes: list[int] = Field(description="For each file, how many of its first bytes are here.")
    finished: bool = Field(description="The whole data set is here already.")


class Received(BaseModel):
    """What a request brought."""

    received_bytes: int


@router.post(
    "", summary="Begin an upload", status_code=201, response_model=Begun, responses=problems(400, 409, 507)
)
async def begin_upload(request: Request, body: UploadBody) -> Response:
    """Begins an upload, or says how far the one of the same name and files is: go on from there."""
    files = [
        data_pb2.DataFile(path=each.path, bytes=each.bytes, sha256=bytes.fromhex(each.sha256))
        for each in body.files
    ]
    begun = await context_of(request).datasets.begin(
        data_pb2.BeginUploadRequest(name=body.name, files=files, entry=body.entry)
    )
    return JSONResponse(json_form(begun), 201, headers={"Location": f"/v1/uploads/{begun.upload_id}"})


@router.put(
    "/{upload_id}/files/{file}",
    summary="Send a file",
    response_model=Received,
    responses={404: problems(404)[404], **_FAILURES},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def send_file(
    request: Request,
    upload_id: UploadId,
    file: Annotated[int, Path(ge=0, description="Its place among `files`.")],
    content_range: Annotated[
        str, Header(description="`bytes FIRST-LAST/SIZE`: a part that begins where what is held ends.")
    ] = "",
) -> Response:
    """The bytes of a file as they are, of any length: they go to the disk as they come.

    Broken off, what came is kept; begin the upload again to hear how much that was.
    """
    first, wanted_bytes = _range(content_range)

    async def chunks() -> AsyncIterator[data_pb2.UploadFilesRequest]:
        offset = first
        async for chunk in request.stream():
            yield data_pb2.UploadFilesRequest(upload_id=upload_id, file=file, offset=offset, chunk=chunk)
            offset += len(chunk)

    try:
        received_bytes = await context_of(request).datasets.receive(chunks())
    except ClientDisconnect:
        raise CancelledError("the client left in the middle of a file") from None
    if wanted_bytes is not None and received_bytes != wanted_bytes:
        raise InvalidInputError(
            f"the body had {received_bytes} bytes; Content-Range says {wanted_bytes}", path="Content-Range"
        )
    return JSONResponse({"received_bytes": received_bytes})


@router.post(
    "/{upload_id}/finish",
    summary="Finish an upload",
    response_model=DatasetJson,
    responses=problems(400, 404, 409),
)
async def finish_upload(request: Request, upload_id: UploadId) -> Response:
    """Checks that every file is whole; the data set appears under its name, at once."""
    return JSONResponse(json_form(await context_of(request).datasets.finish(upload_id)))


@router.delete("/{upload_id}", summary="Abort an upload", status_code=204, responses=problems(404))
async def abort_upload(request: Request, upload_id: UploadId) -> Response:
    """Throws away what was uploaded."""
    await context_of(request).datasets.abort(upload_id)
    return Response(status_code=204)


@router.post(
    "/form",
    summary="Upload a small data set",
    status_code=201,
    response_model=DatasetJson,
    responses=_FAILURES,
)
async def upload_form(
    request: Request,
    name: Annotated[str, Form(description="The data set's name.")],
    files: Annotated[
        list[UploadFile], File(description="Its files; a file's name is its path in the data set.")
    ],
    entry: Annotated[str, Form(description="As in `POST /v1/uploads`.")] = "",
) -> Response:
    """All of it in one multipart form, for tools that know nothing else: at most 1,000 files."""
    datasets = context_of(request).datasets
    told = [await asyncio.to_thread(_told, file) for file in files]
    begun = await datasets.begin(data_pb2.BeginUploadRequest(name=name, files=told, entry=entry))
    if not begun.finished:
        await datasets.receive(_chunks(begun, files))
    return JSONResponse(json_form(await datasets.finish(begun.upload_id)), 201)


async def _chunks(
    begun: data_pb2.BeginUploadResponse, files: Sequence[UploadFile]
) -> AsyncIterator[data_pb2.UploadFilesRequest]:
    for place, (file, offset) in enumerate(zip(files, begun.held_bytes, strict=True)):
        await file.seek(offset)
        while chunk := await file.read(_CHUNK_BYTES):
            yield data_pb2.UploadFilesRequest(
                upload_id=begun.upload_id, file=place, offset=offset, chunk=chunk
            )
            offset += len(chunk)


def _told(file: UploadFile) -> data_pb2.DataFile:
    content: Any = file.file
    digest = hashlib.sha256()
    size = 0
    while chunk := content.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return data_pb2.DataFile(path=file.filename or "", bytes=size, sha256=digest.digest())


def _range(header: str) -> tuple[int, int | None]:
    """First byte and length of a Content-Range; without one the whole file comes."""
    if not header:
        return 0, None
    match = _RANGE.fullmatch(header.strip())
    if match is None or int(match[2]) < int(match[1]):
        allowed = "bytes FIRST-LAST/SIZE"
        raise InvalidInputError(
            f"Content-Range is {header[:100]!r}; allowed: {allowed}", path="Content-Range", allowed=allowed
        )
    return int(match[1]), int(match[2]) - int(match[1]) + 1
