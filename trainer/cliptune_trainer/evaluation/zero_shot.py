"""Zero-shot classification: how well prompts tell images apart.

Enters: scores of images against classes, and the truth. Leaves: metrics of any weighting, and what is told of
each class. Called by `measure`.

B: weightings, S: samples, C: classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cliptune.evaluation import ClassResult
from cliptune.metric_names import (
    ACCURACY,
    ACCURACY_AT_5,
    AUROC,
    AVERAGE_PRECISION,
    BALANCED_ACCURACY,
)
from cliptune_trainer.evaluation.metrics import (
    DECIMALS,
    Booleans,
    Floats,
    Found,
    calibration_error,
    found,
    log_odds,
    mean_over_classes,
    ranking,
    share,
)
from cliptune_trainer.evaluation.truth import TOP, Truth


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ZeroShot:
    """Answers of a model, ready to be judged.

    Attributes:
        truth: of the samples.
        logits_SC: similarities to the prompts of each class, times the logit scale.
        odds_SC: what each class is judged by: log-odds against the other classes or against its negative
            prompts; the logit itself where it has neither.
        are_odds_C: of which classes it is log-odds, so that there is a probability.
    """

    truth: Truth
    logits_SC: Floats
    odds_SC: Floats
    are_odds_C: Booleans

    @classmethod
    def of(cls, truth: Truth, logits_SC: Floats, negatives_SC: Floats) -> ZeroShot:
        """`negatives_SC`: the same for negative prompts; NaN in the column of a class without."""
        if truth.alternatives:
            odds_SC = log_odds(logits_SC)
            are_odds_C = np.ones(logits_SC.shape[1], dtype=np.bool_)
        else:
            are_odds_C = ~_any(np.isnan(negatives_SC.T))
            odds_SC = logits_SC - np.where(are_odds_C, negatives_SC, 0.0)
        return cls(
            truth=truth,
            logits_SC=logits_SC,
            odds_SC=np.round(odds_SC, DECIMALS),
            are_odds_C=are_odds_C,
        )

    def metrics(self, weights_BS: Floats) -> Mapping[str, Floats]:
        """Values [B] by name."""
        areas_BC, averages_BC = self._rankings(weights_BS)
        values = {AUROC: mean_over_classes(areas_BC), AVERAGE_PRECISION: mean_over_classes(averages_BC)}
        if self.truth.one_each:
            values[ACCURACY] = share(self._right(), weights_BS)
            values[BALANCED_ACCURACY] = mean_over_classes(self._found(weights_BS).recall_BC)
            if self.truth.truth_SC.shape[1] >= TOP:
                values[ACCURACY_AT_5] = share(self._among_first(TOP), weights_BS)
        return values

    def calibration_error(self) -> float:
        """Of the likeliest class where classes are alternatives; otherwise of each class with negative
        prompts, and their mean. NaN where there is no probability."""
        if self.truth.alternatives:
            return calibration_error(_probability(self.odds_SC.max(axis=1)), self._right())
        errors = [
            calibration_error(_probability(self.odds_SC[:, place]), self.truth.truth_SC[:, place])
            for place in np.flatnonzero(self.are_odds_C)
        ]
        return float(np.mean(errors)) if errors else math.nan

    def class_scores(self, labels: Sequence[str]) -> tuple[ClassResult, ...]:
        """The table of classes."""
        once_1S = np.ones((1, len(self.truth)))
        areas_1C, averages_1C = self._rankings(once_1S)
        recall_1C, precision_1C = self._found(once_1S)
        return tuple(
            ClassResult(
                label=label,
                samples=int(self.truth.truth_SC[:, place].sum()),
                precision=_known(precision_1C[0, place]),
                recall=_known(recall_1C[0, place]),
                auroc=_known(areas_1C[0, place]),
                average_precision=_known(averages_1C[0, place]),
            )
            for place, label in enumerate(labels)
        )

    def confusion(self) -> tuple[tuple[int, ...], ...]:
        """[C][C] counts, true class by row; empty where images have several classes or none."""
        if not self.truth.one_each:
            return ()
        counts_CC = self.truth.truth_SC.T.astype(np.int64) @ self._taken().astype(np.int64)
        return tuple(tuple(row) for row in counts_CC.tolist())

    def _rankings(self, weights_BS: Floats) -> tuple[Floats, Floats]:
        found_C = [
            ranking(self.truth.truth_SC[:, place], self.odds_SC[:, place], weights_BS)
            for place in range(self.odds_SC.shape[1])
        ]
        return (
            np.stack([each.auroc_B for each in found_C], axis=1),
            np.stack([each.average_precision_B for each in found_C], axis=1),
        )

    def _found(self, weights_BS: Floats) -> Found:
        recall_BC, precision_BC = found(self.truth.truth_SC, self._taken(), weights_BS)
        if not self.truth.one_each:
            recall_BC = np.where(self.are_odds_C, recall_BC, np.nan)
            precision_BC = np.where(self.are_odds_C, precision_BC, np.nan)
        return Found(recall_BC=recall_BC, precision_BC=precision_BC)

    def _taken(self) -> Booleans:
        """The classes that each sample is taken for: the likeliest, the first of equals; or, where images may
        have several, those likelier than not. [S, C]"""
        if not self.truth.one_each:
            likelier_SC: Booleans = self.odds_SC > 0
            return likelier_SC
        taken_SC = np.zeros(self.logits_SC.shape, dtype=np.bool_)
        taken_SC[np.arange(len(taken_SC)), self.logits_SC.argmax(axis=1)] = True
        return taken_SC

    def _right(self) -> Booleans:
        return _any(self._taken() & self.truth.truth_SC)

    def _among_first(self, count: int) -> Booleans:
        order_SC = np.argsort(-self.logits_SC, axis=1, kind="stable")[:, :count]
        return _any(np.take_along_axis(self.truth.truth_SC, order_SC, axis=1))


def _probability(odds: Floats) -> Floats:
    probability: Floats = np.exp(-np.logaddexp(0.0, -odds))
    return probability


def _any(values: Booleans) -> Booleans:
    """Whether any of a row holds."""
    return np.asarray(values.any(axis=1))


def _known(value: float) -> float:
    return math.nan if np.isnan(value) else float(value)
