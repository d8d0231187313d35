"""Data sets that lie with the daemon, synchronously: uploaded, looked into, deleted. Part of `Client`."""

from __future__ import annotations

import os
import time
from contextlib import closing

import cliptune.dataset_codec as dataset_codec
import cliptune.upload as uploads
from cliptune.client.connection import Connection
from cliptune.dataset import Dataset, DatasetList, DatasetPreview
from cliptune.errors import CliptuneError, UnavailableError
from cliptune.progress import transfer_bar
from cliptune.v1 import data_pb2


class DatasetCalls(Connection):
    """DataService."""

    def upload_dataset(
        self,
        path: str | os.PathLike[str],
        *,
        name: str = "",
        entry: str = "",
        image_column: str = "image",
        progress: bool = False,
        reconnect_s: float = uploads.DEFAULT_RECONNECT_S,
    ) -> Dataset:
        """Bring a folder, or a table with its images, to the daemon; a job then reads "dataset:NAME".

        `name`: default the folder's or the table's. `entry`: the table, shard pattern or folder among the
        files that a job reads; default the only table, else all. `image_column`: of a table given as `path`.
        `progress`: show a bar on stderr.

        A lost connection is taken up again where it broke; so is an upload that was broken off, when it is
        called again. `UnavailableError` when the daemon stays away for `reconnect_s`. `ConflictError` when
        another data set has this name, `DiskFullError` beyond the daemon's quota.
        """
        with transfer_bar(shown=progress) as told:
            transfer = uploads.prepare(
                path,
                name=name,
                entry=entry,
                image_column=image_column,
                reconnect_s=reconnect_s,
                told=told,
            )
            while True:
                try:
                    begun = self._run(transfer.begin(), None)
                    if not begun.finished:
                        requests = transfer.requests(begun)
                        stream = self._open(uploads.METHOD, requests, data_pb2.UploadFilesResponse)
                        with closing(stream.answers()) as answers:
                            for _ in answers:
                                pass
                        transfer.check()
                    return self._run(transfer.finish(begun), None)
                except UnavailableError as error:
                    transfer.check()
                    time.sleep(transfer.wait_s(error))
                except CliptuneError:
                    transfer.check()
                    raise

    def list_datasets(self, *, timeout_s: float | None = None) -> DatasetList:
        """Every data set of the daemon, by name, with what they take and may take."""
        return self._run(dataset_codec.list_datasets(), timeout_s)

    def get_dataset(
        self, name: str, *, samples: int | None = None, timeout_s: float | None = None
    ) -> DatasetPreview:
        """A data set with `samples` rows (at most 64, default 8) and small pictures of their images."""
        return self._run(dataset_codec.get_dataset(name, samples), timeout_s)

    def delete_dataset(self, name: str, *, timeout_s: float | None = None) -> None:
        """Remove a data set, or what was uploaded of it. `ConflictError` while a job uses it."""
        self._run(dataset_codec.delete_dataset(name), timeout_s)
