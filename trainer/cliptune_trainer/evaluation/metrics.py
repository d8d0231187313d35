"""Measures of classification and retrieval, exact and whole-set, for any number of weightings at once.

Enters: scores and truths as arrays, and how much each sample counts. Leaves: numbers in [0, 1], NaN where
nothing can be said. Called by evaluation: with weights of one for a value, with the counts of B resamples for
its interval, so that both are of the same definition. torchmetrics and scikit-learn, which the tests hold
these against, take no weights by the resample.

B: weightings, N: samples, C: classes, K: candidates, P: positives of one query.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Booleans: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

DECIMALS: Final = 6
CALIBRATION_BINS: Final = 15


def share(hits_N: Booleans | Floats, weights_BN: Floats) -> Floats:
    """Weighted mean: accuracy, recall@k, mean average precision. [B]"""
    return _ratio(weights_BN @ hits_N.astype(np.float64), weights_BN.sum(axis=1))


def mean_over_classes(values_BC: Floats) -> Floats:
    """Mean over the classes that can be judged; NaN where none can. [B]"""
    known_BC = ~np.isnan(values_BC)
    return _ratio(np.where(known_BC, values_BC, 0.0).sum(axis=1), known_BC.sum(axis=1).astype(np.float64))


class Found(NamedTuple):
    """What is found of each class, and how much of what is taken for it is right. [B, C]

    NaN for a class without a sample. Precision is 0 where none is taken for the class, as in torchmetrics.
    """

    recall_BC: Floats
    precision_BC: Floats


def found(truth_NC: Booleans, predicted_NC: Booleans, weights_BN: Floats) -> Found:
    """Recall and precision by class. Balanced accuracy is the mean recall of the classes that occur."""
    hits_BC = weights_BN @ (truth_NC & predicted_NC).astype(np.float64)
    there_BC = weights_BN @ truth_NC.astype(np.float64)
    taken_BC = weights_BN @ predicted_NC.astype(np.float64)
    precision_BC = np.divide(hits_BC, taken_BC, out=np.zeros_like(hits_BC), where=taken_BC > 0)
    return Found(
        recall_BC=_ratio(hits_BC, there_BC), precision_BC=np.where(there_BC > 0, precision_BC, np.nan)
    )


class Ranking(NamedTuple):
    """How well scores put the positives first; NaN where all samples, or none, are positive. [B]"""

    auroc_B: Floats
    average_precision_B: Floats


def ranking(positive_N: Booleans, scores_N: Floats, weights_BN: Floats) -> Ranking:
    """Area under the receiver operating characteristic, and average precision.

    AUROC: how often a positive outranks a negative, ties counting half (Hanley & McNeil 1982). Average
    precision: the mean, over positives, of the precision among all that score at least as much; so ties share
    one threshold, as in scikit-learn and torchmetrics.
    """
    order_N = np.argsort(scores_N, kind="stable")
    positives_P, negatives_M = order_N[positive_N[order_N]], order_N[~positive_N[order_N]]
    weights_BP = weights_BN[:, positives_P]
    # What of each kind stands below each place; a column of zeros first.
    positive_below = _running(weights_BP)
    negative_below = _running(weights_BN[:, negatives_M])
    scores_P = scores_N[positives_P]
    first_P = np.searchsorted(scores_N[negatives_M], scores_P, side="left")
    last_P = np.searchsorted(scores_N[negatives_M], scores_P, side="right")
    own_P = np.searchsorted(scores_P, scores_P, side="left")
    positive_B, negative_B = positive_below[:, -1], negative_below[:, -1]
    lower_BP, upper_BP = negative_below[:, first_P], negative_below[:, last_P]
    outranked_B = (weights_BP * (lower_BP + upper_BP) / 2).sum(axis=1)
    right_BP = positive_B[:, None] - positive_below[:, own_P]
    taken_BP = right_BP + negative_B[:, None] - lower_BP
    precision_BP = np.divide(right_BP, taken_BP, out=np.zeros_like(right_BP), where=taken_BP > 0)
    judged_B = (positive_B > 0) & (negative_B > 0)
    average_B = _ratio((weights_BP * precision_BP).sum(axis=1), positive_B)
    return Ranking(
        auroc_B=_ratio(outranked_B, positive_B * negative_B),
        average_precision_B=np.where(judged_B, average_B, np.nan),
    )


def log_odds(logits_NC: Floats) -> Floats:
    """Of each class's softmax probability: logit less the log-sum-exp of the other classes. [N, C], C > 1

    Of the same order as the probability, which a large logit scale would round to 1.
    """
    nothing_N1 = np.full((len(logits_NC), 1), -np.inf)
    before_NC = np.logaddexp.accumulate(np.hstack([nothing_N1, logits_NC[:, :-1]]), axis=1)
    after_NC = np.logaddexp.accumulate(np.hstack([nothing_N1, logits_NC[:, :0:-1]]), axis=1)[:, ::-1]
    difference_NC: Floats = logits_NC - np.logaddexp(before_NC, after_NC)
    return difference_NC


def calibration_error(confidences_N: Floats, right_N: Booleans) -> float:
    """Expected calibration error: how far confidence and accuracy lie apart, in mean over 15 bins of equal
    width, weighted by their samples (Guo et al. 2017, equation 3)."""
    places_N = np.clip(np.ceil(confidences_N * CALIBRATION_BINS).astype(np.int64) - 1, 0, None)
    apart = np.bincount(places_N, weights=confidences_N - right_N)
    return float(np.abs(apart).sum() / len(confidences_N))


def positive_ranks(scores_K: Floats, positives: Integers) -> Integers:
    """Ranks, from 1, of the positive candidates of one query, the best first. [P]

    A negative with the same score stands before them: a model that tells nothing apart must not look good.
    """
    best_first_P = -np.sort(-scores_K[positives])
    negative_K = np.ones(len(scores_K), dtype=np.bool_)
    negative_K[positives] = False
    ahead = np.sort(scores_K[negative_K & (scores_K >= best_first_P[-1])])
    ahead_P = len(ahead) - np.searchsorted(ahead, best_first_P, side="left")
    ranks_P: Integers = ahead_P + np.arange(1, len(positives) + 1)
    return ranks_P


def average_precision(ranks_P: Integers) -> float:
    """Mean precision at the ranks of a query's positives, all of them counted."""
    return float(np.mean(np.arange(1, len(ranks_P) + 1) / ranks_P))


def _running(weights_BN: Floats) -> Floats:
    """Sums up to each place, from none on. [B, N + 1]"""
    sums = np.zeros((len(weights_BN), weights_BN.shape[1] + 1))
    np.cumsum(weights_BN, axis=1, out=sums[:, 1:])
    return sums


def _ratio(part: Floats, whole: Floats) -> Floats:
    """Part by whole; NaN where there is no whole."""
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
