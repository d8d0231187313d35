"""Mistakes that work on a CPU and fail, or cost time, on a Mac; run in the process of `steps.py`.

Enters: nothing. Leaves: for each mistake what the watch says of it. If it stopped seeing
one, clean steps would prove nothing. And the loss over more pairs than M1 and M2 can sum over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from cliptune_trainer.losses import Contrast, Identities, choose_tiling, loss_for
from tests.support.fake_mps.watch import Watch

MANY = 33_000


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="mps", dtype=dtype)


def labels_on_the_cpu() -> None:
    F.cross_entropy(noise(4, 4), torch.arange(4))


def mask_on_the_cpu() -> None:
    noise(4, 4) + torch.zeros(4, 4)


def index_on_the_cpu() -> None:
    noise(4, 4)[torch.arange(2)]


def float64_schedule() -> None:
    torch.linspace(0, 1, 5, dtype=torch.float64, device="mps")


def float64_from_numpy() -> None:
    torch.zeros(3, dtype=torch.float64).to("mps")


def another_accelerator() -> None:
    torch.zeros(3, device="cuda")


def a_loss_read_in_the_step() -> None:
    float(noise(4).sum())


def a_copy_to_the_cpu() -> None:
    noise(4).cpu()


def a_decomposition() -> None:
    torch.linalg.eig(noise(3, 3))


def a_sum_over_many_pairs() -> None:
    noise(16, MANY) @ noise(MANY, 16)


def nothing() -> None:
    """No mistake: a number of the CPU is a number."""
    noise(4) * torch.tensor(2.0)


def whole_loss_of_many_pairs() -> None:
    _loss_of_many_pairs(tiled=False)


def tiled_loss_of_many_pairs() -> None:
    """No mistake."""
    _loss_of_many_pairs(tiled=True)


def _loss_of_many_pairs(*, tiled: bool) -> None:
    image_ND, text_ND = (noise(MANY, 16).requires_grad_() for _ in range(2))
    ids_N = torch.zeros(MANY, dtype=torch.int64, device="mps")
    tiling = choose_tiling("infonce", "auto", MANY, 16, "mps")
    loss = loss_for("infonce", tiled=tiled, block=int(tiling.value))
    scale = noise(1).requires_grad_()
    identities = Identities(image_ids_N=ids_N, caption_ids_N=ids_N)
    value = loss(Contrast(image_NP=image_ND, text_NP=text_ND, logit_scale=scale[0], identities=identities))
    value.backward()  # type: ignore[no-untyped-call]


MISTAKES: tuple[Callable[[], None], ...] = (
    labels_on_the_cpu,
    mask_on_the_cpu,
    index_on_the_cpu,
    float64_schedule,
    float64_from_numpy,
    another_accelerator,
    a_loss_read_in_the_step,
    a_copy_to_the_cpu,
    a_decomposition,
    a_sum_over_many_pairs,
    nothing,
    whole_loss_of_many_pairs,
    tiled_loss_of_many_pairs,
)


def report() -> dict[str, list[str]]:
    """By mistake."""
    found = {}
    for mistake in MISTAKES:
        with FakeTensorMode(), Watch() as watch:
            refused = []
            try:
                mistake()
            except RuntimeError as error:  # what torch itself refuses
                refused.append(str(error).splitlines()[0])
        found[mistake.__name__] = [*refused, *watch.findings, *watch.reads]
    return found
