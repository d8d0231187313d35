"""A model measured on rows of data, at one image size or over several.

Enters: a spec's data and evaluation, and a model. Leaves: a `ResolutionSweep`; its JSON and picture. Called
by `cliptune eval`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip

from cliptune.durable import write_atomically
from cliptune.embedded import is_embedded
from cliptune.errors import DataError
from cliptune.sweep import ResolutionSweep
from cliptune.v1 import spec_pb2
from cliptune_model.clip import Clip, build
from cliptune_model.machine.device import choose_device
from cliptune_model.manifest import MANIFEST_FILE, read_manifest
from cliptune_model.proven_sizes import Size
from cliptune_model.source import CONFIG_FOLDER, HF_HUB, LOCAL_DIR, ModelSource
from cliptune_trainer.data.dataset import Dataset, read_dataset
from cliptune_trainer.data.forms.columns import Wording
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.evaluation.classes import decide_judging
from cliptune_trainer.evaluation.degrade import Degrade
from cliptune_trainer.evaluation.measure import evaluate
from cliptune_trainer.evaluation.measurement import Measurement
from cliptune_trainer.evaluation.sweep import sweep_sizes
from cliptune_trainer.evaluation.sweep_picture import draw_sweep
from cliptune_trainer.remark import Remark
from cliptune_trainer.resolution.rounding import fit_side
from cliptune_trainer.spec import Spec, from_proto


def source_of(name: str) -> ModelSource | None:
    """The model that a name means by itself; None: it may be a published one."""
    if Path(name).is_dir():
        return ModelSource(name=f"{LOCAL_DIR}{Path(name).absolute()}")
    shipped = (CONFIG_FOLDER / f"{name}.json").is_file()
    own = name.startswith((LOCAL_DIR, HF_HUB)) or is_embedded(name) or shipped
    return ModelSource(name=name) if own or name in open_clip.list_models() else None


def measure(
    message: spec_pb2.JobSpec, model: str, *, device: str, on_remark: Callable[[str], None]
) -> ResolutionSweep:
    """The sweep of a model over the validation rows of a spec.

    Args:
        message: its data and evaluation count.
        model: as `source_of` takes it.
        device: "auto", "cpu", "mps", "cuda" or "cuda:N".
        on_remark: told what is done otherwise than asked, such as a size that is rounded.

    Raises:
        DataError: no validation rows, or none that can be judged.
        InvalidInputError: a size or a device that cannot be had, or no such model.
    """
    spec = from_proto(message)
    source = source_of(model) or ModelSource(name=model)
    clip = build(source, device=choose_device(device).value)
    dataset = read_dataset(
        spec.data,
        DataRoots(),
        seed=spec.train.seed,
        wording=Wording(names=spec.evaluation.label_names, templates=spec.evaluation.prompt_templates),
    )
    if not len(dataset.validation):
        raise DataError("there are no validation rows to measure on")
    remarks: list[Remark] = []
    sizes = [
        fit_side(clip, side, f"evaluation.resolutions[{place}]", remarks)
        for place, side in enumerate(spec.evaluation.resolutions)
    ]
    for remark in remarks:
        on_remark(remark.message)
    return _swept(spec, clip, dataset, sizes, _usual(clip, source))


def keep(sweep: ResolutionSweep, title: str, folder: Path) -> None:
    """Writes `resolutions.json` and `resolutions.png`. Raises DiskFullError or OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "resolutions.json", json.dumps(sweep.to_mapping(), indent=1).encode())
    draw_sweep(sweep, title, folder / "resolutions.png")


def _usual(clip: Clip, source: ModelSource) -> Size:
    """The size that the model is served at."""
    folder = Path(source.name.removeprefix(LOCAL_DIR))
    if not (folder / MANIFEST_FILE).is_file():
        return clip.image_size
    return read_manifest(folder).serving_size or clip.image_size


def _swept(spec: Spec, clip: Clip, dataset: Dataset, sizes: list[Size], usual: Size) -> ResolutionSweep:
    config, several = spec.evaluation, bool(spec.data.label_separator)
    judging = decide_judging(config, dataset, several_labels=several)

    def at(clip: Clip, degrade: Degrade | None) -> Measurement:
        return evaluate(
            clip,
            dataset.validation,
            judging.classes,
            batch_size=config.batch_size,
            several_labels=several,
            main_metric=judging.main_metric,
            degrade=degrade,
        )

    return sweep_sizes(
        clip,
        at,
        sizes or [usual],
        main_metric=judging.main_metric,
        target=usual,
        batch_size=config.batch_size,
        degradations=config.degradations is not False,
        latency_budget_ms=config.latency_budget_ms,
    )
