"""How far a model still answers as the one that training started from, where no general data is at hand.

Enters: the model now, and its answers of then. Leaves: a `General`. Called by `guard`. The starting model is
the only one who knows what was known before: it is asked how alike pictures and everyday texts are, and how
alike the texts are among themselves; what counts is the pattern of its answers, which a change of scale or
temperature leaves as it is. Pictures are drawn on the spot: of the job's own images another answer is wanted.

N: pictures, C: texts, P: prepared dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cliptune_model.clip import Clip
from cliptune_model.zero_shot import class_embeddings
from cliptune_trainer.evaluation.embedding import Scorer, evaluation_mode, prepared_texts
from cliptune_trainer.evaluation.metrics import Floats
from cliptune_trainer.guard.drawings import drawings
from cliptune_trainer.guard.general import General
from cliptune_trainer.guard.words import everyday_texts

AGREEMENT = "agreement"
_PICTURES = "agreement/pictures"
_TEXTS = "agreement/texts"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answers:
    """How alike a model finds pictures and texts [N, C], and texts and texts [C, C]."""

    pictures_NC: Floats
    texts_CC: Floats


class AgreementProbe:
    """Asks a model about drawn pictures and everyday texts.

    Args:
        batch_size: pictures or texts in one forward pass.
        check: called between forward passes; may raise.
    """

    def __init__(self, batch_size: int, check: Callable[[], None]) -> None:
        self._batch_size, self._check = batch_size, check
        self._reference: Answers | None = None

    def remember(self, clip: Clip) -> General:
        """Takes the answers of the starting model, which agrees with itself."""
        self._reference = self._ask(clip)
        return self._general(self._reference)

    def measure(self, clip: Clip, *, resamples: int) -> General:
        """Compares; there is no interval, as pictures and texts are no sample of anything.

        Raises:
            RuntimeError: there is nothing to compare with yet.
        """
        del resamples
        return self._general(self._ask(clip))

    def _general(self, answers: Answers) -> General:
        if self._reference is None:
            raise RuntimeError("the starting model has not been asked")
        pictures = correlation(answers.pictures_NC, self._reference.pictures_NC)
        texts = correlation(_without_diagonal(answers.texts_CC), _without_diagonal(self._reference.texts_CC))
        return General(
            metrics={AGREEMENT: (pictures + texts) / 2, _PICTURES: pictures, _TEXTS: texts},
            main_metric=AGREEMENT,
            samples=len(answers.pictures_NC),
        )

    @torch.no_grad()
    def _ask(self, clip: Clip) -> Answers:
        with evaluation_mode(clip.model):
            parts = []
            pictures = drawings()
            for start in range(0, len(pictures), self._batch_size):
                self._check()
                batch = [clip.preprocess(picture) for picture in pictures[start : start + self._batch_size]]
                features_BD = clip.encode_images(torch.stack(batch).to(clip.device))
                parts.append(
                    clip.similarity.prepare_images(features_BD).float().cpu().numpy().astype(np.float64)
                )
            pictures_NP = np.concatenate(parts)
            self._check()
            things = [(wordings[0], wordings) for wordings in everyday_texts()]
            features_CD = class_embeddings(clip, things, self._batch_size)
            texts_CP = prepared_texts(clip, features_CD)
            # A similarity may tell its two sides apart: texts asking are made ready as images are.
            asking_CP = clip.similarity.prepare_images(features_CD).float().cpu().numpy().astype(np.float64)
        score = Scorer(clip)
        return Answers(pictures_NC=score(pictures_NP, texts_CP), texts_CC=score(asking_CP, texts_CP))


def correlation(ours_NC: Floats, theirs_NC: Floats) -> float:
    """Mean over rows of Pearson's correlation: 1 where each row's pattern is the same, whatever its scale."""
    ours, theirs = (rows - rows.mean(axis=1, keepdims=True) for rows in (ours_NC, theirs_NC))
    size = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    # Rows without a pattern agree if neither side has one.
    flat = size < 1e-12
    same = (np.linalg.norm(ours, axis=1) < 1e-6) & (np.linalg.norm(theirs, axis=1) < 1e-6)
    along = np.where(flat, same.astype(np.float64), (ours * theirs).sum(axis=1) / np.where(flat, 1.0, size))
    return float(along.mean())


def _without_diagonal(square_CC: Floats) -> Floats:
    count = len(square_CC)
    kept: Floats = square_CC[~np.eye(count, dtype=bool)].reshape(count, count - 1)
    return kept
