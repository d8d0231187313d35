"""What a study remembers and asks for: settings, early ends, the best, over as many openings as it takes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cliptune.errors import SpecError
from cliptune.spec import spec_from_mapping
from cliptune_trainer.spec.tune import Dimension, TuneConfig
from cliptune_trainer.tuning.search import CANCELLED, COMPLETE, FAILED, PRUNED, Search
from cliptune_trainer.tuning.settings import trial_spec, with_tried

RATE = Dimension(path="train.learning_rate", low=1e-5, high=1e-1, log=True, start="0.001")
LOSS = Dimension(path="loss.name", values=("infonce", "margin"), start="margin")
STEPS = Dimension(path="train.max_steps", low=1, high=9, integer=True)


def opened(folder: Path, config: TuneConfig | None = None, evaluations: int = 9) -> Search:
    return Search(folder / "study.db", config or TuneConfig(), (RATE, LOSS, STEPS), evaluations)


def test_the_first_trial_takes_what_the_spec_says_and_others_stay_within_bounds(tmp_path: Path) -> None:
    search = opened(tmp_path)
    drawn = []
    for _ in range(12):
        trial = search.ask()
        drawn.append(search.settings(trial))
        search.tell(trial, COMPLETE, 0.5, 1.0)
    assert float(drawn[0]["train.learning_rate"]) == 0.001
    assert drawn[0]["loss.name"] == "margin"
    rates = [float(settings["train.learning_rate"]) for settings in drawn]
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert len(set(rates)) == len(rates)
    assert {settings["loss.name"] for settings in drawn} == {"infonce", "margin"}
    assert all(1 <= int(settings["train.max_steps"]) <= 9 for settings in drawn)


def test_the_search_finds_the_better_half_of_the_range(tmp_path: Path) -> None:
    search = opened(tmp_path, TuneConfig(seed=3))
    for _ in range(30):
        trial = search.ask()
        rate = float(search.settings(trial)["train.learning_rate"])
        search.tell(trial, COMPLETE, -abs(math.log10(rate) + 4.0), 1.0)
    best = search.best()
    assert best is not None
    assert 0.5 < float(best.settings["train.learning_rate"]) / 1e-4 < 2.0
    late = [abs(math.log10(float(trial.settings["train.learning_rate"])) + 4.0) for trial in search.tried()]
    assert sum(late[15:]) < sum(late[:15])


def test_trials_that_promise_nothing_end_early_and_the_best_never_does(tmp_path: Path) -> None:
    search = opened(tmp_path)
    ended: dict[int, str] = {}
    for number in range(18):
        trial = search.ask()
        search.settings(trial)
        quality = 0.9 if number == 0 else 0.1 + number / 1000
        outcome = COMPLETE
        for evaluation in range(1, 10):
            if not search.worth_going_on(trial, evaluation, quality):
                outcome = PRUNED
                break
        ended[number] = outcome
        search.tell(trial, outcome, quality, 1.0)
    assert ended[0] == COMPLETE
    assert list(ended.values()).count(PRUNED) >= 6
    tried = search.tried()
    assert [trial.outcome for trial in tried] == list(ended.values())
    assert all(trial.value is not None for trial in tried)


def test_a_study_that_is_opened_again_knows_its_trials_and_draws_others(tmp_path: Path) -> None:
    first = opened(tmp_path)
    before = []
    for _ in range(3):
        trial = first.ask()
        before.append(first.settings(trial))
        first.remember_job(trial, f"job-{trial.number}")
        first.tell(trial, COMPLETE, 0.1 * trial.number, 2.0)
    broken_off = first.ask()
    settings = first.settings(broken_off)
    first.spent_s = 12.5
    again = opened(tmp_path)
    assert again.spent_s == 12.5
    assert again.count == 4
    (found,) = again.under_way()
    assert found.number == broken_off.number
    assert again.settings(found) == settings
    assert [trial.settings for trial in again.tried()] == before
    assert [trial.job_id for trial in again.tried()] == ["job-0", "job-1", "job-2"]
    fresh = again.settings(again.ask())
    assert fresh["train.learning_rate"] not in [s["train.learning_rate"] for s in (*before, settings)]


def test_the_best_is_of_a_trial_that_came_to_its_end(tmp_path: Path) -> None:
    search = opened(tmp_path, TuneConfig(minimize=True))
    for outcome, value in ((FAILED, None), (CANCELLED, 0.01), (PRUNED, 0.02)):
        trial = search.ask()
        search.settings(trial)
        if value is not None:
            search.worth_going_on(trial, 1, value)
        assert not search.tell(trial, outcome, value, 1.0)
    assert search.best() is None
    worse, better = search.ask(), search.ask()
    for trial in (worse, better):
        search.settings(trial)
    assert search.tell(worse, COMPLETE, 0.5, 1.0)
    assert search.tell(better, COMPLETE, 0.4, 1.0)
    best = search.best()
    assert best is not None
    assert (best.number, best.value) == (better.number, 0.4)
    assert [trial.outcome for trial in search.tried()] == [FAILED, CANCELLED, PRUNED, COMPLETE, COMPLETE]


def test_a_trial_is_the_study_without_its_search_and_publishes_nothing() -> None:
    spec = spec_from_mapping(
        {
            "name": "a" * 64,
            "model": {"name": "ViT-B-32"},
            "data": {"train": "pairs.csv"},
            "publish": {"model": "pets", "aliases": ["prod"]},
            "tune": {"max_trials": 4},
        }
    )
    made = trial_spec(spec, 12, {"train.learning_rate": "1e-05", "loss.parameters.margin": "0.25"})
    assert made.name == "a" * 55 + "-trial-12"
    assert made.publish.skip
    assert not made.publish.aliases
    assert not made.HasField("tune")
    assert made.train.learning_rate == 1e-5
    assert dict(made.loss.parameters) == {"margin": 0.25}
    assert spec.HasField("tune")
    with pytest.raises(SpecError, match="is not a field of the spec"):
        with_tried(spec, {"train.learnrate": "1"})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"low": 1.0, "high": 1.0}, "a range from low up to high"),
        ({"low": float("nan"), "high": 1.0}, "a range from low up to high"),
        ({"low": 0.0, "high": 1.0, "log": True}, "a low above 0"),
        ({"low": 0.5, "high": 2.0, "integer": True}, "whole bounds"),
        ({"values": ("one",)}, "two or more values"),
        ({"values": ("one", "one")}, "each once"),
    ],
    ids=["empty", "nan", "log", "integer", "alone", "twice"],
)
def test_a_range_that_is_none_is_refused(fields: dict[str, object], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        Dimension(path="train.learning_rate", **fields)  # type: ignore[arg-type]
