"""The model that is served while nothing else is: from a package on this machine, without a download.

Enters: a name of `cliptune.embedded`. Leaves: a published version of that name in the registry, made once and
again when the package brings other weights. Called by `models.py` at the daemon's start.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil

from cliptune.embedded import embedded_digest, embedded_folder
from cliptune.errors import CliptuneError, WeightsUnavailableError
from cliptune_server.catalog.model_files import MANIFEST, PublishedModel
from cliptune_server.catalog.registry import Registry

log = logging.getLogger(__name__)


async def take_in(registry: Registry, name: str) -> PublishedModel | None:
    """The version in the registry with the package's weights. None, and a line in the log: there is none.

    What the package holds is checked before it is copied, and the engine checks the copy before it serves it.
    A daemon starts without it too: it is there for newcomers, not for those who have models.
    """
    try:
        digest = await asyncio.to_thread(embedded_digest, name)
        for model in await registry.models(name):
            if await asyncio.to_thread(_digest, model) == digest:
                return model
        draft = registry.draft()
        try:
            source = await asyncio.to_thread(embedded_folder, name)
            await asyncio.to_thread(shutil.copytree, source, draft)
            return await registry.publish(draft, name=name, job_id="", metrics={})
        finally:
            await asyncio.to_thread(shutil.rmtree, draft, ignore_errors=True)
    except WeightsUnavailableError as error:
        log.info("nothing is served by default: %s", error)
        return None
    except (CliptuneError, OSError) as error:
        log.warning("%s is not served by default: %s", name, error)
        return None


def _digest(model: PublishedModel) -> str:
    """Of the weights that a version was published with."""
    try:
        manifest = json.loads((model.path / MANIFEST).read_text(encoding="utf-8"))
        return str(manifest.get("weights_sha256") or "")
    except (OSError, ValueError, AttributeError):
        return ""
