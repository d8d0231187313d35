from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from cliptune_model.clip import Clip
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.table import Pair
from cliptune_trainer.evaluation import EvaluationInterrupted, evaluate
from cliptune_trainer.metrics import (
    accuracy,
    auroc,
    auroc_one_vs_rest,
    balanced_accuracy,
    best_ranks,
    recall_at,
)
from cliptune_trainer.spec import ClassConfig

CLASSES = tuple(ClassConfig(label=label, prompts=(f"a {label} tile",)) for label in ("red", "green", "blue"))


@pytest.mark.parametrize("classes", [2, 5])
def test_classification_metrics_equal_scikit_learns(classes: int) -> None:
    random = np.random.default_rng(classes)
    truth = random.integers(0, classes, 200)
    logits = np.round(random.normal(size=(200, classes)) + 2 * np.eye(classes)[truth], 1)  # with ties
    predicted = logits.argmax(axis=1)
    assert accuracy(truth, predicted) == pytest.approx(accuracy_score(truth, predicted))
    assert balanced_accuracy(truth, predicted) == pytest.approx(balanced_accuracy_score(truth, predicted))
    shares = np.round(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), 12)
    wanted = np.mean([roc_auc_score(truth == label, shares[:, label]) for label in range(classes)])
    assert auroc_one_vs_rest(truth, logits) == pytest.approx(wanted, abs=1e-9)


def test_auroc_counts_ties_half_and_is_not_a_number_for_one_class() -> None:
    assert auroc(np.array([True, False]), np.array([0.5, 0.5])) == 0.5
    assert math.isnan(auroc(np.array([True, True]), np.array([0.1, 0.2])))


def test_a_large_logit_scale_does_not_round_the_auroc_away() -> None:
    truth = np.array([0, 0, 1, 1])
    logits = 1e4 * np.array([[0.9, 0.1], [0.8, 0.1], [0.7, 0.1], [0.6, 0.1]])
    assert auroc_one_vs_rest(truth, logits) == 1.0


def test_recall_counts_any_positive_and_ties_count_against_the_model() -> None:
    scores = np.array([[0.9, 0.8, 0.1], [0.5, 0.5, 0.5]])
    positive = np.array([[False, True, True], [True, False, False]])
    ranks = best_ranks(scores, positive)
    assert ranks.tolist() == [2, 3]
    assert (recall_at(ranks, 1), recall_at(ranks, 2), recall_at(ranks, 3)) == (0.0, 0.5, 1.0)


def rows(tiles: Path) -> Pairs:
    colours = ("red", "green", "blue")
    return Pairs(
        [
            Pair(
                row=row,
                image=tiles / f"{row // 2}.png",
                reference="",
                caption=f"a {colours[row // 2 % 3]} tile, number {row % 2}",
                labels=(colours[row // 2 % 3],),
            )
            for row in range(40)
        ]
    )


def test_metrics_do_not_depend_on_the_batch_size(clip: Clip, tiles: Path) -> None:
    pairs = rows(tiles)
    measured = [evaluate(clip, pairs, CLASSES, batch_size=size) for size in (1, 7, 64)]
    assert measured[0] == measured[1] == measured[2]
    assert measured[0].samples == 20
    assert len(measured[0].metrics) == 9


def test_retrieval_counts_every_image_that_carries_the_caption(clip: Clip, tiles: Path) -> None:
    # One caption for all: whichever image comes first is a positive.
    alike = Pairs(
        [Pair(row=row, image=tiles / f"{row}.png", reference="", caption="a tile") for row in range(6)]
    )
    metrics = evaluate(clip, alike, (), batch_size=4).metrics
    assert set(metrics.values()) == {1.0}
    assert not any(name.startswith("zero_shot/") for name in metrics)


def test_an_image_that_is_gone_is_left_out_of_the_evaluation(clip: Clip, tiles: Path) -> None:
    gone = Pair(row=99, image=tiles / "gone.png", reference="", caption="a red tile", labels=("red",))
    measured = evaluate(clip, Pairs([*rows(tiles).pairs, gone]), CLASSES, batch_size=16)
    assert (measured.samples, measured.unreadable) == (20, 1)
    assert all(0.0 <= value <= 1.0 for value in measured.metrics.values())


def test_an_evaluation_gives_way_when_asked(clip: Clip, tiles: Path) -> None:
    with pytest.raises(EvaluationInterrupted):
        evaluate(clip, rows(tiles), CLASSES, batch_size=4, interrupted=lambda: True)
    assert not clip.model.training
