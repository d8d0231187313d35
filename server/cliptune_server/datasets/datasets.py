"""Data sets: upload, list, look into, delete. The application object behind both faces.

Enters: requests as protobuf messages. Leaves: protobuf messages, or errors of `cliptune.errors`. Called by
`rpc/data.py` and the gateway. An upload may end at any byte and goes on from there, whoever dials in; a data
set is there whole or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from cliptune.dataset_layout import check_files, check_name, choose_entry, content_sha256
from cliptune.errors import (
    ConflictError,
    DatasetNotFoundError,
    DiskFullError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from cliptune.v1 import data_pb2
from cliptune_server.config import DatasetsConfig
from cliptune_server.datasets.preview import Previews
from cliptune_server.datasets.stored import UPLOADS, StoredDatasets
from cliptune_server.datasets.uploads import Upload, reopen_all, total_held, upload_id

log = logging.getLogger(__name__)

Users = Callable[[str, Path], Sequence[str]]
"""(name of a data set, folder of its files) → ids of the jobs that use it and have not ended."""
Result = TypeVar("Result")

DEFAULT_SAMPLES: Final = 8
MAX_SAMPLES: Final = 64
_THREADS: Final = 4
_STOPPING: Final = "the daemon is stopping; the upload goes on from here when it is back"


class Datasets:
    """All data sets of one home."""

    def __init__(
        self,
        stored: StoredDatasets,
        *,
        config: DatasetsConfig,
        users: Users,
        previews: Previews | None = None,
    ) -> None:
        self._stored: Final = stored
        self._config: Final = config
        self._users: Final = users
        self._previews: Final = previews or Previews()
        self._uploads: Final[dict[str, Upload]] = {}
        self._receiving: Final[set[asyncio.Task[object]]] = set()
        self._stopping: Final = asyncio.Event()
        self._threads: Final = ThreadPoolExecutor(_THREADS, thread_name_prefix="datasets")
        self._changing: Final = asyncio.Lock()
        """Held by whatever makes a name appear or go."""

    async def start(self) -> None:
        """Takes up what an earlier daemon left half-uploaded."""
        root = self._stored.root / UPLOADS
        for upload in await self._in_thread(lambda: list(reopen_all(root))):
            self._uploads[upload.id] = upload
        await self._in_thread(self._drop_forgotten)

    def end_uploads(self) -> None:
        """Those under way fail with `UnavailableError`: they go on where they are under the next daemon."""
        self._stopping.set()
        for task in self._receiving:
            task.cancel()

    def stop(self) -> None:
        """What is half-uploaded stays for the next daemon."""
        for upload in self._uploads.values():
            upload.close()
        self._threads.shutdown(wait=False)

    # --- uploads

    async def begin(self, request: data_pb2.BeginUploadRequest) -> data_pb2.BeginUploadResponse:
        """Begins an upload, or says where the one of the same name and files stands.

        `InvalidInputError` and `DataError` for what cannot be a data set, `ConflictError` when another one
        has the name, `DiskFullError` when it does not fit into the quota or on the disk.
        """
        async with self._changing:
            return await self._in_thread(self._begin, request)

    async def receive(self, requests: AsyncIterator[data_pb2.UploadFilesRequest]) -> int:
        """Writes what comes; returns how many bytes that were. Errors as of `Upload.write`.

        `UnavailableError` when the daemon stops meanwhile.
        """
        task = asyncio.current_task()
        assert task is not None  # we are in one
        if self._stopping.is_set():
            raise UnavailableError(_STOPPING)
        self._receiving.add(task)
        try:
            return await self._receive(requests)
        except asyncio.CancelledError:
            if not self._stopping.is_set():
                raise
            task.uncancel()
            raise UnavailableError(_STOPPING) from None
        finally:
            self._receiving.discard(task)

    async def finish(self, finished_id: str) -> data_pb2.Dataset:
        """Checks what was not checked while it came, and gives the data set its name.

        To be asked again, it answers the same. `ConflictError` when bytes are missing, `DataError` for a file
        that is not what was announced: it is to be sent again.
        """
        if finished_id not in self._uploads:
            for dataset in await self._in_thread(self._stored.all):
                if dataset.upload_id == finished_id:
                    return dataset.message()
        upload = self._upload(finished_id)
        await self._in_thread(upload.complete)
        async with self._changing:
            # To its end even if the caller leaves.
            return await asyncio.shield(asyncio.ensure_future(self._publish(upload)))

    async def abort(self, aborted_id: str) -> None:
        """Throws away what was uploaded of a data set that is not finished."""
        async with self._changing:
            upload = self._upload(aborted_id)
            await self._in_thread(self._discard, upload)

    # --- data sets

    async def list(self) -> data_pb2.ListDatasetsResponse:
        """Every one, by name."""
        stored = await self._in_thread(self._stored.all)
        held_bytes = total_held(tuple(self._uploads.values()))
        return data_pb2.ListDatasetsResponse(
            datasets=[dataset.message() for dataset in stored],
            used_bytes=sum(dataset.bytes for dataset in stored) + held_bytes,
            quota_bytes=self._config.quota_bytes,
        )

    async def get(self, request: data_pb2.GetDatasetRequest) -> data_pb2.GetDatasetResponse:
        """One, with a look into it. `DatasetNotFoundError`."""
        samples = request.samples if request.HasField("samples") else DEFAULT_SAMPLES
        if not 0 <= samples <= MAX_SAMPLES:
            allowed = f"0 to {MAX_SAMPLES}"
            raise InvalidInputError(
                f"samples is {samples}; allowed: {allowed}", path="samples", allowed=allowed
            )
        dataset = await self._in_thread(self._stored.find, request.name)
        return await self._previews.of(dataset, self._stored.files_folder(dataset.name), samples)

    async def delete(self, name: str) -> None:
        """Removes a data set, or what was uploaded of one that is not finished.

        `ConflictError` while a job that has not ended uses it; `DatasetNotFoundError`.
        """
        async with self._changing:
            unfinished = [upload for upload in self._uploads.values() if upload.name == name]
            try:
                dataset = await self._in_thread(self._stored.find, name)
            except DatasetNotFoundError:
                if not unfinished:
                    raise
            else:
                loop = asyncio.get_running_loop()

                def check_unused() -> None:
                    asyncio.run_coroutine_threadsafe(self._check_unused(dataset.name), loop).result()

                await asyncio.shield(
                    asyncio.ensure_future(self._in_thread(self._stored.remove, name, check_unused))
                )
            for upload in unfinished:
                await self._in_thread(self._discard, upload)

    # --- how

    async def _receive(self, requests: AsyncIterator[data_pb2.UploadFilesRequest]) -> int:
        received_bytes = 0
        upload: Upload | None = None
        ticket = 0
        try:
            async for request in requests:
                if upload is None or request.upload_id != upload.id:
                    if upload is not None:
                        raise InvalidInputError("a stream sends to one upload alone", path="upload_id")
                    upload = self._upload(request.upload_id)
                    upload.streams += 1
                    ticket = upload.new_ticket()
                received_bytes += len(request.chunk)
                await self._in_thread(upload.write, ticket, request.file, request.offset, request.chunk)
        finally:
            if upload is not None:
                upload.streams -= 1
        return received_bytes

    def _begin(self, request: data_pb2.BeginUploadRequest) -> data_pb2.BeginUploadResponse:
        check_name(request.name)
        check_files(request.files)
        entry = choose_entry([file.path for file in request.files], request.entry)
        sha256 = content_sha256(request.files)
        key = upload_id(request.name, entry, sha256)
        whole = [file.bytes for file in request.files]
        if (stored := self._stored.get(request.name)) is not None:
            if stored.upload_id == key:
                return data_pb2.BeginUploadResponse(upload_id=key, held_bytes=whole, finished=True)
            raise ConflictError(
                f"another data set is called {request.name!r}: delete it first, or choose another name",
                dataset=request.name,
            )
        self._stored.check_free(request.name)
        upload = self._uploads.get(key)
        if upload is None:
            self._drop_forgotten()
            earlier = self._earlier(request.name)
            self._check_room(sum(whole) - sum(other.bytes for other in earlier))
            known = self._stored.known_files({file.sha256 for file in request.files})
            for other in earlier:
                known |= other.whole_files()
            chosen = data_pb2.BeginUploadRequest(name=request.name, entry=entry, files=request.files)
            upload = Upload.create(self._stored.root / UPLOADS, key, chosen, known)
            self._uploads[key] = upload
            for other in earlier:
                self._discard(other)
        upload.touch()
        return data_pb2.BeginUploadResponse(upload_id=key, held_bytes=upload.held())

    def _earlier(self, name: str) -> Sequence[Upload]:
        """Uploads of other files that were to become the data set of this name: the newest wish counts."""
        earlier = [upload for upload in self._uploads.values() if upload.name == name]
        if any(upload.streams for upload in earlier):
            raise ConflictError(f"other files are being uploaded as {name!r} just now", dataset=name)
        return earlier

    def _drop_forgotten(self) -> None:
        for upload in list(self._uploads.values()):
            if not upload.streams and upload.idle_s > self._config.keep_uploads_s:
                log.info("the upload of %s was not gone on with and is removed", upload.name)
                self._discard(upload)

    def _check_room(self, wanted_bytes: int) -> None:
        """An upload under way counts with all that it announced: two may not promise themselves one room."""
        root, quota_bytes = self._stored.root, self._config.quota_bytes
        taken_bytes = sum(dataset.bytes for dataset in self._stored.all())
        taken_bytes += sum(upload.bytes for upload in self._uploads.values())
        if quota_bytes and taken_bytes + wanted_bytes > quota_bytes:
            raise DiskFullError(
                f"{wanted_bytes:,} bytes do not fit: data sets take {taken_bytes:,} of {quota_bytes:,}; "
                "delete one, or start the daemon with a larger --data-quota",
                wanted_bytes=wanted_bytes,
                used_bytes=taken_bytes,
                quota_bytes=quota_bytes,
            )
        free_bytes = shutil.disk_usage(root).free
        if wanted_bytes > free_bytes:
            raise DiskFullError(
                f"{wanted_bytes:,} bytes do not fit: {free_bytes:,} are free where {root} lies",
                wanted_bytes=wanted_bytes,
            )

    async def _publish(self, upload: Upload) -> data_pb2.Dataset:
        folder, dataset = await self._in_thread(upload.seal)
        await self._in_thread(self._stored.publish, folder, dataset)
        self._uploads.pop(upload.id, None)
        await self._in_thread(upload.published, self._stored.folder(dataset.name))
        log.info("the data set %s is here: %d files, %d bytes", dataset.name, dataset.files, dataset.bytes)
        return dataset.message()

    def _discard(self, upload: Upload) -> None:
        self._uploads.pop(upload.id, None)
        upload.discard()

    async def _check_unused(self, name: str) -> None:
        users = self._users(name, self._stored.files_folder(name))
        if users:
            raise ConflictError(
                f"the data set {name!r} is used by {', '.join(users)}: wait for the end, or cancel first",
                dataset=name,
                jobs=", ".join(users),
            )

    def _upload(self, wanted_id: str) -> Upload:
        upload = self._uploads.get(wanted_id)
        if upload is None:
            raise NotFoundError(f"there is no upload {wanted_id!r}; begin it again", upload_id=wanted_id)
        return upload

    async def _in_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *arguments))
