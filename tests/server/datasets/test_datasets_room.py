"""Uploads and data sets of one home: what goes wrong in between, what is refused, what is kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cliptune.errors import (
    ConflictError,
    DataError,
    DatasetNotFoundError,
    DiskFullError,
    InvalidInputError,
    NotFoundError,
    PathOutsideRootsError,
)
from cliptune.v1 import data_pb2, job_pb2
from cliptune.v1.job_pb2 import JOB_STATE_RUNNING
from cliptune_server.datasets.datasets import Datasets
from cliptune_server.datasets.stored import StoredDatasets
from tests.server.datasets.house import (
    FILES,
    Files,
    begin_request,
    chunks,
    folder_files,
    open_datasets,
    upload,
)
from tests.server.training.house import collect, create, in_state, open_jobs, peer_spec


async def test_a_data_set_appears_whole_with_its_checksums_and_is_listed(tmp_path: Path) -> None:
    async with open_datasets(tmp_path / "data") as datasets:
        made = await upload(datasets)
        assert (made.name, made.files, made.entry) == ("cells", 3, "captions.csv")
        assert made.bytes == sum(map(len, FILES.values()))
        listed = await datasets.list()
        assert (list(listed.datasets), listed.used_bytes, listed.quota_bytes) == ([made], made.bytes, 0)
    folder = tmp_path / "data" / "cells"
    assert folder_files(folder / "files") == dict(FILES)
    assert {path.name for path in folder.iterdir()} == {"dataset.json", "files", "files.sha256"}
    lines = (folder / "files.sha256").read_text().splitlines()  # as `sha256sum -c` reads it
    sums = dict(line.split("  ")[::-1] for line in lines)
    assert sums == {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()}
    assert not list((tmp_path / "data" / ".uploads").iterdir())


async def test_an_upload_goes_on_at_the_byte_where_it_broke_off_under_the_next_daemon(tmp_path: Path) -> None:
    async def broken(upload_id: str) -> AsyncIterator[data_pb2.UploadFilesRequest]:
        sent = 0
        async for request in chunks(upload_id):
            yield request
            sent += 1
            if sent == 3:
                raise ConnectionError("the client is gone")

    async with open_datasets(tmp_path / "data") as datasets:
        begun = await datasets.begin(begin_request())
        with pytest.raises(ConnectionError):
            await datasets.receive(broken(begun.upload_id))
        assert list((await datasets.begin(begin_request())).held_bytes) == [21, 0, 0]
        assert (await datasets.list()).used_bytes == 21
    (tmp_path / "data" / ".uploads" / ".new-leftover").mkdir()
    async with open_datasets(tmp_path / "data") as datasets:
        again = await datasets.begin(begin_request())
        assert again.upload_id == begun.upload_id
        assert list(again.held_bytes) == [21, 0, 0]
        with pytest.raises(ConflictError, match=r"captions.csv holds 21 of 27 bytes"):
            await datasets.finish(again.upload_id)
        rest = chunks(again.upload_id, held=list(again.held_bytes))
        assert await datasets.receive(rest) == sum(map(len, FILES.values())) - 21
        made = await datasets.finish(again.upload_id)
        assert await datasets.finish(again.upload_id) == made  # its answer may have been lost
        known = await datasets.begin(begin_request())
        assert known.finished
        assert await datasets.finish(known.upload_id) == made
    assert folder_files(tmp_path / "data" / "cells" / "files") == dict(FILES)
    assert not list((tmp_path / "data" / ".uploads").iterdir())


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_file_with_another_checksum_is_refused_and_sent_again(
    tmp_path: Path, restarted: bool
) -> None:
    damaged = {**FILES, "a.png": b"not reaIIy"}
    root = tmp_path / "data"
    async with open_datasets(root) as datasets:
        begun = await datasets.begin(begin_request())
        if not restarted:
            with pytest.raises(DataError, match=r"a\.png has another checksum"):
                await datasets.receive(chunks(begun.upload_id, damaged))
    if restarted:  # the bytes came over several connections, and the disk changed one in between
        path = root / ".uploads" / begun.upload_id / "files" / "a.png"
        path.write_bytes(damaged["a.png"])
    async with open_datasets(root) as datasets:
        again = await datasets.begin(begin_request())
        await datasets.receive(chunks(again.upload_id, held=list(again.held_bytes)))
        if restarted:
            with pytest.raises(DataError, match=r"a\.png has another checksum"):
                await datasets.finish(again.upload_id)
            again = await datasets.begin(begin_request())
            assert list(again.held_bytes) == [27, 0, 0]
            await datasets.receive(chunks(again.upload_id, held=list(again.held_bytes)))
        await datasets.finish(again.upload_id)
    assert folder_files(root / "cells" / "files") == dict(FILES)


BAD_PATHS = ["/etc/passwd", "../up", "a/../../up", "a//b", "a/", ".", "", "a\\b", "a\nb", "x" * 256, "a/./b"]


@pytest.mark.parametrize("path", BAD_PATHS)
async def test_a_path_that_leads_elsewhere_is_refused_before_anything_is_written(
    tmp_path: Path, path: str
) -> None:
    async with open_datasets(tmp_path / "data") as datasets:
        with pytest.raises(DataError, match="is no path of a file in a data set"):
            await datasets.begin(begin_request(files={"ok.csv": b"", path: b"x"}))
    assert not list((tmp_path / "data").rglob("*"))


WRONG: list[tuple[data_pb2.BeginUploadRequest, str]] = [
    (begin_request(name="../cells"), "is no name of a data set"),
    (begin_request(name=".uploads"), "is no name of a data set"),
    (begin_request(files={}), "a data set without files"),
    (begin_request(files={"a": b"x", "a/b": b"y"}), "have one place on the daemon's disk"),
    (begin_request(entry="train.csv"), "the data set has no train.csv; it has a.png, captions.csv"),
    (begin_request(files={"a.csv": b"", "b.csv": b""}), "several tables: a.csv, b.csv"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
async def test_what_cannot_be_a_data_set_is_refused_with_the_reason(tmp_path: Path, number: int) -> None:
    request, reason = WRONG[number]
    async with open_datasets(tmp_path / "data") as datasets:
        with pytest.raises(InvalidInputError, match=reason):
            await datasets.begin(request)
        request.files.add(path="again.csv", bytes=1, sha256=b"short")
        with pytest.raises(InvalidInputError):
            await datasets.begin(request)
        assert not (await datasets.list()).used_bytes


async def test_bytes_that_were_not_announced_are_refused(tmp_path: Path) -> None:
    async with open_datasets(tmp_path / "data") as datasets:
        begun = await datasets.begin(begin_request())

        async def send(**fields: Any) -> int:
            async def one() -> AsyncIterator[data_pb2.UploadFilesRequest]:
                yield data_pb2.UploadFilesRequest(**{"upload_id": begun.upload_id, **fields})

            return await datasets.receive(one())

        with pytest.raises(ConflictError, match=r"a\.png holds 0 bytes; what was sent begins at 4"):
            await send(file=1, offset=4, chunk=b"late")
        with pytest.raises(InvalidInputError, match=r"a\.png was announced with 10 bytes"):
            await send(file=1, offset=0, chunk=b"more than ten")
        with pytest.raises(InvalidInputError, match="there is no file 3"):
            await send(file=3, offset=0, chunk=b"x")
        with pytest.raises(NotFoundError, match="begin it again"):
            await send(upload_id="nobody", file=0, chunk=b"x")
        # A link that somebody put in a file's place leads nowhere.
        path = tmp_path / "data" / ".uploads" / begun.upload_id / "files" / "a.png"
        path.unlink()
        (tmp_path / "outside").write_bytes(b"")
        path.symlink_to(tmp_path / "outside")
        with pytest.raises(OSError, match="symbolic links"):
            await send(file=1, offset=0, chunk=b"x")
        assert (tmp_path / "outside").read_bytes() == b""


async def test_the_connection_that_came_last_goes_on_and_the_earlier_one_is_told(tmp_path: Path) -> None:
    async with open_datasets(tmp_path / "data") as datasets:
        begun = await datasets.begin(begin_request())
        turn = asyncio.Event()

        async def slow() -> AsyncIterator[data_pb2.UploadFilesRequest]:
            requests = chunks(begun.upload_id)
            yield await anext(requests)
            turn.set()
            await over.wait()
            yield await anext(requests)

        over = asyncio.Event()
        first = asyncio.create_task(datasets.receive(slow()))
        await turn.wait()
        with pytest.raises(ConflictError, match="other files are being uploaded"):
            await datasets.begin(begin_request(files={"b.csv": b"x"}))
        held = list((await datasets.begin(begin_request())).held_bytes)
        await datasets.receive(chunks(begun.upload_id, held=held))
        over.set()
        with pytest.raises(ConflictError, match="another connection goes on"):
            await first
        assert (await datasets.finish(begun.upload_id)).files == 3


async def test_other_files_under_a_name_need_the_old_ones_gone(tmp_path: Path) -> None:
    other: Files = {"b.csv": b"image,caption\n"}
    async with open_datasets(tmp_path / "data") as datasets:
        first = await datasets.begin(begin_request())
        newest = await datasets.begin(begin_request(files=other))  # nobody sends to the first any more
        with pytest.raises(NotFoundError):
            await datasets.abort(first.upload_id)
        await datasets.abort(newest.upload_id)
        await upload(datasets)
        with pytest.raises(ConflictError, match="another data set is called 'cells'"):
            await datasets.begin(begin_request(files=other))
        await datasets.delete("cells")
        assert (await upload(datasets, files=other)).entry == "b.csv"
        (tmp_path / "data" / "mine").mkdir()
        with pytest.raises(ConflictError, match="is no data set"):
            await datasets.begin(begin_request(name="mine"))
        assert [each.name for each in (await datasets.list()).datasets] == ["cells"]


async def test_files_that_are_here_already_are_not_sent_again_and_stay_apart(tmp_path: Path) -> None:
    root = tmp_path / "data"
    files = {"t.csv": b"image,caption\n", "a.bin": b"a" * 100, "b.bin": b"b" * 100, "c.bin": b"c" * 100}
    async with open_datasets(root) as datasets:
        begun = await datasets.begin(begin_request(files=files))
        await datasets.receive(chunks(begun.upload_id, dict(list(files.items())[:2])))
        edited = {**files, "t.csv": b"image,text\n"}  # the table was mended before all had arrived
        again = await datasets.begin(begin_request(files=edited))
        assert list(again.held_bytes) == [0, 100, 0, 0]
        await datasets.receive(chunks(again.upload_id, edited, held=list(again.held_bytes)))
        await datasets.finish(again.upload_id)
        # A second version of a finished one: the same pictures under other names, and a table of its own.
        second = {"t.csv": b"x\n", **{f"p/{name}": files[name] for name in ("a.bin", "b.bin", "c.bin")}}
        linked = await datasets.begin(begin_request("cells-2", second))
        assert list(linked.held_bytes) == [0, 100, 100, 100]
        mine = root / ".uploads" / linked.upload_id / "files" / "p" / "b.bin"
        assert mine.stat().st_ino == (root / "cells" / "files" / "b.bin").stat().st_ino
        # What the disk damaged is found by its checksum, and sent again into a file of its own.
        (root / "cells" / "files" / "c.bin").write_bytes(b"C" * 100)
        await datasets.receive(chunks(linked.upload_id, second, held=list(linked.held_bytes)))
        with pytest.raises(DataError, match=r"c\.bin has another checksum"):
            await datasets.finish(linked.upload_id)
        mended = await upload(datasets, "cells-2", second)
        await datasets.delete("cells")
        assert mended.bytes == 302
        assert folder_files(root / "cells-2" / "files") == second


async def test_the_quota_counts_what_uploads_under_way_have_announced(tmp_path: Path) -> None:
    async with open_datasets(tmp_path / "data", quota_bytes=100) as datasets:
        await upload(datasets, "first", {"a.csv": b"x" * 40})
        begun = await datasets.begin(begin_request("second", {"a.csv": b"x" * 50}))
        with pytest.raises(DiskFullError, match="data sets take 90 of 100") as caught:
            await datasets.begin(begin_request("third", {"a.csv": b"x" * 20}))
        assert caught.value.metadata["quota_bytes"] == "100"
        assert (
            await datasets.begin(begin_request("second", {"a.csv": b"x" * 50}))
        ).upload_id == begun.upload_id
        await datasets.delete("second")  # also one that is not finished
        await upload(datasets, "third", {"a.csv": b"x" * 20})
        listed = await datasets.list()
        assert (listed.used_bytes, listed.quota_bytes) == (60, 100)


async def test_a_disk_without_room_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    request = begin_request()
    request.files[0].bytes = 2**60
    async with open_datasets(tmp_path / "data") as datasets:
        with pytest.raises(DiskFullError, match="are free where"):
            await datasets.begin(request)


async def test_an_upload_that_nobody_goes_on_with_is_removed(tmp_path: Path) -> None:
    async with open_datasets(tmp_path / "data") as datasets:
        begun = await datasets.begin(begin_request())
    request = tmp_path / "data" / ".uploads" / begun.upload_id / "request.bin"
    week_ago_s = time.time() - 8 * 24 * 3600
    os.utime(request, (week_ago_s, week_ago_s))
    async with open_datasets(tmp_path / "data") as datasets:
        with pytest.raises(NotFoundError):
            await datasets.abort(begun.upload_id)
    assert not list((tmp_path / "data" / ".uploads").iterdir())


async def test_a_damaged_data_set_is_left_out_and_the_others_are_there(tmp_path: Path) -> None:
    async with open_datasets(tmp_path / "data") as datasets:
        await upload(datasets, "whole")
        await upload(datasets, "torn")
        (tmp_path / "data" / "torn" / "dataset.json").write_text("{")
        assert [each.name for each in (await datasets.list()).datasets] == ["whole"]
        with pytest.raises(DataError, match="is damaged"):
            await datasets.get(data_pb2.GetDatasetRequest(name="torn"))
        with pytest.raises(DatasetNotFoundError, match="there is whole"):
            await datasets.get(data_pb2.GetDatasetRequest(name="hole"))


async def test_a_job_reads_a_data_set_by_name_and_keeps_it_from_being_deleted(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        root = tmp_path / "home" / "data"
        async with open_datasets(root, users=jobs.users_of) as datasets:
            await upload(
                datasets, "cells", {"t/captions.csv": b"image,caption\n", "t/more.csv": b""}, "t/captions.csv"
            )
            await upload(datasets, "folders", {"cat/1.png": b"x", "dog/2.png": b"y"})
            files = root / "cells" / "files"
            spec = peer_spec(tmp_path, steps=100_000)
            spec.data.train = "dataset:cells"
            spec.data.validation = "dataset:cells/t/more.csv"
            spec.data.image_root = "dataset:cells/t"
            job = await create(jobs, spec)
            assert job.spec.data.train == str(files / "t" / "captions.csv")
            assert job.spec.data.validation == str(files / "t" / "more.csv")
            assert job.spec.data.image_root == str(files / "t")
            with pytest.raises(ConflictError, match=f"'cells' is used by {job.id}"):
                await datasets.delete("cells")
            assert folder_files(files)
            await collect(jobs, job.id, until=in_state(JOB_STATE_RUNNING))
            await jobs.control(job.id, job_pb2.JobCommand(cancel=job_pb2.CancelCommand()))
            await datasets.delete("cells")
            assert not (root / "cells").exists()
            for reference, error in (
                ("dataset:cells", DatasetNotFoundError),
                ("dataset:", DatasetNotFoundError),
                ("dataset:folders/../../../x", DataError),
                ("dataset:folders/bird", DataError),
                ("/etc/hostname", PathOutsideRootsError),
            ):
                spec.data.train = reference
                with pytest.raises(error):
                    await create(jobs, spec)
            await datasets.delete("folders")


async def test_folders_and_patterns_are_admitted_as_data(tmp_path: Path) -> None:
    async with open_jobs(tmp_path) as jobs:
        async with open_datasets(tmp_path / "home" / "data", users=jobs.users_of) as datasets:
            await upload(datasets, "shards", {f"s-{i}.tar": b"x" for i in range(3)}, "s-{0..2}.tar")
        spec = peer_spec(tmp_path, steps=1)
        (tmp_path / "shards").mkdir()
        for given, admitted in (
            ("dataset:shards", str(tmp_path / "home" / "data" / "shards" / "files" / "s-{0..2}.tar")),
            (str(tmp_path / "shards"), str(tmp_path / "shards")),
            (str(tmp_path / "shards" / "a-*.tar"), str(tmp_path / "shards" / "a-*.tar")),
        ):
            spec.data.train = given
            assert (await create(jobs, spec)).spec.data.train == admitted
        for given, error in (
            (str(tmp_path / "nowhere" / "a-*.tar"), DataError),
            (str(tmp_path / "shards" / "*" / ".." / ".." / "x"), DataError),
            ("/etc/*.tar", PathOutsideRootsError),
        ):
            spec.data.train = given
            with pytest.raises(error):
                await create(jobs, spec)


async def test_a_data_set_that_a_job_took_up_meanwhile_is_put_back(tmp_path: Path) -> None:
    asked: list[str] = []

    def users(name: str, files: Path) -> list[str]:
        asked.append(name)
        return [] if len(asked) == 1 else ["cells-1 (new)"]

    async with open_datasets(tmp_path / "data", users=users) as datasets:
        await upload(datasets)
        with pytest.raises(ConflictError, match=r"cells-1 \(new\)"):
            await datasets.delete("cells")
        assert len(asked) == 2
        assert folder_files(tmp_path / "data" / "cells" / "files") == dict(FILES)


async def test_the_manifest_tells_what_was_uploaded(tmp_path: Path) -> None:
    async with open_datasets(tmp_path / "data") as datasets:
        made = await upload(datasets)
    written = json.loads((tmp_path / "data" / "cells" / "dataset.json").read_text())
    content = hashlib.sha256()
    for path, data in sorted(FILES.items()):
        content.update(f"{hashlib.sha256(data).hexdigest()} {len(data)} {path}\n".encode())
    assert written["sha256"] == made.sha256 == content.hexdigest()
    assert StoredDatasets(tmp_path / "data").find("cells").message() == made
    assert isinstance(datasets, Datasets)
