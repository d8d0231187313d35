"""The asynchronous client: the methods of `Client`, awaited, over one `grpc.aio` channel.

    async with AsyncClient() as client:
        job = await client.create_job("spec.toml")
        async for event in client.watch_job(job.id): ...
        vectors = await client.embed_images(["cat.jpg"], model="pets@prod")

What is sent and how it is read stands in the codecs, shared with `Client`. Files are read in threads, so the
loop never waits for a disk.
"""

from __future__ import annotations

from cliptune.aio.datasets import AsyncDatasetCalls
from cliptune.aio.inference import AsyncInferenceCalls
from cliptune.aio.jobs import AsyncJobCalls
from cliptune.aio.models import AsyncModelCalls


class AsyncClient(AsyncJobCalls, AsyncModelCalls, AsyncInferenceCalls, AsyncDatasetCalls):
    """A connection to one daemon, for one event loop. Arguments and methods are `Client`'s."""
