"""The pieces of a training step at their real shapes: blocks, patches, loss, long sums, position embeddings.

Enters: a device and `Sizes`. Leaves: `Proof`s against float64 on the CPU.

Shape suffixes: B pairs, L tokens, W width, C channels, H height, K rows that are summed over, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from cliptune_model.machine.proofs import Proof
from cliptune_model.machine.synchronize import synchronize
from cliptune_model.proving.compare import FP32_LIMIT, Sizes, churned, judged, relative, true_fp32, worst


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """How a module is made, with the same weights each time; its input; and how it is called."""

    make: Callable[[], nn.Module]
    x: Tensor
    call: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)

    def module(self, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """One of its own, with seeded weights, in training."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().to(device, dtype)

    def gradients(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output, and gradients of the input and of every parameter, on the CPU."""
        module = self.module(device, dtype)
        x = self.x.detach().clone().to(device, dtype).requires_grad_()
        out = self.call(module, x)
        # A gradient that is not the same everywhere.
        weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(device, dtype)
        torch.autograd.backward(out, weights)
        synchronize(device)
        found = {name: parameter.grad for name, parameter in module.named_parameters()}
        found |= {"output": out.detach(), "input": x.grad}
        return {name: tensor.cpu().double() for name, tensor in found.items() if tensor is not None}

    def difference(self, device: str) -> float:
        """In fp32 on the device, in used memory, against float64 on the CPU."""
        exact = self.gradients("cpu", torch.float64)
        with true_fp32(), churned(device):
            return worst(self.gradients(device, torch.float32), exact)


def causal_mask(tokens: int) -> Tensor:
    """As open_clip has it, of floats: `is_causal=True` leaked in half precision on MPS (pytorch#195910)."""
    return torch.full((tokens, tokens), float("-inf")).triu(1)


def pieces(sizes: Sizes) -> dict[str, Piece]:
    """The pieces of a CLIP at these sizes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    pixels_BCHW = normal(sizes.pairs, 3, sizes.image_px, sizes.image_px)
    return {
        "image block": Piece(
            make=lambda: ResidualAttentionBlock(sizes.image_width, sizes.image_heads),
            x=normal(sizes.pairs, sizes.image_tokens, sizes.image_width),
        ),
        "text block": Piece(
            make=lambda: ResidualAttentionBlock(sizes.text_width, sizes.text_heads),
            x=normal(sizes.pairs, sizes.text_tokens, sizes.text_width),
            call=_masked,
        ),
        "patch embedding": Piece(
            make=lambda: nn.Conv2d(3, sizes.image_width, sizes.patch_px, stride=sizes.patch_px, bias=False),
            x=pixels_BCHW,
        ),
        "ResNet stem": Piece(
            make=lambda: nn.Sequential(
                nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
            ),
            x=pixels_BCHW,
        ),
        "loss": Piece(make=nn.Identity, x=normal(2, sizes.batch_pairs, sizes.embedding_dim), call=_loss),
    }


def prove_real_shapes(device: str, sizes: Sizes) -> Proof:
    """Gradients of every piece."""
    differences = {name: piece.difference(device) for name, piece in pieces(sizes).items()}
    name, difference = max(differences.items(), key=lambda entry: (entry[1] != entry[1], entry[1]))
    what = f"{', '.join(differences)} forward and backward on {device} in used memory; largest, {name}"
    return judged(difference, FP32_LIMIT, what)


def prove_long_sums(device: str, sizes: Sizes) -> Proof:
    """Weight gradients over very many tokens, as a product and as a linear layer computes them."""
    generator = torch.Generator().manual_seed(0)
    a_KM, b_KN = (torch.randn(sizes.long_rows, columns, generator=generator) for columns in (32, 48))
    exact_MN = a_KM.double().T @ b_KN.double()
    with true_fp32():
        product_MN = a_KM.to(device).T @ b_KN.to(device)
        weight_NM = torch.zeros(48, 32, device=device, requires_grad=True)
        out_KN = F.linear(a_KM.to(device).reshape(8, -1, 32), weight_NM)
        torch.autograd.backward(out_KN, b_KN.to(device).reshape(out_KN.shape))
    assert weight_NM.grad is not None
    difference = worst(
        {"product": product_MN.cpu(), "linear": weight_NM.grad.T.cpu()},
        {"product": exact_MN, "linear": exact_MN},
    )
    return judged(difference, FP32_LIMIT, f"a weight gradient over {sizes.long_rows:,} rows on {device}")


def prove_resize(device: str, sizes: Sizes) -> Proof:
    """Position embeddings are resized on the CPU; also told: whether the device could do it itself."""
    generator = torch.Generator().manual_seed(0)
    grid = sizes.image_px // sizes.patch_px
    grid_1WHH = torch.randn(1, sizes.image_width, grid, grid, generator=generator)
    exact = _resized(grid_1WHH.double(), grid + 5)
    arrived = _resized(grid_1WHH, grid + 5).to(device)
    proof = judged(
        relative(arrived, exact), FP32_LIMIT, f"resized on the CPU in fp32, then moved to {device}"
    )
    try:
        own = grid_1WHH.to(device).requires_grad_()
        resized = _resized(own, grid + 5)
        torch.autograd.backward(resized.sum())
        told = f"{device}'s own antialiased bicubic differs by {relative(resized, exact):.1e}"
    except (RuntimeError, NotImplementedError):
        told = f"{device} has no antialiased bicubic with a gradient of its own"
    return Proof(holds=proof.holds, told=f"{proof.told}; {told}, and is not used")


def _resized(grid_1WHH: Tensor, side: int) -> Tensor:
    return F.interpolate(grid_1WHH, (side, side), mode="bicubic", antialias=True, align_corners=False)


def _masked(module: nn.Module, x: Tensor) -> Tensor:
    mask = causal_mask(x.shape[1]).to(x.device, x.dtype)
    return module(x, attn_mask=mask)  # type: ignore[no-any-return]


def _loss(_: nn.Module, x_2BD: Tensor) -> Tensor:
    image_BD, text_BD = F.normalize(x_2BD, dim=-1)
    logits_BB = 100.0 * image_BD @ text_BD.T
    pairs_B = torch.arange(len(logits_BB), device=x_2BD.device)
    return (F.cross_entropy(logits_BB, pairs_B) + F.cross_entropy(logits_BB.T, pairs_B)).reshape(1)
