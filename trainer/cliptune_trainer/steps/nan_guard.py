"""Which module makes numbers that are none.

Enters: a model and a computation that came out not finite, to be done again. Leaves: a `Culprit`. Called by
the step, after it has kept the weights from harm.

Hooks look at every module's output, innermost first, and at the gradient of every output, in the order of the
backward pass. Each look waits for the device: the guard is for the one repetition, not for training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Culprit:
    """The first module whose numbers are not finite, and which numbers.

    Attributes:
        module: dotted name, or "" for what lies between the towers: the loss.
        what: "parameter", "input", "output", "gradient" or "parameter gradient".
    """

    module: str
    what: str

    def __str__(self) -> str:
        where = self.module or "the loss"
        return {
            "parameter": f"the weights of {where} are not finite",
            "input": f"what enters {where} is not finite already",
            "output": f"{where} makes numbers that are not finite",
            "gradient": f"the gradient becomes not finite in {where}",
            "parameter gradient": f"the gradient of the weights of {where} is not finite",
        }[self.what]


class NanGuard:
    """Looks on while a model computes. `culprit` is None as long as all is finite."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {module: name for name, module in model.named_modules() if name}
        self._output: Culprit | None = None
        self._gradient: Culprit | None = None
        self._last_good = ""

    @property
    def culprit(self) -> Culprit | None:
        """The first one, in the order weights, forward pass, backward pass, gradients of weights."""
        weights = self._bad_parameter("parameter", lambda parameter: parameter)
        return (
            weights
            or self._output
            or self._gradient
            or self._bad_parameter("parameter gradient", lambda parameter: parameter.grad)
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, everything that the model computes is looked at. Compiled towers run eagerly."""
        handles = [module.register_forward_hook(self._look) for module in self._names]
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        name = self._names[module]
        for tensor in _tensors(output):
            if self._output is None and not _finite(tensor):
                entered = all(_finite(part) for part in _tensors(inputs))
                self._output = Culprit(module=name, what="output" if entered else "input")
            if tensor.requires_grad:
                tensor.register_hook(partial(self._look_at_gradient, name))  # type: ignore[no-untyped-call]

    def _look_at_gradient(self, name: str, gradient: Tensor) -> None:
        """Of the output of `name`: what it went through last was the module whose output's was fine."""
        if self._gradient is not None:
            return
        if _finite(gradient):
            self._last_good = name
        else:
            self._gradient = Culprit(module=self._last_good, what="gradient")

    def _bad_parameter(self, what: str, part: Any) -> Culprit | None:
        for name, parameter in self._model.named_parameters():
            value = part(parameter)
            if value is not None and not _finite(value):
                return Culprit(module=name, what=what)
        return None


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
