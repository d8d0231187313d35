"""Measures of classification and retrieval, exact and whole-set.

Enters: scores and truths as arrays. Leaves: numbers in [0, 1]. Called by evaluation. Similarities are
rounded to `DECIMALS` first: below that lies rounding noise, which depends on the batch size, and ties must
not be broken by it.

N: samples, C: classes, Q: queries, K: candidates.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Booleans: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

DECIMALS: Final = 6


def accuracy(truth_N: Integers, predicted_N: Integers) -> float:
    """Share of samples whose class was found."""
    return float(np.mean(truth_N == predicted_N))


def balanced_accuracy(truth_N: Integers, predicted_N: Integers) -> float:
    """Mean over the classes that occur of the share of their samples that was found."""
    return float(np.mean([np.mean(predicted_N[truth_N == label] == label) for label in np.unique(truth_N)]))


def auroc(positive_N: Booleans, scores_N: Floats) -> float:
    """Area under the receiver operating characteristic: how often a positive outranks a negative; ties count
    half.

    NaN where all samples, or none, are positive.
    """
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if not positives or not negatives:
        return float("nan")
    # Mann-Whitney: the sum of the positives' ranks, ties sharing the mean rank.
    _, place_N, count_U = np.unique(scores_N, return_inverse=True, return_counts=True)
    mean_rank_U = np.cumsum(count_U) - (count_U - 1) / 2
    rank_sum = float(mean_rank_U[place_N.reshape(-1)][positive_N].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def auroc_one_vs_rest(truth_N: Integers, logits_NC: Floats) -> float:
    """Mean over classes of the AUROC of that class's probability; classes that cannot be judged are left out.

    The probability is compared as its log-odds, of the same order, which a large logit scale does not round
    to 1.
    """
    areas = []
    for label in range(logits_NC.shape[1]):
        others_NC = np.delete(logits_NC, label, axis=1)
        top_N = others_NC.max(axis=1)
        others_N = top_N + np.log(np.exp(others_NC - top_N[:, None]).sum(axis=1))
        area = auroc(truth_N == label, np.round(logits_NC[:, label] - others_N, DECIMALS))
        if not np.isnan(area):
            areas.append(area)
    return float(np.mean(areas)) if areas else float("nan")


def best_ranks(scores_QK: Floats, positive_QK: Booleans) -> Integers:
    """Rank, from 1, of each query's best positive candidate. [Q]

    A negative with the same score stands before it: a model that tells nothing apart must not look good.
    """
    best_Q1 = np.where(positive_QK, scores_QK, -np.inf).max(axis=1, keepdims=True)
    ahead_Q: Integers = ((scores_QK >= best_Q1) & ~positive_QK).sum(axis=1)
    return ahead_Q + 1


def recall_at(ranks_Q: Integers, k: int) -> float:
    """Share of queries with a positive among the first `k`."""
    return float(np.mean(ranks_Q <= k))
