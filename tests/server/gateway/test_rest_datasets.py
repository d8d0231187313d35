"""Data sets over REST: the app over real data sets, without a daemon around it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cliptune_server.gateway.app import build_app
from tests.server.datasets.house import FILES, Files, folder_files, open_datasets
from tests.server.gateway.bare import MAX_BODY_BYTES, bare_context, client_of
from tests.support import images

PICTURES: Files = {
    "t.csv": b"image,caption\np/0.png,a cell\np/1.png,broken\n",
    "p/0.png": images.png(),
    "p/1.png": b"?",
}


@asynccontextmanager
async def rest_of(root: Path, **config: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        open_datasets(root, **config) as datasets,
        client_of(build_app(bare_context(datasets=datasets))) as client,
    ):
        yield client


def body(name: str = "cells", files: Files = FILES, **fields: Any) -> dict[str, Any]:
    told = [
        {"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in files.items()
    ]
    return {"name": name, "files": told, **fields}


async def test_a_data_set_is_uploaded_in_parts_shown_and_deleted(tmp_path: Path) -> None:
    large = b"x" * (3 * MAX_BODY_BYTES)  # more than another request may have
    files = {**FILES, "large.bin": large}
    async with rest_of(tmp_path / "data") as rest:
        begun = await rest.post("/v1/uploads", json=body(files=files))
        assert begun.status_code == 201
        place = begun.headers["location"]
        assert place == f"/v1/uploads/{begun.json()['upload_id']}"
        assert begun.json()["held_bytes"] == [0, 0, 0, 0]
        for number, content in enumerate(files.values()):
            half = len(content) // 2
            for first, last in ((0, half), (half, len(content))):
                if first < last:
                    sent = await rest.put(
                        f"{place}/files/{number}",
                        content=content[first:last],
                        headers={"Content-Range": f"bytes {first}-{last - 1}/{len(content)}"},
                    )
                    assert sent.json() == {"received_bytes": last - first}
        made = (await rest.post(f"{place}/finish")).json()
        assert (made["name"], made["files"], made["entry"]) == ("cells", 4, "captions.csv")
        assert folder_files(tmp_path / "data" / "cells" / "files") == files
        again = (await rest.post("/v1/uploads", json=body(files=files))).json()
        assert again["finished"] is True
        listed = (await rest.get("/v1/datasets")).json()
        assert listed == {"datasets": [made], "used_bytes": made["bytes"], "quota_bytes": 0}
        assert (await rest.delete("/v1/datasets/cells")).status_code == 204
        gone = await rest.get("/v1/datasets/cells")
        assert (gone.status_code, gone.json()["reason"]) == (404, "DatasetNotFoundError")


async def test_sample_rows_link_to_their_pictures(tmp_path: Path) -> None:
    async with rest_of(tmp_path / "data") as rest:
        form = [("files", (path, content)) for path, content in PICTURES.items()]
        made = await rest.post("/v1/uploads/form", data={"name": "cells"}, files=form)
        assert (made.status_code, made.json()["files"]) == (201, 3)
        found = (await rest.get("/v1/datasets/cells", params={"samples": 2})).json()
        assert (found["dataset"], found["columns"], found["rows"]) == (made.json(), ["image", "caption"], 2)
        whole, broken = found["samples"]
        assert whole["fields"] == {"image": "p/0.png", "caption": "a cell"}
        assert broken["picture"] is None
        picture = await rest.get(whole["picture"])
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/jpeg")
        assert picture.content[:2] == b"\xff\xd8"
        assert picture.headers["x-content-type-options"] == "nosniff"
        missing = await rest.get("/v1/datasets/cells/pictures/2", params={"samples": 2})
        assert missing.status_code == 404


BAD: list[tuple[dict[str, Any], int, str]] = [
    (body(files={"../up": b"x"}), 400, "DataError"),
    (body(name="a b"), 400, "InvalidInputError"),
    (body(entry="b.csv"), 400, "DataError"),
    (body(colour="red"), 400, "InvalidInputError"),
    ({**body(), "files": [{"path": "a", "bytes": 1, "sha256": "00"}]}, 400, "InvalidInputError"),
    (body(files={"a": b"x" * 2000}), 507, "DiskFullError"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
async def test_a_wrong_beginning_is_refused_as_a_problem(tmp_path: Path, number: int) -> None:
    content, status, reason = BAD[number]
    async with rest_of(tmp_path / "data", quota_bytes=1000) as rest:
        answer = await rest.post("/v1/uploads", json=content)
        assert (answer.status_code, answer.json()["reason"]) == (status, reason)


async def test_wrong_parts_are_refused_and_what_came_is_kept(tmp_path: Path) -> None:
    async with rest_of(tmp_path / "data") as rest:
        begun = (await rest.post("/v1/uploads", json=body())).json()
        place = f"/v1/uploads/{begun['upload_id']}"
        for header, status, told in (
            ("bytes 5-8/27", 409, "captions.csv holds 0 bytes; what was sent begins at 5"),
            ("items 0-3/27", 400, "allowed: bytes FIRST-LAST/SIZE"),
            ("bytes 3-0/27", 400, "allowed: bytes FIRST-LAST/SIZE"),
            ("bytes 0-9/27", 400, "the body had 4 bytes; Content-Range says 10"),
        ):
            refused = await rest.put(f"{place}/files/0", content=b"imag", headers={"Content-Range": header})
            assert refused.status_code == status
            assert told in refused.json()["detail"]
        assert (await rest.post("/v1/uploads", json=body())).json()["held_bytes"] == [4, 0, 0]
        early = await rest.post(f"{place}/finish")
        assert (early.status_code, early.json()["reason"]) == (409, "ConflictError")
        assert (await rest.delete(place)).status_code == 204
        assert (await rest.delete(place)).status_code == 404
        assert (await rest.put(f"{place}/files/0", content=b"x")).status_code == 404


async def test_a_part_under_way_is_told_that_the_daemon_stops_and_what_came_is_kept(tmp_path: Path) -> None:
    begun_sending, never = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"image,"
        begun_sending.set()
        await never.wait()

    async with (
        open_datasets(tmp_path / "data") as datasets,
        client_of(build_app(bare_context(datasets=datasets))) as rest,
    ):
        begun = (await rest.post("/v1/uploads", json=body())).json()
        place = f"/v1/uploads/{begun['upload_id']}/files/0"
        sending = asyncio.create_task(rest.put(place, content=slowly()))
        await begun_sending.wait()
        datasets.end_uploads()
        told = await sending
        assert (told.status_code, told.json()["reason"]) == (503, "UnavailableError")
        assert (await rest.put(place, content=b"x")).status_code == 503
    async with rest_of(tmp_path / "data") as rest:
        assert (await rest.post("/v1/uploads", json=body())).json()["held_bytes"] == [6, 0, 0]
