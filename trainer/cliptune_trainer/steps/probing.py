"""Linear probing before fine-tuning: steps that train the towers' last projections alone.

Enters: a model. Leaves: the same, inside whose `probing` nothing else takes part in a step. Called by the
stepper. Features that the projections do not fit yet are so not bent to fit them (Kumar et al. 2022, LP-FT,
section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from cliptune_trainer.steps.depth import projections


class LinearProbe:
    """Which weights of a model wait while its projections are trained; logit scale and bias do not.

    Args:
        model: as it is trained.

    Raises:
        SpecError: a tower that is trained has no projection of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        first = projections(model)
        self._waiting = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name not in first and not name.startswith("logit_")
        ]

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Inside, a step makes no graph for the weights that wait, and leaves them as they are."""
        for parameter in self._waiting:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._waiting:
                parameter.requires_grad_(True)
