"""The measures themselves, against torchmetrics, scikit-learn and the formulas of CLIP_benchmark."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_average_precision,
    multiclass_calibration_error,
    multiclass_precision,
    multilabel_auroc,
    multilabel_average_precision,
)
from torchmetrics.functional.retrieval import retrieval_average_precision

from cliptune_trainer.evaluation.metrics import (
    Booleans,
    Floats,
    Integers,
    average_precision,
    calibration_error,
    found,
    log_odds,
    mean_over_classes,
    positive_ranks,
    ranking,
    share,
)

SAMPLES = 300


def once(samples: int) -> Floats:
    return np.ones((1, samples))


def answers(classes: int) -> tuple[Integers, Floats, Booleans, Booleans]:
    """Truth, logits with many ties, truth as one-hot, prediction as one-hot."""
    random = np.random.default_rng(classes)
    truth = random.integers(0, classes, SAMPLES)
    logits = np.round(random.normal(size=(SAMPLES, classes)) + 2 * np.eye(classes)[truth], 1)
    one_hot = np.eye(classes, dtype=np.bool_)
    return truth, logits, one_hot[truth], one_hot[logits.argmax(axis=1)]


def softmax(logits: Floats) -> torch.Tensor:
    # In float64, rounded so that sums of another order keep ties.
    return torch.from_numpy(np.round(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), 12))


def macro_ranking(one_hot: Booleans, odds: Floats) -> tuple[float, float]:
    classes = range(odds.shape[1])
    each = [ranking(one_hot[:, place], odds[:, place], once(len(odds))) for place in classes]
    areas = np.stack([one.auroc_B for one in each], axis=1)
    averages = np.stack([one.average_precision_B for one in each], axis=1)
    return mean_over_classes(areas)[0], mean_over_classes(averages)[0]


@pytest.mark.parametrize("classes", [2, 5])
def test_classification_metrics_equal_torchmetrics(classes: int) -> None:
    truth, logits, one_hot, predicted = answers(classes)
    shares, wanted = softmax(logits), torch.from_numpy(truth)
    recall, precision = found(one_hot, predicted, once(SAMPLES))
    assert share((one_hot & predicted).any(axis=1), once(SAMPLES))[0] == pytest.approx(
        float(multiclass_accuracy(shares, wanted, classes, average="micro"))
    )
    balanced = float(multiclass_accuracy(shares, wanted, classes, average="macro"))
    assert mean_over_classes(recall)[0] == pytest.approx(balanced)
    assert precision[0] == pytest.approx(multiclass_precision(shares, wanted, classes, average=None).numpy())
    area, average = macro_ranking(one_hot, np.round(log_odds(logits), 6))
    assert area == pytest.approx(float(multiclass_auroc(shares, wanted, classes)), abs=1e-6)
    assert average == pytest.approx(float(multiclass_average_precision(shares, wanted, classes)), abs=1e-6)
    error = calibration_error(shares.numpy().max(axis=1), (one_hot & predicted).any(axis=1))
    assert error == pytest.approx(float(multiclass_calibration_error(shares, wanted, classes)), abs=1e-6)


def test_classification_metrics_equal_scikit_learns() -> None:
    truth, logits, one_hot, predicted = answers(4)
    recall, _ = found(one_hot, predicted, once(SAMPLES))
    assert mean_over_classes(recall)[0] == pytest.approx(
        balanced_accuracy_score(truth, logits.argmax(axis=1))
    )
    shares = softmax(logits).numpy()
    area, average = macro_ranking(one_hot, np.round(log_odds(logits), 6))
    assert area == pytest.approx(
        roc_auc_score(truth, shares / shares.sum(1, keepdims=True), multi_class="ovr")
    )
    averages = [average_precision_score(one_hot[:, place], shares[:, place]) for place in range(4)]
    assert average == pytest.approx(np.mean(averages))


def test_metrics_of_several_labels_equal_torchmetrics() -> None:
    random = np.random.default_rng(0)
    truth = random.random((SAMPLES, 3)) < 0.3
    odds = np.round(random.normal(size=(SAMPLES, 3)) + truth, 1)
    shares, wanted = torch.from_numpy(1 / (1 + np.exp(-odds))), torch.from_numpy(truth.astype(np.int64))
    area, average = macro_ranking(truth, odds)
    assert area == pytest.approx(float(multilabel_auroc(shares, wanted, 3)), abs=1e-6)
    assert average == pytest.approx(float(multilabel_average_precision(shares, wanted, 3)), abs=1e-6)
    error = calibration_error(shares[:, 0].numpy(), truth[:, 0])
    assert error == pytest.approx(
        float(binary_calibration_error(shares[:, 0].contiguous(), wanted[:, 0])), abs=1e-6
    )


def test_precision_of_a_class_that_nothing_is_taken_for_is_0_and_of_one_without_samples_unknown() -> None:
    one_hot = np.eye(3, dtype=np.bool_)
    recall, precision = found(one_hot[[0, 1, 1]], one_hot[[0, 0, 0]], once(3))
    assert recall[0] == pytest.approx([1.0, 0.0, math.nan], nan_ok=True)
    assert precision[0] == pytest.approx([1 / 3, 0.0, math.nan], nan_ok=True)


def test_a_weighted_metric_is_the_metric_of_rows_repeated_so_often() -> None:
    _, logits, one_hot, predicted = answers(3)
    counts = np.random.default_rng(1).integers(0, 4, (2, SAMPLES))
    odds = np.round(log_odds(logits), 6)
    weighted = ranking(one_hot[:, 1], odds[:, 1], counts.astype(np.float64))
    recall, precision = found(one_hot, predicted, counts.astype(np.float64))
    for row, count in enumerate(counts):
        again = np.repeat(np.arange(SAMPLES), count)
        repeated = ranking(one_hot[again, 1], odds[again, 1], once(len(again)))
        assert weighted.auroc_B[row] == pytest.approx(repeated.auroc_B[0])
        assert weighted.average_precision_B[row] == pytest.approx(repeated.average_precision_B[0])
        recall_again, precision_again = found(one_hot[again], predicted[again], once(len(again)))
        assert recall[row] == pytest.approx(recall_again[0])
        assert precision[row] == pytest.approx(precision_again[0])


def test_auroc_counts_ties_half_and_is_not_a_number_for_one_class() -> None:
    tied = ranking(np.array([True, False]), np.array([0.5, 0.5]), once(2))
    assert (tied.auroc_B[0], tied.average_precision_B[0]) == (0.5, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = ranking(np.array([True, True]), np.array([0.1, 0.2]), once(2))
        absent = ranking(np.array([False, False]), np.array([0.1, 0.2]), once(2))
        unweighted = ranking(np.array([True, False]), np.array([0.1, 0.2]), np.zeros((1, 2)))
    for judged in (alone, absent, unweighted):
        assert math.isnan(judged.auroc_B[0])
        assert math.isnan(judged.average_precision_B[0])


def test_classes_that_cannot_be_judged_are_left_out_of_a_mean() -> None:
    values = np.array([[0.5, np.nan, 1.0], [np.nan, np.nan, np.nan]])
    assert mean_over_classes(values)[0] == 0.75
    assert math.isnan(mean_over_classes(values)[1])


def test_a_large_logit_scale_does_not_round_the_order_away() -> None:
    truth = np.array([False, False, True, True])
    odds = log_odds(1e4 * np.array([[0.9, 0.1], [0.8, 0.1], [0.7, 0.1], [0.6, 0.1]]))
    assert ranking(~truth, odds[:, 0], once(4)).auroc_B[0] == 1.0
    assert np.isfinite(odds).all()


def test_ranks_count_every_positive_and_ties_count_against_the_model() -> None:
    ranks = positive_ranks(np.array([0.9, 0.8, 0.1, 0.8]), np.array([1, 2]))
    assert ranks.tolist() == [3, 4]
    assert positive_ranks(np.array([0.5, 0.5, 0.5]), np.array([0])).tolist() == [3]
    assert positive_ranks(np.array([0.5, -np.inf]), np.array([0])).tolist() == [1]
    assert average_precision(np.array([1, 3])) == pytest.approx((1 + 2 / 3) / 2)


def test_average_precision_of_a_query_equals_torchmetrics() -> None:
    random = np.random.default_rng(2)
    for positives in (1, 3, 17):
        scores = random.permutation(50).astype(np.float64)
        right = random.choice(50, positives, replace=False)
        target = torch.zeros(50, dtype=torch.bool)
        target[right] = True
        wanted = float(retrieval_average_precision(torch.from_numpy(scores), target))
        assert average_precision(positive_ranks(scores, right)) == pytest.approx(wanted)
