"""Captions longer than the model's context: asked for in the spec, trained on, and kept by the export."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from cliptune.errors import ContextLengthError, SpecError
from cliptune_model.exported import load_exported, read_manifest
from tests.trainer.conftest import MakeJob
from tests.trainer.test_trainer_run import prepared, trained

PREFIX = "a tile " * 18  # 36 tokens: beyond the 32 of the model


def test_a_spec_gives_a_model_a_longer_context_and_its_export_keeps_it(
    make_job: MakeJob, tiles: Path, tmp_path: Path
) -> None:
    with (tiles / "tiles.csv").open(newline="") as given, (tiles / "long.csv").open("w", newline="") as file:
        rows = list(csv.DictReader(given))
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "caption": PREFIX + row["caption"]} for row in rows[:24])
    job = make_job(
        model={"name": "cliptune-tiny-vit", "context_length": 60},
        data={"train": str(tiles / "long.csv")},
        train={"max_steps": 3},
    )
    prepared(job)
    trained(job)
    torch.use_deterministic_algorithms(False)  # a run leaves its process deterministic
    assert len(job.losses(1)) == 3
    assert read_manifest(job.folder.export).context_length == 60
    clip = load_exported(job.folder.export)
    red, blue = clip.encode_texts(clip.tokenize([f"{PREFIX}a red tile", f"{PREFIX}a blue tile"]))
    assert (red - blue).abs().max() > 1e-4


def test_a_context_that_no_model_has_is_a_wrong_field(make_job: MakeJob) -> None:
    with pytest.raises(SpecError) as caught:
        prepared(make_job(model={"context_length": 249}))
    assert caught.value.metadata == {"path": "model.context_length", "allowed": "1 to 248"}


@pytest.mark.parametrize(("wanted", "why"), [(24, "up to 16"), (8, "shorter")])
def test_a_context_that_this_model_cannot_have_is_refused_in_preparation(
    make_job: MakeJob, wanted: int, why: str
) -> None:
    with pytest.raises(ContextLengthError, match=why):
        prepared(make_job(model={"context_length": wanted}))
