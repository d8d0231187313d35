"""The demo: what it trains, and what it says of its images' licence. Its story is told by `make demo`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cliptune.embedded import DEFAULT_MODEL
from cliptune.errors import DataError
from cliptune.spec import spec_from_mapping
from cliptune_trainer.demo import elpv
from cliptune_trainer.demo.story import DemoConfig, job_spec
from cliptune_trainer.spec import from_proto

MAKEFILE = Path(__file__).parents[2] / "Makefile"


def test_it_starts_from_the_embedded_model_and_sees_half_of_the_training_images_once(tmp_path: Path) -> None:
    config = DemoConfig(home=tmp_path)
    spec = from_proto(spec_from_mapping(job_spec(config, tmp_path / "elpv.csv", tmp_path)))
    assert spec.model.name == DEFAULT_MODEL
    training = [cell for cell in elpv.read_cells(elpv.installed_folder()) if cell.split == "train"]
    assert spec.train.max_steps == len(training) // config.batch_size // 2
    whole = from_proto(spec_from_mapping(job_spec(config.with_epochs(3), tmp_path / "elpv.csv", tmp_path)))
    assert (whole.train.epochs, whole.train.max_steps) == (3, None)


def test_set_up_says_that_the_images_are_not_for_commercial_use_before_it_installs_them() -> None:
    recipe = MAKEFILE.read_text(encoding="utf-8").split("$(STAMP):")[1].split("\ndemo:")[0]
    assert "non-commercial use only" in recipe.split("pip install")[0]


def test_without_the_images_the_error_names_the_command_and_the_licence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(elpv, "PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(DataError, match=r"pip install 'cliptune.demo.'.*non-commercial"):
        elpv.installed_folder()
