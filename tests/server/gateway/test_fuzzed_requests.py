"""Whatever is sent, over whichever face: each request is answered, and rightly; the daemon stays as it was.

`python -m bench.endurance --requests 10000` sends more of the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import httpx
import pytest

from cliptune.errors import InvalidInputError
from cliptune.wire import error_from_rpc
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.fuzzing import fuzz
from tests.support.memory import resident_bytes
from tests.support.models import publish_test_model

REQUESTS = 800
GROWTH_BYTES = 64 * 2**20


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    home = tmp_path_factory.mktemp("fuzzed") / "home"
    publish_test_model(home, "shapes", serve=True)
    with running_daemon(home) as daemon:
        yield daemon


def test_every_fuzzed_request_is_answered_or_was_given_up_by_its_own_client(daemon: RunningDaemon) -> None:
    outcomes = asyncio.run(fuzz(daemon.grpc, daemon.url, requests=REQUESTS // 2, seed=1))
    before = resident_bytes(daemon.pid)
    outcomes += asyncio.run(fuzz(daemon.grpc, daemon.url, requests=REQUESTS // 2, seed=2))
    after = resident_bytes(daemon.pid)
    assert outcomes.total() == REQUESTS
    kinds = {outcome.partition(": ")[2] for outcome in outcomes}
    assert {"answered", "left", "its only item was refused", "DeadlineExceededError"} <= kinds
    assert set(after) == set(before), "a process was replaced"
    for pid, size in after.items():
        assert size - before[pid] < GROWTH_BYTES
    assert httpx.get(f"{daemon.url}/readyz").status_code == 200


@pytest.mark.parametrize("streams", [False, True])
def test_bytes_that_are_no_message_are_the_callers_fault(daemon: RunningDaemon, streams: bool) -> None:
    with grpc.insecure_channel(daemon.grpc) as channel:
        if streams:
            stream = channel.stream_stream("/cliptune.v1.InferenceService/EmbedStream")
            answers = stream(iter([b"\x0a\xff\xff"]), timeout=30)
        else:
            answers = channel.unary_stream("/cliptune.v1.InferenceService/EmbedTexts")(
                b"\x0a\xff", timeout=30
            )
        with pytest.raises(grpc.RpcError) as failed:
            list(answers)
    assert isinstance(error_from_rpc(failed.value), InvalidInputError)
