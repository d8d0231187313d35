"""Data sets through both clients and the command line, over connections that break."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from cliptune import (
    AsyncClient,
    Client,
    ConflictError,
    Dataset,
    DatasetNotFoundError,
    DiskFullError,
    InvalidInputError,
    UnavailableError,
)
from cliptune.cli.data import data as verb
from cliptune.cli.main import build_parser
from tests.sdk.cutting_proxy import cutting_proxy
from tests.server.datasets.house import folder_files, open_datasets, serving
from tests.support import images
from tests.support.datasets import write_shapes

MIB = 1024 * 1024


def write_big(folder: Path) -> Path:
    """Some MiB in a few files of odd sizes, an empty one among them."""
    folder.mkdir()
    for number, size in enumerate((3 * MIB + 7, 0, 1, 2 * MIB, MIB - 1)):
        (folder / f"{number}.bin").write_bytes(bytes([number + 1]) * size)
    return folder


async def upload_by(kind: str, address: str, path: Path, **fields: Any) -> Dataset:
    if kind == "aio":
        async with AsyncClient(address) as client:
            return await client.upload_dataset(path, **fields)

    def run() -> Dataset:
        with Client(address) as client:
            return client.upload_dataset(path, **fields)

    return await asyncio.to_thread(run)


@pytest.mark.parametrize("kind", ["sync", "aio"])
async def test_an_upload_goes_on_by_itself_after_a_connection_breaks_again_and_again(
    tmp_path: Path, kind: str
) -> None:
    folder = write_big(tmp_path / "big")
    async with open_datasets(tmp_path / "data") as datasets, serving(datasets) as address:
        with cutting_proxy(address, [MIB + MIB // 2, 2 * MIB, 100_000]) as proxy:
            made = await upload_by(kind, proxy.address, folder)
            assert proxy.connections >= 4
    assert (made.name, made.files, made.bytes) == ("big", 5, 6 * MIB + 7)
    assert folder_files(tmp_path / "data" / "big" / "files") == folder_files(folder)


@pytest.mark.parametrize("kind", ["sync", "aio"])
async def test_an_upload_survives_a_restart_of_the_daemon(tmp_path: Path, kind: str) -> None:
    folder = write_big(tmp_path / "big")
    async with AsyncExitStack() as first:
        datasets = await first.enter_async_context(open_datasets(tmp_path / "data"))
        address = await first.enter_async_context(serving(datasets))
        stopping = asyncio.Event()
        received, receive = asyncio.Event(), datasets.receive

        async def receive_a_part(requests: Any) -> int:
            async def until_stopped() -> Any:
                async for request in requests:
                    yield request
                    received.set()
                    await stopping.wait()

            return await receive(until_stopped())

        datasets.receive = receive_a_part  # type: ignore[method-assign]
        uploading = asyncio.create_task(upload_by(kind, address, folder))
        await received.wait()
    stopping.set()
    async with open_datasets(tmp_path / "data") as again, serving(again, int(address.rpartition(":")[2])):
        listed = await again.list()
        assert 0 < listed.used_bytes <= 6 * MIB + 7
        made = await uploading
    assert folder_files(tmp_path / "data" / made.name / "files") == folder_files(folder)


@pytest.mark.parametrize("kind", ["sync", "aio"])
async def test_a_daemon_that_stays_away_is_told_after_the_time_for_that(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    with pytest.raises(UnavailableError, match=r"no daemon answers at 127\.0\.0\.1:1"):
        await upload_by(kind, "127.0.0.1:1", tmp_path / "a.tar", reconnect_s=0.2)


@pytest.mark.parametrize("kind", ["sync", "aio"])
async def test_refusals_of_the_daemon_reach_the_caller_as_their_own_class(tmp_path: Path, kind: str) -> None:
    folder = write_shapes(tmp_path / "shapes", rows=4).folder
    async with (
        open_datasets(tmp_path / "data", quota_bytes=50_000) as datasets,
        serving(datasets) as address,
    ):
        made = await upload_by(kind, address, folder)
        assert made.entry == "data.csv"
        assert await upload_by(kind, address, folder) == made
        (folder / "images" / "new.png").write_bytes(images.png())
        with pytest.raises(ConflictError, match="another data set is called 'shapes'"):
            await upload_by(kind, address, folder)
        with pytest.raises(DiskFullError, match="of 50,000"):
            await upload_by(kind, address, write_big(tmp_path / "big"))
        with pytest.raises(InvalidInputError, match="is no name of a data set"):
            await upload_by(kind, address, folder, name="../shapes")


def command(address: str, *words: str) -> int:
    options = build_parser({"data": verb}).parse_args(["data", *words, "--address", address])
    return verb.run(options)


async def test_the_command_line_uploads_lists_shows_and_deletes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = write_shapes(tmp_path / "shapes", rows=12)

    async def said(*words: str) -> str:
        assert await asyncio.to_thread(command, address, *words) == 0
        return capsys.readouterr().out

    async with open_datasets(tmp_path / "data") as datasets, serving(datasets) as address:
        uploaded = await said("upload", str(shapes.csv), "--name", "cells")
        assert uploaded.startswith("cells: data.csv, 13 files")
        assert "cells  data.csv  13" in await said("list")
        shown = await said("show", "cells", "--samples", "3", "--pictures", str(tmp_path / "pictures"))
        assert "12 rows" in shown
        assert shown.count("a red") >= 1
        assert "ROW  IMAGE" in shown
        pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
        assert pictures == ["cells-1.jpg", "cells-5.jpg", "cells-9.jpg", "index.html"]
        page = (tmp_path / "pictures" / "index.html").read_text()
        assert page.count("<img") == 3
        asjson = json.loads(await said("show", "cells", "--json"))
        assert (asjson["rows"], len(asjson["samples"])) == ("12", 8)
        assert await said("delete", "cells") == ""
        with pytest.raises(DatasetNotFoundError, match="nothing is uploaded yet"):
            await said("show", "cells")
