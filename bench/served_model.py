"""A CLIP with random weights, served by a real daemon, and the same one in this process as its peer.

Enters: an architecture. Leaves: the daemon's handle and the `Clip`. Used by `serving` and `latency`; speed
does not depend on what the weights are.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, manifest_of
from cliptune_model.source import ModelSource
from cliptune_server.catalog.model_files import ModelFiles
from tests.support.daemon import RunningDaemon, running_daemon

MODEL = "benched"


@contextmanager
def served_model(
    architecture: str, *, threads: int, device: str = "cpu", flags: Sequence[str] = ()
) -> Iterator[tuple[RunningDaemon, Clip]]:
    """A daemon that serves it as `MODEL`, ready, with so many threads; `flags`: more of `cliptune serve`.

    The model in this process is on the same device.
    """
    clip = build(ModelSource(name=architecture), device="cpu")
    with tempfile.TemporaryDirectory(prefix="cliptune-bench-") as folder:
        home = Path(folder) / "home"
        files = ModelFiles(home / "models")
        export = files.root / ".staging" / "export"
        export.parent.mkdir(parents=True)
        export_model(clip, export, manifest_of(clip, job_id=""))
        files.publish(export, name=MODEL, job_id="", metrics={})
        (home / "serving.json").write_text(json.dumps({"references": [MODEL]}))
        # A benchmark sends the same picture again and again, and wants each to be computed.
        flags = ("--embedding-cache", "0", *flags)
        with running_daemon(home, threads=threads, device=device, flags=flags) as daemon:
            clip.model.to(device)
            yield daemon, clip
