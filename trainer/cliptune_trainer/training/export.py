"""The finished model, as a folder that the registry takes over.

Enters: the trained `Clip` and its metrics. Leaves: `export/` in the job's folder, whole or absent. Called by
the loop.
"""

from __future__ import annotations

from collections.abc import Mapping

from cliptune_model.clip import Clip
from cliptune_model.exported import export_model, manifest_of
from cliptune_model.proven_sizes import ProvenSize, Size
from cliptune_trainer.job import JobFolder


def export(
    job: JobFolder,
    clip: Clip,
    *,
    precision: str,
    metrics: Mapping[str, float],
    matryoshka_dims: tuple[int, ...] = (),
    adapter_alone: bool = False,
    serving_size: Size | None = None,
    proven_sizes: tuple[ProvenSize, ...] = (),
    guard: Mapping[str, float] | None = None,
) -> str:
    """Writes the model in open_clip's own format, or its adapter; returns the folder relative to the job's.

    Raises:
        DiskFullError: no space left; nothing is changed.
    """
    manifest = manifest_of(
        clip,
        precision=precision,
        job_id=job.job_id,
        metrics=metrics,
        matryoshka_dims=matryoshka_dims,
        serving_size=None if serving_size == clip.image_size else serving_size,
        proven_sizes=proven_sizes,
        guard=guard,
    )
    export_model(clip, job.export, manifest, adapter_alone=adapter_alone)
    return job.export.relative_to(job.path).as_posix()
