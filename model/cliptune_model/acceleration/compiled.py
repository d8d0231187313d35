"""The towers' blocks compiled: fewer passes over memory between the matrix products.

Enters: a `Clip` and the policy's choice. Leaves: the same model, whose blocks run compiled code in training;
names of weights, copies and exports are as before. Called by the trainer once attention and checkpointing are
installed, and by the benchmarks.

All blocks of a tower share their code, so one block is compiled, not twelve: seconds instead of minutes.
There is a graph for each shape (micro-batch, text length), with gradients and without; their number is
bounded, and whatever lies beyond, or cannot be compiled, runs as it is, to the same result: random masks are
those of torch's own kernels, compiled or not. In evaluation mode nothing is compiled: its batches have many
shapes.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import lookup_backend
from torch._dynamo.exc import TorchDynamoException

from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_model.towers.text_tower import text_tower

_log = logging.getLogger(__name__)

# Two kinds of block, for each tower one length of parts with gradients and two without, larger ones of texts
# too, seven text lengths: 62; and some room.
GRAPH_LIMIT: Final = 80
# Of each further image size: two kinds of block, parts with gradients and without, the last part.
_GRAPHS_OF_A_SIZE: Final = 8

# Whose code compiles, or calls what was compiled.
_OF_THE_COMPILER: Final = ("torch._inductor", "torch._functorch._aot_autograd", "triton")

Graph = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Pass:
    """Rows that go through a tower together.

    Attributes:
        tokens: of each text; 0: the rows are images.
        rows: how many.
        with_graph: for a backward pass; otherwise without gradients.
        size: (height, width) of images; (0, 0): the model's own.
    """

    tokens: int
    rows: int
    with_graph: bool
    size: tuple[int, int] = (0, 0)


class Compilation:
    """The compiled blocks of one model. Made by `compile_towers`.

    Attributes:
        choice: "on", or "off" with the reason; becomes "off" when the compiler fails.
        graphs: compiled so far.
        limit: the most of them.
        compile_s: seconds that the compiler took so far; they are no part of a step's own time.
    """

    def __init__(
        self,
        clip: Clip,
        choice: Choice,
        backend: str,
        options: Mapping[str, object],
        *,
        limit: int = GRAPH_LIMIT,
    ) -> None:
        self.choice = choice
        self.limit = limit
        self.graphs = 0
        self.compile_s = 0.0
        self._clip = clip
        self._modules: list[nn.Module] = []
        self._backend = backend
        self._options: dict[str, Any] = dict(options)

    def warm_up(self, passes: Iterable[Pass], autocast: Callable[[], AbstractContextManager[object]]) -> None:
        """Compile what the steps will need, outside of any step; other shapes are compiled when they come.

        Args:
            passes: of the steps.
            autocast: the precision of the step.
        """
        if self.choice.value != "on":
            return
        device = self._clip.device
        devices = [device] if device.type == "cuda" else []
        was_training = self._clip.model.training
        self._clip.model.train()
        try:
            with torch.random.fork_rng(devices=devices):
                for one in sorted(set(passes)):
                    with torch.set_grad_enabled(one.with_graph), autocast():
                        if one.tokens:
                            shape = (one.rows, one.tokens)
                            self._clip.encode_texts(torch.zeros(shape, dtype=torch.int64, device=device))
                        else:
                            size = one.size if all(one.size) else self._clip.image_size
                            images_BCHW = torch.zeros(one.rows, 3, *size, device=device)
                            self._clip.encode_images(images_BCHW)
        except torch.OutOfMemoryError as error:
            _log.info("the steps compile by themselves: %s", error)
        finally:
            self._clip.model.train(was_training)

    def start(self, modules: Sequence[nn.Module]) -> None:
        """Have `modules` compiled when they are first called."""
        dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, self.limit)
        # Dynamo looks at every input's gradient, and is told by torch that some have none.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        self._modules = list(modules)
        for module in self._modules:
            module.compile(backend=self._compile, dynamic=False)
            module._compiled_call_impl = self._in_training(module, cast(Graph, module._compiled_call_impl))

    def stop(self, reason: str) -> None:
        """Back to the modules as they were."""
        for module in self._modules:
            module._compiled_call_impl = None
        self._modules = []
        self.choice = Choice(subject=self.choice.subject, value="off", reason=reason)

    @property
    def on(self) -> bool:
        """Whether blocks run compiled, or will when they are called."""
        return self.choice.value == "on"

    def gives_up(self, error: BaseException) -> bool:
        """After an error in the middle of a step: back to the modules as they were, if the compiler raised it
        or what it made; False: the error is another's, and nothing changes.

        A backward pass is compiled when it is first gone through. Where that fails, the forward pass is over:
        the step has to be taken again.
        """
        if not self.on or not _of_the_compiler(error):
            return False
        self.stop(f"the compiler failed: {_first_line(error)}")
        return True

    def _in_training(self, module: nn.Module, compiled: Graph) -> Graph:
        def call(*args: Any, **kwargs: Any) -> Any:
            if module.training:
                try:
                    return compiled(*args, **kwargs)
                except TorchDynamoException as error:
                    self.stop(f"the compiler failed: {_first_line(error)}")
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

        return call

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Graph:
        """torch's compiler, as a backend of Dynamo that answers a failure with the graph itself."""
        if self.choice.value != "on" or self.graphs >= self.limit:
            return graph.forward
        began = time.perf_counter()
        try:
            compiled: Graph = lookup_backend(self._backend)(graph, inputs, **self._options_for(graph))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may raise anything; none of it needs to end a training
            reason = f"the compiler failed: {_first_line(error)}"
            self.choice = Choice(subject=self.choice.subject, value="off", reason=reason)
            _log.warning("what is not compiled yet runs as it is: %s", error)
            return graph.forward
        finally:
            self.compile_s += time.perf_counter() - began
        self.graphs += 1
        return compiled

    def _options_for(self, graph: torch.fx.GraphModule) -> dict[str, Any]:
        if self._backend != "inductor" or not _draws(graph):
            return self._options
        # The compiler's own random numbers are others than torch's. A part of a batch goes through the towers
        # twice, and need not be compiled both times: its masks must be the same.
        patches = {**self._options.get("config_patches", {}), "fallback_random": True}
        return {**self._options, "config_patches": patches}


def compile_towers(
    clip: Clip,
    choice: Choice,
    *,
    whole: bool = False,
    image_sizes: int = 1,
    backend: str = "inductor",
    options: Mapping[str, object] = MappingProxyType({}),
) -> Compilation:
    """Compile both towers if `choice.value` is "on". Never on Apple's GPU.

    Args:
        clip: in place. A block computes the same, to the rounding of its format.
        choice: the policy's.
        whole: each tower as one graph, not a block at a time; it takes many times longer to compile.
        image_sizes: how many there will be; each has graphs of its own.
        backend: of `torch.compile`.
        options: for it.
    """
    limit = GRAPH_LIMIT + _GRAPHS_OF_A_SIZE * (image_sizes - 1)
    compilation = Compilation(clip, choice, backend, options, limit=limit)
    if choice.value != "on":
        return compilation
    modules = list(_whole(clip.model) if whole else _blocks(clip.model))
    if clip.device.type == "mps":
        compilation.stop("compiled code is slower than eager on Apple's GPU (pytorch#192551)")
    elif not modules:
        compilation.stop("no tower of this model is a stack of transformer blocks")
    else:
        compilation.start(modules)
    return compilation


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of each stack of blocks that hold attention, as open_clip and timm name them."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("resblocks", "blocks") and isinstance(
            module, nn.ModuleList | nn.Sequential
        ):
            yield from (
                block for block in module if any("attn" in part for part, _ in block.named_children())
            )


def _whole(model: Any) -> Iterator[nn.Module]:
    tower, _ = text_tower(model)
    yield model.visual
    yield model.text if tower is None else tower.module.transformer


def _draws(graph: torch.fx.GraphModule) -> bool:
    """Whether something in it is left out at random."""
    for node in graph.graph.nodes:
        name = getattr(node.target, "__name__", node.target)
        if name == "dropout":
            p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            if p != 0.0:
                return True
        elif name in ("bernoulli", "bernoulli_"):
            return True
    return False


def _of_the_compiler(error: BaseException) -> bool:
    """By its class, or by where it was raised: a compiler's errors are of many classes."""
    frame = error.__traceback__
    while frame is not None:
        if str(frame.tb_frame.f_globals.get("__name__")).startswith(_OF_THE_COMPILER):
            return True
        frame = frame.tb_next
    return isinstance(error, TorchDynamoException)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
