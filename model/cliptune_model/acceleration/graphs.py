"""Small batches as CUDA graphs: one launch instead of hundreds.

Enters: a model's forwards, and batches of few rows. Leaves: their features, or nothing where no graph serves.
Made and used by the engine on the device's thread: recording one takes milliseconds and goes between two
batches. A batch of ViT-B/32 of one image took 6.6 ms by launches and 0.96 ms as a graph (H100, bf16).

A graph holds one shape. Batches of fewer rows go through the next larger one, whose other rows are whatever
was there before: rows do not meet in the towers of a CLIP in evaluation mode. The number of graphs and their
memory are bounded, they share one pool, and each is proved with other input than it was recorded with.

Shape suffixes: N rows, C channels, H height, W width, L tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from cliptune_model.choice import Choice

# Up to 32 launches took longer than kernels (3.4 ms against 1.7); beyond, they overlap.
ROWS: Final = (1, 2, 4, 8, 16, 32)
LIMIT: Final = 48
# Longer texts gain less from a graph, for their kernels run longer than a launch takes.
LONGEST_TEXT: Final = 96
# The same kernels, mostly; libraries may choose others, which round bf16 elsewhere.
LEAST_COSINE: Final = 0.9999
_WARM_UPS: Final = 3

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """A forward that can be repeated: `replay` computes `found_ND` from what `given` holds then.

    `owner` lives as long as this.
    """

    given: Tensor
    found_ND: Tensor
    replay: Callable[[], None]
    owner: object = None


Record = Callable[[Forward, Tensor], Recorded]


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Shape:
    """What one graph takes: `rows` of images of (height, width), or of texts of (tokens,)."""

    rows: int
    row: tuple[int, ...]

    @property
    def is_text(self) -> bool:
        """Rows of tokens."""
        return len(self.row) == 1

    def example(self, device: torch.device, seed: int) -> Tensor:
        """Input of this shape; token 1 ends nothing, so the largest number stands for the end of a text."""
        generator = torch.Generator().manual_seed(seed)
        if self.is_text:
            tokens_NL = torch.randint(1, 400, (self.rows, *self.row), generator=generator)
            return tokens_NL.to(device)
        return torch.randn(self.rows, 3, *self.row, generator=generator).to(device)


def shapes(image_size: tuple[int, int], text_lengths: Sequence[int], limit: int = LIMIT) -> list[Shape]:
    """What is recorded, the most useful first: one row of each kind before more of any."""
    texts = [(length,) for length in sorted(text_lengths) if length <= LONGEST_TEXT]
    wanted = [Shape(rows=rows, row=row) for rows in ROWS for row in (image_size, *texts)]
    return wanted[:limit]


@dataclass(eq=False, kw_only=True, slots=True)
class Graphs:
    """The graphs of one model. `add` records one, `run` uses them.

    Attributes:
        images, texts: forwards of the model, [N, 3, H, W] or [N, L] on the device → [N, D].
        record: makes a forward repeatable; `cuda_recorder` on CUDA.
        room_bytes: memory that all graphs together may take.
        held_bytes: what the device's memory holds now.
    """

    images: Forward
    texts: Forward
    record: Record
    device: torch.device
    room_bytes: int
    held_bytes: Callable[[], int]
    choice: Choice = field(init=False)
    _recorded: dict[Shape, Recorded] = field(default_factory=dict)
    _began_bytes: int | None = None
    _ended: bool = False
    _failed: dict[bool, str] = field(default_factory=dict)
    """Why no more graphs are recorded of images (False) or texts (True)."""

    def __post_init__(self) -> None:
        self._tell("")

    @torch.inference_mode()
    def add(self, shape: Shape) -> bool:
        """Records and proves one. False: no more are wanted, and `choice` says why.

        A tower that cannot be recorded is left out, and the other one goes on.
        """
        if self._ended:
            return False
        if shape.is_text in self._failed:
            return True
        if self._began_bytes is None:
            self._began_bytes = self.held_bytes()
        taken_bytes = self.held_bytes() - self._began_bytes
        if taken_bytes > self.room_bytes:
            return self._end(f"they take {taken_bytes / 2**20:.0f} MiB")
        forward = self.texts if shape.is_text else self.images
        try:
            recorded = self.record(forward, shape.example(self.device, seed=0))
            cosine = self._cosine(forward, recorded, shape)
        except Exception as error:  # a recorder may raise anything; the model serves without it
            kind = "texts" if shape.is_text else "images"
            self._failed[shape.is_text] = f"{kind}: {type(error).__name__}: {str(error)[:200]}"
            self._tell("")
            return len(self._failed) < 2
        if not cosine >= LEAST_COSINE:  # NaN too
            self._recorded.clear()
            return self._end(f"a graph's vectors have a cosine of {cosine:.6f} to the forward's")
        self._recorded[shape] = recorded
        self._tell("")
        return True

    @torch.inference_mode()
    def run(self, batch: Tensor) -> Tensor | None:
        """[N, 3, H, W] or [N, L], also on the CPU → [N, D], overwritten by the next run; None: no graph."""
        recorded = self._covering(len(batch), tuple(batch.shape[1:]))
        if recorded is None:
            return None
        recorded.given[: len(batch)].copy_(batch, non_blocking=True)
        recorded.replay()
        return recorded.found_ND[: len(batch)]

    def _covering(self, rows: int, item: tuple[int, ...]) -> Recorded | None:
        row = item if len(item) == 1 else item[1:]
        for most in ROWS:
            if most >= rows and (found := self._recorded.get(Shape(rows=most, row=row))) is not None:
                return found
        return None

    def _cosine(self, forward: Forward, recorded: Recorded, shape: Shape) -> float:
        """The least one, of input that the graph was not recorded with."""
        given = shape.example(self.device, seed=1)
        wanted_ND = forward(given).float().clone()
        recorded.given.copy_(given)
        recorded.replay()
        found_ND = recorded.found_ND.float()
        return float(torch.nn.functional.cosine_similarity(wanted_ND, found_ND, dim=1).min())

    def _end(self, why: str) -> bool:
        self._ended = True
        self._tell(f"; no more: {why}")
        return False

    def _tell(self, why: str) -> None:
        count = len(self._recorded)
        value = "on" if count else "off"
        failed = "".join(f"; no more of {told}" for told in self._failed.values())
        reason = f"{count} graphs of up to {ROWS[-1]} rows{why}{failed}"
        self.choice = Choice(subject="graphs", value=value, reason=reason)


def cuda_recorder() -> Record:
    """Records on CUDA, all graphs in one pool of memory."""
    cuda: Any = torch.cuda
    pool = cuda.graph_pool_handle()
    streams: dict[torch.device, Any] = {}  # one for all graphs: libraries keep workspaces for each stream

    def record(forward: Forward, given: Tensor) -> Recorded:
        side = streams.setdefault(given.device, cuda.Stream(given.device))
        usual = cuda.current_stream(given.device)
        side.wait_stream(usual)
        graph = cuda.CUDAGraph()
        with cuda.stream(side):
            for _ in range(_WARM_UPS):  # libraries choose kernels and make workspaces outside of the graph
                forward(given)
            side.synchronize()
            # Not `torch.cuda.graph`: it collects garbage and empties the allocator's cache for each. Other
            # threads may use the device meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                found_ND = forward(given)
            finally:
                graph.capture_end()
        usual.wait_stream(side)
        return Recorded(given=given, found_ND=found_ND, replay=graph.replay, owner=graph)

    return record
