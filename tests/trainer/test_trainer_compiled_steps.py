"""Steps whose towers are compiled, and compilers that fail in the middle of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import register_backend
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor_config
from torch.nn import functional as F

from cliptune.internal.v1 import trainer_pb2
from cliptune_model.acceleration.compiled import Compilation, compile_towers
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.steps.optim import build_optimizer, state_tensors
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.step import Step
from tests.trainer.conftest import MakeJob
from tests.trainer.test_trainer_run import _free_again, trained
from tests.trainer.towers import small_batch, small_clip

__all__ = ["_free_again"]  # a run makes torch deterministic for its process

ON = Choice(subject="compile", value="on", reason="a test")
ROWS = 6


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()


def broken(where: str) -> Callable[..., Any]:
    """A compiler that runs graphs as they are, but cannot do some of them."""
    forwards = 0

    def forward(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        nonlocal forwards
        forwards += 1
        if where == "second forward" and forwards == 2:
            raise NotImplementedError("no kernel for this forward pass")
        return make_boxed_func(graph.forward)

    def backward(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        if where == "compiled backward":
            return make_boxed_func(fails)
        if where == "backward":
            raise NotImplementedError("no kernel for this backward pass")
        return make_boxed_func(graph.forward)

    def fails(*inputs: Tensor) -> None:
        raise RuntimeError("a kernel that was made does not run")

    backend: Callable[..., Any] = aot_autograd(fw_compiler=forward, bw_compiler=backward)
    return backend


def drawing_clip() -> Clip:
    """Dropout in the blocks, and batch statistics before them: all that half a step could leave behind."""
    clip = small_clip("vit")
    for block in clip.model.get_submodule("visual.transformer.resblocks"):
        block.mlp.c_fc.register_forward_pre_hook(_dropped)
    visual = clip.model.get_submodule("visual")
    visual.conv1 = nn.Sequential(visual.conv1, nn.BatchNorm2d(32))
    return clip


def _dropped(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (F.dropout(inputs[0], 0.2, module.training),)


def step_of(clip: Clip, compilation: Compilation | None, micro_batch_size: int) -> tuple[Step, Any]:
    optimizer = build_optimizer(clip.model, learning_rate=1e-3, weight_decay=0.1)
    step = Step(
        clip,
        Objective(),
        optimizer,
        Precision("fp32", "cpu"),
        clip_norm=1.0,
        micro_batch_size=micro_batch_size,
        compilation=compilation,
    )
    return step, optimizer


@pytest.mark.parametrize(
    ("where", "micro_batch_size"), [("second forward", 2), ("backward", 2), ("compiled backward", ROWS)]
)
def test_a_step_in_which_the_compiler_fails_is_taken_again_uncompiled_to_the_same_result(
    where: str, micro_batch_size: int
) -> None:
    name = f"broken {where}"
    register_backend(broken(where), name=name)  # type: ignore[no-untyped-call]
    results, ends = [], []
    for compiled in (True, False):
        clip = drawing_clip()
        compilation = compile_towers(clip, ON, backend=name) if compiled else None
        step, optimizer = step_of(clip, compilation, micro_batch_size)
        torch.manual_seed(3)
        results.append([step(small_batch(ROWS, seed=number), 1e-3) for number in range(2)])
        ends.append({**clip.model.state_dict(), **state_tensors(optimizer), "random": torch.get_rng_state()})
        if compilation is not None:
            assert "the compiler failed" in compilation.choice.reason
            assert not compilation.on
            assert all(module._compiled_call_impl is None for module in clip.model.modules())
    assert results[0] == results[1]
    assert ends[0].keys() == ends[1].keys()
    assert [key for key, value in ends[0].items() if not torch.equal(value, ends[1][key])] == []


def test_errors_that_are_not_the_compilers_stay_what_they_are_and_leave_it_on() -> None:
    clip = small_clip("vit")
    compilation = compile_towers(clip, ON, backend="aot_eager")
    step, _ = step_of(clip, compilation, ROWS)

    def fails(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(_refuse)  # type: ignore[no-untyped-call]

    clip.model.get_submodule("visual").register_forward_hook(fails)
    with pytest.raises(ValueError, match="of the user's own"):
        step(small_batch(ROWS), 1e-3)
    assert compilation.on


def _refuse(gradient: Tensor) -> None:
    raise ValueError("an error of the user's own")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)")
def test_compiled_blocks_draw_the_masks_that_they_draw_uncompiled() -> None:
    clip = small_clip("vit")
    for block in clip.model.get_submodule("visual.transformer.resblocks"):
        block.mlp.c_fc.register_forward_pre_hook(_dropped)
    images_B3HW = small_batch(3).images_B3HW
    compilation = compile_towers(clip, ON)
    features = []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.no_grad():
            features.append(clip.encode_images(images_B3HW))
        compilation.stop("enough")
    assert compilation.graphs == 1
    torch.testing.assert_close(features[0], features[1], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)")
def test_a_job_whose_backward_pass_cannot_be_compiled_says_so_and_trains_as_one_without(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the compiler's own backward pass is broken")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_backward", fails)
    short = {"epochs": 1, "batch_size": 12}
    compiled, plain = (make_job(switch, train={**short, "compile": switch}) for switch in ("on", "off"))
    for job in (compiled, plain):
        with inductor_config.patch(fx_graph_cache=False):
            assert trained(job).outcome == trainer_pb2.OUTCOME_SUCCEEDED
    assert compiled.losses(1) == plain.losses(1)
    assert "backward pass is broken" in compiled.notices(1)["not-compiled"]
    assert "not-compiled" not in plain.notices(1)
