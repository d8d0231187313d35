"""Tiny real models with random weights, exported, and published into a home that no daemon holds yet.

`cliptune-test-vit` learns and answers in milliseconds on one thread; a seed makes its weights, so that two
versions of it give different vectors and the same seed the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, manifest_of
from cliptune_model.source import ModelSource
from cliptune_server.catalog.model_files import ModelFiles, PublishedModel

TEST_MODEL = "cliptune-test-vit"


def build_test_clip(seed: int = 0) -> Clip:
    """A `cliptune-test-vit` with the random weights of this seed, on the CPU."""
    return build(ModelSource(name=TEST_MODEL), device="cpu", seed=seed)


def export_test_model(
    directory: Path, *, seed: int = 0, job_id: str = "", metrics: Mapping[str, float] | None = None
) -> Clip:
    """Write the model of this seed to `directory` as the trainer would, and return it."""
    clip = build_test_clip(seed)
    export_model(clip, directory, manifest_of(clip, job_id=job_id, metrics=metrics))
    return clip


def publish_test_model(
    home: Path,
    name: str = "shapes",
    *,
    seed: int = 0,
    aliases: Sequence[str] = (),
    job_id: str = "",
    serve: bool = False,
) -> PublishedModel:
    """Publish the model of this seed as the next version of `name` into a home; no daemon may run on it.

    `serve`: the daemon that starts next loads it, under its first alias or else its name, before it says
    that it is ready.
    """
    files = ModelFiles(home / "models")
    files.root.mkdir(parents=True, exist_ok=True)
    export = home / "models" / ".staging" / f"test-export-{name}"
    export_test_model(export, seed=seed, job_id=job_id)
    model = files.publish(export, name=name, job_id=job_id, metrics={})
    if aliases:
        files.write_aliases(name, {**files.aliases(name), **dict.fromkeys(aliases, model.version)})
    if serve:
        serving = home / "serving.json"
        served = json.loads(serving.read_text())["references"] if serving.exists() else []
        reference = f"{name}@{aliases[0]}" if aliases else name
        serving.write_text(json.dumps({"references": sorted({*served, reference})}))
    return model
