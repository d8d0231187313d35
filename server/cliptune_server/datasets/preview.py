"""A look into a data set: sample rows and small pictures, made by a process of its own.

Enters: a finished data set. Leaves: a `GetDatasetResponse`. Called by `datasets.py`.

What was uploaded is a stranger's bytes. Decoding them in the daemon would put it at the mercy of every image
decoder, and doing it in the engine would let a picture that crashes one take the requests of others with it.
So a short-lived process does it, with limits on memory, processor time, time and what it may write. It costs
about half a second; the answer is kept, as a data set never changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from cliptune.v1 import data_pb2
from cliptune_server.datasets.stored import StoredDataset

log = logging.getLogger(__name__)

# Not the working directory: a file of that name in it would be imported.
_COMMAND: Final = (sys.executable, "-P", "-m", "cliptune_server.sampler")
_INHERITED: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
# A pool of threads for arithmetic reserves addresses for each core, which the limit of memory counts.
_ONE_THREAD: Final = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_LIMIT_S: Final = 60.0
_MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
_AT_A_TIME: Final = 2
_KEPT: Final = 32
_NOT_COUNTED: Final = -1


class Previews:
    """Looks that were taken, and the processes that take them."""

    def __init__(self, command: tuple[str, ...] = _COMMAND, *, limit_s: float = _LIMIT_S) -> None:
        self._command: Final = command
        self._limit_s: Final = limit_s
        self._kept: Final[OrderedDict[tuple[str, str, int], data_pb2.GetDatasetResponse]] = OrderedDict()
        self._free: Final = asyncio.Semaphore(_AT_A_TIME)

    async def of(self, dataset: StoredDataset, files: Path, samples: int) -> data_pb2.GetDatasetResponse:
        """Columns, rows and samples; as much of them as could be read."""
        key = (dataset.sha256, dataset.entry, samples)
        async with self._free:
            found = self._kept.get(key)
            if found is None:
                order = {"folder": str(files), "entry": dataset.entry, "samples": samples}
                found, whole = await self._ask(order, dataset.name)
                if whole:
                    self._kept[key] = found
                    while len(self._kept) > _KEPT:
                        self._kept.popitem(last=False)
        answer = data_pb2.GetDatasetResponse(dataset=dataset.message())
        answer.MergeFrom(found)
        return answer

    async def _ask(self, order: dict[str, object], name: str) -> tuple[data_pb2.GetDatasetResponse, bool]:
        """What a process found, and whether it came to its end."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**{key: os.environ[key] for key in _INHERITED if key in os.environ}, **_ONE_THREAD},
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        said = asyncio.create_task(process.stderr.read(_MAX_ANSWER_BYTES))
        told = data_pb2.GetDatasetResponse(rows=_NOT_COUNTED)
        why = ""
        try:
            async with asyncio.timeout(self._limit_s):
                with contextlib.suppress(ConnectionError):
                    process.stdin.write(json.dumps(order).encode())
                    process.stdin.close()
                    await process.stdin.wait_closed()
                await _read(process.stdout, told)
                if status := await process.wait():
                    why = f"ended with {status}: {(await said).decode('utf-8', 'replace').strip()[-500:]}"
        except TimeoutError:
            why = f"was not done within {self._limit_s:g} s"
        except (DecodeError, ValueError) as error:
            why = f"answered with something else: {error}"
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            said.cancel()
        if why:
            log.warning("the look into the data set %s is not whole: its process %s", name, why)
        return told, not why


async def _read(stream: asyncio.StreamReader, told: data_pb2.GetDatasetResponse) -> None:
    """Frames until the end: the first tells everything but the pictures, the others one picture each."""
    places: dict[int, int] = {}
    received = 0
    while True:
        try:
            (size,) = struct.unpack(">I", await stream.readexactly(4))
            received += size
            if received > _MAX_ANSWER_BYTES:
                raise ValueError(f"more than {_MAX_ANSWER_BYTES} bytes")
            content = await stream.readexactly(size)
        except asyncio.IncompleteReadError:
            return
        frame = data_pb2.GetDatasetResponse.FromString(content)
        if not places:
            told.CopyFrom(frame)
            places = {sample.row: place for place, sample in enumerate(frame.samples)}
            continue
        for sample in frame.samples:
            if sample.row in places:
                told.samples[places[sample.row]].image.CopyFrom(sample.image)
