"""Writes a finished job's report.

Enters: a job that has succeeded, and its data. Leaves: `report/report.html` and `report/report.json`, each
whole or absent. Called by `run`, after the export. A report that cannot be written fails no job.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import tomli_w
from google.protobuf import json_format

from cliptune.durable import write_atomically
from cliptune.errors import CliptuneError
from cliptune.spec import spec_to_mapping
from cliptune.tracing import tracer
from cliptune.v1 import spec_pb2
from cliptune_model.exported import load_exported
from cliptune_trainer.data.dataset import Dataset
from cliptune_trainer.job import JobFolder
from cliptune_trainer.out_of_memory import is_out_of_memory
from cliptune_trainer.plan.decide import Decisions
from cliptune_trainer.report.examples import Examples, examples_of, samples_of
from cliptune_trainer.report.figures import figures_of
from cliptune_trainer.report.page import page_of
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.spec import Spec


def write_report(
    job: JobFolder, spec: Spec, dataset: Dataset, decisions: Decisions, reporter: Reporter
) -> None:
    """Writes both files; what stands in the way is told as a notice."""
    try:
        with tracer().start_as_current_span("report"):
            _write(job, spec, dataset, decisions)
    except (CliptuneError, OSError) as error:
        reporter.notice("report-failed", f"the report cannot be written: {error}")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reporter.notice("report-failed", "the report cannot be written: the device's memory is full")


def _write(job: JobFolder, spec: Spec, dataset: Dataset, decisions: Decisions) -> None:
    machine = decisions.hardware.machine
    figures = figures_of(
        job, spec, dataset, device_name=machine.gpu_name or machine.chip or platform.machine()
    )
    examples = Examples()
    if len(dataset.validation) and job.export.is_dir():
        # As it is published, from the disk: other weights than those that were trained last, it may be.
        clip = load_exported(job.export, device=decisions.hardware.device.value)
        batch_size = spec.evaluation.batch_size
        examples = examples_of(clip, dataset.validation, decisions.classes, batch_size=batch_size)
    text = tomli_w.dumps(spec_to_mapping(json_format.ParseDict(figures["spec"], spec_pb2.JobSpec())))
    page = page_of(figures, samples_of(dataset.train), examples, _pictures(job, figures["evaluations"]), text)
    job.report.mkdir(exist_ok=True)
    content = json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(job.report / "report.json", content.encode())
    write_atomically(job.report / "report.html", page.encode())


def _pictures(job: JobFolder, evaluations: list[dict[str, object]]) -> dict[str, bytes]:
    """Those of the last evaluation after training that are there."""
    after = next((one for one in reversed(evaluations) if one["occasion"] == "after"), None)
    if after is None:
        return {}
    guard, drawn = after.get("guard"), after.get("pictures")
    named = {
        "guard": guard.get("picture", "") if isinstance(guard, dict) else "",
        "confusion": drawn[0] if isinstance(drawn, list) and drawn else "",
    }
    return {
        what: (job.path / path).read_bytes()
        for what, path in named.items()
        if path and Path(job.path / path).is_file()
    }
