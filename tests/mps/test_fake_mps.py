"""The trainer's steps on a Mac, without one: on the fake device of `tests.support.fake_mps`."""

from __future__ import annotations

from typing import Any

import pytest

from cliptune_model.source import CONFIG_FOLDER
from tests.support.fake_mps.library import run_on_fake_mps

SHIPPED = sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))
WAYS = 3 * 3 * 2  # precisions, attentions, activations kept or recomputed

# One process does it all, half a minute on a core of its own.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def report() -> Any:
    return run_on_fake_mps("tests.mps.steps")


@pytest.mark.parametrize("model", SHIPPED)
def test_every_step_of_a_shipped_model_has_all_it_needs_on_a_mac_and_never_waits(
    report: Any, model: str
) -> None:
    cases = report["steps"][model]
    assert len(cases) == (4 if model == "cliptune-test-vit" else WAYS)
    assert {case: found for case, found in cases.items() if found} == {}


@pytest.mark.parametrize("tower", ["vit", "dropout", "siglip", "coca", "convnext", "timm-resnet", "resnet"])
def test_so_does_a_step_of_towers_of_every_library(report: Any, tower: str) -> None:
    assert report["steps"][tower]
    assert {case: found for case, found in report["steps"][tower].items() if found} == {}


def test_the_fake_device_notices_what_would_fail_or_wait_on_a_mac(report: Any) -> None:
    report = dict(report["mistakes"])
    assert report.pop("nothing") == []
    assert report.pop("tiled_loss_of_many_pairs") == []
    found = {mistake: " ".join(said) for mistake, said in report.items()}
    for mistake, said in {
        "labels_on_the_cpu": "same device",
        "mask_on_the_cpu": "same device",
        "index_on_the_cpu": "mixes tensors of CPU and MPS",
        "float64_schedule": "makes float64",
        "float64_from_numpy": "makes float64",
        "another_accelerator": "on cuda",
        "a_loss_read_in_the_step": "_local_scalar_dense",
        "a_copy_to_the_cpu": "_to_copy",
        "a_decomposition": "no kernel for MPS",
        "a_sum_over_many_pairs": "sums over 33000 numbers",
        "whole_loss_of_many_pairs": "sums over 33000 numbers",
    }.items():
        assert said in found.pop(mistake), mistake
    assert found == {}
