"""The modules of a folded image tower: a convolution that is also the norm and the activation after it.

Put in by `folded.py`; what they compute is exact to rounding.

Shape suffixes: B batch, C channels, H height, W width, D embedding, O outputs of a convolution, I its inputs,
K and L its kernel's height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Final

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

# Activations that oneDNN computes while it writes a convolution's result, as its operator names them.
_IN_KERNEL: Final[dict[type[nn.Module], tuple[str, list[float]]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
}


class FoldedConvolution(nn.Module):
    """`activation(norm(convolution(x)))` in one convolution, quickest for inputs of one height and width.

    Attributes:
        activates: the activation is computed too; otherwise it is to follow.
    """

    def __init__(
        self,
        convolution: nn.Conv2d,
        norm: nn.BatchNorm2d,
        activation: nn.Module,
        input_BCHW: torch.Size,
        *,
        rows: int,
        fused: bool,
    ) -> None:
        """`rows`: images that mostly come together. `fused`: by oneDNN's own operator."""
        super().__init__()
        before, after = zip(*_padding(convolution, input_BCHW[2:]), strict=True)
        self._size: Final = input_BCHW[2:]
        # Padding that follows from the size of the input is found anew for another; this keeps no weights.
        same = type(convolution) is Conv2dSame
        self._same: Final = (copy.deepcopy(convolution).to("meta"),) if same else ()
        weight_OIKL, bias_O = _folded_weights(convolution, norm)
        # Padding on one side alone would be a copy of the input: a row and a column of zeros in front of the
        # kernel and equal padding read the same.
        grown = [b != a for b, a in zip(before, after, strict=True)]
        weight_OIKL = F.pad(weight_OIKL, (int(grown[1]), 0, int(grown[0]), 0))
        self._grown: Final = grown
        self._weight = weight_OIKL.contiguous(memory_format=torch.channels_last)
        self._bias = bias_O
        self._geometry: Final = ([*after], [*convolution.stride], [*convolution.dilation], convolution.groups)
        self.activates = fused and type(activation) in _IN_KERNEL
        self._kernel: Callable[..., Tensor] | None = None
        if fused:
            self._name, self._scalars = _IN_KERNEL.get(type(activation), ("none", []))
            self._kernel = torch.ops.mkldnn._convolution_pointwise.default
            padding, stride, dilation, groups = self._geometry
            nn_ops: Any = torch._C._nn
            # In the order that the kernel reads; batches of another size are reordered where they must be.
            self._weight = nn_ops.mkldnn_reorder_conv2d_weight(
                self._weight.to_mkldnn(), padding, stride, dilation, groups, (rows, *input_BCHW[1:])
            )

    @staticmethod
    def takes(convolution: nn.Conv2d, input_BCHW: torch.Size) -> bool:
        """Whether this convolution can be one of these."""
        if convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
            return False
        padding = zip(_padding(convolution, input_BCHW[2:]), convolution.dilation, strict=True)
        return all(
            after == before or (after == before + 1 and dilation == 1)
            for (before, after), dilation in padding
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] → [B, O, H', W']."""
        padding, stride, dilation, groups = self._geometry
        if self._same and images_BCHW.shape[2:] != self._size:
            rows, columns = _padding(self._same[0], images_BCHW.shape[2:])
            around = (columns[0] + self._grown[1], columns[1], rows[0] + self._grown[0], rows[1])
            images_BCHW, padding = F.pad(images_BCHW, around), [0, 0]
        if self._kernel is None:
            return F.conv2d(images_BCHW, self._weight, self._bias, stride, padding, dilation, groups)
        return self._kernel(
            images_BCHW,
            self._weight,
            self._bias,
            padding,
            stride,
            dilation,
            groups,
            self._name,
            self._scalars,
            "",
        )


class InParts(nn.Module):
    """A tower that takes a batch a few images at a time, in the order that convolutions on a CPU like."""

    def __init__(self, tower: nn.Module, rows: int) -> None:
        super().__init__()
        self.tower = tower
        self.rows: Final = rows

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] → [B, D]."""
        parts = images_BCHW.contiguous(memory_format=torch.channels_last).split(self.rows)  # type: ignore[no-untyped-call]
        return torch.cat([self.tower(part_BCHW) for part_BCHW in parts])


def _padding(convolution: nn.Conv2d, input_HW: torch.Size) -> list[tuple[int, int]]:
    """Before and after, of height and of width."""
    if type(convolution) is not Conv2dSame:
        return [(int(size), int(size)) for size in convolution.padding]
    totals = []
    for size, kernel, stride, dilation in zip(
        input_HW, convolution.kernel_size, convolution.stride, convolution.dilation, strict=True
    ):
        # TensorFlow's "same": as many outputs as strides fit, the odd one at the end.
        totals.append(max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0))
    return [(total // 2, total - total // 2) for total in totals]


def _folded_weights(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Multiplied in fp64: statistics may be small."""
    given = (
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
    )
    weight, bias, mean, variance, scale, shift = (None if t is None else t.detach().double() for t in given)
    assert weight is not None
    assert mean is not None
    assert variance is not None
    folded = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)
    return folded[0].detach().float(), folded[1].detach().float()
