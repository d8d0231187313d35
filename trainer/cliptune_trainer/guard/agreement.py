"""How far a model still answers as the one that training started from, where no general data is at hand.

Enters: the model now, and its answers of then. Leaves: a `General`. Called by `guard`. The starting model is
the only one who knows what was known before: it is asked how alike pictures and everyday texts are. What
counts is the pattern of its answers, which a change of scale or temperature leaves as it is. Pictures are
drawn on the spot: of the job's own images another answer is wanted.

N: pictures, C: texts, P: prepared dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

from cliptune_model.clip import Clip
from cliptune_model.zero_shot import class_embeddings
from cliptune_trainer.data.loading.images import Normalisation
from cliptune_trainer.evaluation.embedding import Scorer, evaluation_mode, prepared_texts
from cliptune_trainer.evaluation.metrics import Floats
from cliptune_trainer.guard.drawings import drawings
from cliptune_trainer.guard.general import General
from cliptune_trainer.guard.words import everyday_texts
from cliptune_trainer.image.geometry import Geometry

AGREEMENT: Final = "agreement"


class AgreementProbe:
    """Asks a model about drawn pictures and everyday texts.

    Args:
        batch_size: pictures or texts in one forward pass.
        check: called between forward passes; may raise.
    """

    def __init__(self, batch_size: int, check: Callable[[], None]) -> None:
        self._batch_size, self._check = batch_size, check
        self._pixels_NHW3: Tensor | None = None
        self._reference_NC: Floats | None = None

    def remember(self, clip: Clip) -> General:
        """Takes the answers of the starting model, which agrees with itself."""
        self._reference_NC = self._ask(clip)
        return self._general(self._reference_NC)

    def measure(self, clip: Clip, *, resamples: int) -> General:
        """Compares; there is no interval, as pictures and texts are no sample of anything.

        Raises:
            RuntimeError: there is nothing to compare with yet.
        """
        del resamples
        return self._general(self._ask(clip))

    def _general(self, answers_NC: Floats) -> General:
        if self._reference_NC is None:
            raise RuntimeError("the starting model has not been asked")
        return General(
            metrics={AGREEMENT: correlation(answers_NC, self._reference_NC)},
            main_metric=AGREEMENT,
            samples=len(answers_NC),
        )

    @torch.no_grad()
    def _ask(self, clip: Clip) -> Floats:
        """How alike pictures and texts are: [N, C]."""
        normalise_pixels = Normalisation.of(clip.preprocess_config, clip.device)
        with evaluation_mode(clip.model):
            parts = []
            for part_BHW3 in torch.split(self._pixels(clip), self._batch_size):
                self._check()
                features_BD = clip.encode_images(normalise_pixels(part_BHW3))
                prepared_BP = clip.similarity.prepare_images(features_BD)
                parts.append(prepared_BP.float().cpu().numpy().astype(np.float64))
            self._check()
            things = [(wordings[0], wordings) for wordings in everyday_texts()]
            texts_CP = prepared_texts(clip, class_embeddings(clip, things, self._batch_size))
        return Scorer(clip)(np.concatenate(parts), texts_CP)

    def _pixels(self, clip: Clip) -> Tensor:
        """The pictures at the model's size, uint8 [N, H, W, 3]: made once, as bytes."""
        if self._pixels_NHW3 is None:
            geometry = Geometry.of(clip.preprocess_config)
            self._pixels_NHW3 = torch.from_numpy(np.stack([np.asarray(geometry(one)) for one in drawings()]))
        return self._pixels_NHW3


def correlation(ours_NC: Floats, theirs_NC: Floats) -> float:
    """Mean over rows of Pearson's correlation: 1 where each row's pattern is the same, whatever its scale."""
    ours, theirs = (rows - rows.mean(axis=1, keepdims=True) for rows in (ours_NC, theirs_NC))
    size = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    # Rows without a pattern agree if neither side has one.
    flat = size < 1e-12
    same = (np.linalg.norm(ours, axis=1) < 1e-6) & (np.linalg.norm(theirs, axis=1) < 1e-6)
    along = np.where(flat, same.astype(np.float64), (ours * theirs).sum(axis=1) / np.where(flat, 1.0, size))
    return float(along.mean())
