"""By what a guard measures where the spec names no data, and that a damaged package is refused."""

from __future__ import annotations

import hashlib
import importlib
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cliptune.embedded import PROBE_FOLDER, PROBE_PAIRS, SUMS, embedded_names, embedded_probe
from cliptune.errors import ModelDamagedError, WeightsUnavailableError
from cliptune_model.clip import build
from cliptune_model.exported import export_model, manifest_of
from cliptune_model.source import ModelSource
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.guard.agreement import AGREEMENT
from cliptune_trainer.guard.drawings import drawings
from cliptune_trainer.guard.measure import decide_guard, open_probe
from tests.trainer.conftest import MakeJob
from tests.trainer.jobs import TrainerJob

RECALL = "retrieval/image_to_text_recall@1"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model to start from that knows nothing, though its weights come from a file."""
    folder = tmp_path_factory.mktemp("start") / "model"
    clip = build(ModelSource(name="cliptune-test-vit"), seed=5)
    export_model(clip, folder, manifest_of(clip))
    return f"local-dir:{folder}"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a probe of a dozen pictures and no model."""
    root = tmp_path / "site" / "cliptune_mini"
    (root / PROBE_FOLDER).mkdir(parents=True)
    (root / "__init__.py").write_text("")
    shard = root / PROBE_FOLDER / PROBE_PAIRS
    with tarfile.open(shard, "w") as tar:
        for place, picture in enumerate(drawings()[:12]):
            image = io.BytesIO()
            picture.resize((48, 48)).save(image, "png")
            for extension, content in (("png", image.getvalue()), ("txt", f"drawing {place}".encode())):
                member = tarfile.TarInfo(f"{place:04d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    (root / SUMS).write_text(f"{digest}  {PROBE_FOLDER}/{PROBE_PAIRS}\n")
    monkeypatch.syspath_prepend(root.parent)
    importlib.invalidate_caches()
    return root


def reason(job: TrainerJob) -> str:
    spec = job.folder.spec()
    return decide_guard(spec, build(spec.model)).reason


def probe_of(job: TrainerJob, told: list[str] | None = None) -> Any:
    tell = (told if told is not None else []).append
    return open_probe(job.folder.spec(), DataRoots([job.root]), examined=False, tell=tell)


def test_a_model_that_knows_the_embedded_pictures_is_measured_by_them(make_job: MakeJob) -> None:
    job = make_job(model={"name": "cliptune-mini-vit"})
    assert "loses no more than 0.01 of cliptune-mini's general pictures" in reason(job)
    told: list[str] = []
    clip = build(job.folder.spec().model)
    known = probe_of(job, told).remember(clip)
    assert known.main_metric == RECALL
    assert known.value == pytest.approx(0.2, abs=0.02)
    assert known.samples == 185
    assert not told


def test_a_model_that_knows_few_of_them_is_measured_by_its_agreement_and_that_is_told(
    make_job: MakeJob, start: str
) -> None:
    job = make_job(model={"name": start})
    assert "or 0.03 of the agreement" in reason(job)
    told: list[str] = []
    clip = build(job.folder.spec().model)
    probe = probe_of(job, told)
    assert probe.remember(clip).main_metric == AGREEMENT
    assert probe.measure(clip, resamples=0).main_metric == AGREEMENT
    assert len(told) == 1
    assert "of cliptune-mini's 185 general pictures" in told[0]


def test_either_measure_can_be_asked_for(make_job: MakeJob, start: str, package: Path) -> None:
    clip = build(ModelSource(name=start))
    pictures = make_job("pictures", model={"name": start}, guard={"probe": {"data": "embedded"}})
    assert probe_of(pictures).remember(clip).main_metric == RECALL
    assert "0.01 of cliptune-mini's general pictures" in reason(pictures)
    agreement = make_job("agreement", model={"name": start}, guard={"probe": {"data": "agreement"}})
    assert probe_of(agreement).remember(clip).main_metric == AGREEMENT
    assert "0.03 of the agreement with the starting model, as asked for" in reason(agreement)


def test_without_the_package_the_agreement_is_the_measure_and_pictures_that_were_asked_for_are_missed(
    make_job: MakeJob, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cliptune.embedded.PACKAGE", "a_package_that_nobody_has")
    assert "no general data is named or installed" in reason(make_job(model={"name": start}))
    job = make_job("asked", model={"name": start}, guard={"probe": {"data": "embedded"}})
    with pytest.raises(WeightsUnavailableError, match="pip install cliptune-mini"):
        reason(job)


def test_pictures_that_were_changed_are_refused_before_the_job_waits_for_a_device(
    make_job: MakeJob, start: str, package: Path
) -> None:
    shard = package / PROBE_FOLDER / PROBE_PAIRS
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ModelDamagedError, match="SHA-256"):
        reason(make_job(model={"name": start}))
    shard.unlink()
    with pytest.raises(ModelDamagedError, match="cannot be read"):
        reason(make_job("gone", model={"name": start}))


def test_a_package_from_before_the_probe_has_none_and_a_probe_is_no_model(package: Path) -> None:
    assert embedded_probe() == package / PROBE_FOLDER / PROBE_PAIRS
    assert embedded_names() == []
    (package / SUMS).write_text("")
    assert embedded_probe() is None
