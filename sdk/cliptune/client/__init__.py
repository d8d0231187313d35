"""The synchronous client: carries out the calls of the codecs over one gRPC channel.

    with Client() as client:
        job = client.create_job("spec.toml")
        for event in client.watch_job(job.id): ...
        vectors = client.embed_images(["cat.jpg"], model="pets@prod")

`AsyncClient` has the same methods with the same arguments. Both are safe to share between threads (tasks).
"""

from __future__ import annotations

from cliptune.client.datasets import DatasetCalls
from cliptune.client.inference import InferenceCalls
from cliptune.client.jobs import JobCalls
from cliptune.client.models import ModelCalls


class Client(JobCalls, ModelCalls, InferenceCalls, DatasetCalls):
    """A connection to one daemon.

    `address`: "HOST:PORT"; None: CLIPTUNE_ADDRESS, else the daemon of CLIPTUNE_HOME, else 127.0.0.1:50051.
    `timeout_s`: deadline of a call that has none of its own. `attempts`: how often a safe call is sent while
    the daemon is away (1 to 5, with backoff). Connects at the first call. Every method raises
    `CliptuneError`s.
    """
