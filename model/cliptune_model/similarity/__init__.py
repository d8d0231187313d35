"""How alike embeddings are: one object for the loss, the evaluation and the server.

    similarity(image, text) = of_products(prepare_images(image) . prepare_texts(text))

Enters: features as the towers leave them. Leaves: scores. `Clip.similarity` is the model's own.
"""

from __future__ import annotations

from cliptune_model.similarity.base import Bounds, Similarity, normalise, widened
from cliptune_model.similarity.directions import Angular, Cosine
from cliptune_model.similarity.lengths import Dot, Mahalanobis, SquaredEuclidean
from cliptune_model.similarity.lorentz import Lorentz
from cliptune_model.similarity.named import DEFAULT, SIMILARITIES, similarity_for

__all__ = [
    "DEFAULT",
    "SIMILARITIES",
    "Angular",
    "Bounds",
    "Cosine",
    "Dot",
    "Lorentz",
    "Mahalanobis",
    "Similarity",
    "SquaredEuclidean",
    "normalise",
    "similarity_for",
    "widened",
]
