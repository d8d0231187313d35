"""What a program does on device "mps" that a Mac would refuse, or wait for.

Enters: a program, run on fake tensors inside the watch. Leaves: findings, in words. Called by the programs of
`tests/mps`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.fake_mps.kernels import refusal

# Products over so many numbers read past their operands on M1 and M2 (pytorch#193487, #195163).
LONG_SUM = 32_767
_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})
_COPIES = frozenset({"aten::copy_", "aten::_to_copy"})
_WIDE = (torch.float64, torch.complex128)


class Watch(TorchDispatchMode):  # type: ignore[misc]
    """Counts operators on the device. `findings` are what they did wrong, `reads` how often the host waited.

    A number read from a fake tensor is 0: there is no other.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operators: Counter[Any] = Counter()
        self._wrong: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    @property
    def operators(self) -> int:
        """How many ran on the device."""
        return sum(self._operators.values())

    @property
    def findings(self) -> list[str]:
        """Everything that was wrong, each once."""
        refused = filter(None, map(refusal, self._operators))
        return sorted({*refused, *self._wrong})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked by torch itself, several times an operator
        if func.namespace == "prim":
            return func(*args, **kwargs)
        entered = list(_tensors((*args, *kwargs.values())))
        if func is torch.ops.aten._local_scalar_dense.default:
            if args[0].device.type == "mps":
                self.reads[str(func)] += 1
            if isinstance(args[0], FakeTensor):
                return 0.0 if args[0].dtype.is_floating_point else 0
        result = func(*args, **kwargs)
        self._judge(func, entered, list(_tensors((result,))))
        return result

    def _judge(self, func: Any, entered: list[Tensor], left: list[Tensor]) -> None:
        into = {(leaf.device.type, leaf.dim() > 0) for leaf in entered}
        out_of = {(leaf.device.type, leaf.dim() > 0) for leaf in left}
        devices = {device for device, _ in into | out_of}
        for other in devices - {"mps", "cpu"}:
            self._wrong[f"{func} on {other}"] += 1
        if "mps" not in devices:
            return
        self._operators[func] += 1
        if any(device == "mps" for device, _ in into):
            name = func._schema.name
            if any(device == "cpu" for device, _ in out_of):
                self.reads[str(func)] += 1
            elif ("cpu", True) in into and name not in _COPIES:
                self._wrong[f"{func} mixes tensors of CPU and MPS"] += 1
            if name in _PRODUCTS:
                one, other = entered[-2:]
                if one.shape[-1] >= LONG_SUM and min(one.shape[-2], other.shape[-1]) >= 16:
                    self._wrong[f"{func} sums over {one.shape[-1]} numbers"] += 1
        if any(leaf.dtype in _WIDE and leaf.device.type == "mps" for leaf in left):
            self._wrong[f"{func} makes float64"] += 1


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
