"""What a memory budget comes to: the planned step beside the best that a search by hand finds.

Steps are put together as a job's are, uncompiled: each setting would wait minutes for graphs of its own. For
each budget the planner settles micro-batch and checkpointing as a job's start does; then whole steps are
timed by its plan and by every setting of a grid, under the same limit of the allocator. The second table is
memory and throughput against the micro-batch, which is also drawn: docs/memory.DEVICE.svg with `--draw`.

On the CPU, where nothing limits a process, a small model shows the same in bytes of live tensors.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from bench.accumulation import noise
from bench.chart import Line, Panel, draw
from bench.record import Columns, Result, cores, gpu, of_other_models, report
from cliptune_model.attention import AttentionPlan
from cliptune_model.clip import Clip, build
from cliptune_model.machine.synchronize import synchronize
from cliptune_model.source import ModelSource
from cliptune_trainer.data.loading.loader import Batch
from cliptune_trainer.memory.cache import PlanCache
from cliptune_trainer.memory.count import LiveBytes
from cliptune_trainer.memory.limit import limit_process
from cliptune_trainer.plan.decide import Hardware, decide_hardware
from cliptune_trainer.plan.execution import Execution
from cliptune_trainer.plan.per_size import Executions
from cliptune_trainer.plan.planning import Planner
from cliptune_trainer.spec import DataConfig, ResourceConfig, Spec, TrainConfig
from cliptune_trainer.steps.checkpointing import disable_checkpointing
from cliptune_trainer.steps.step import Step, StepOutOfMemoryError, release_memory
from cliptune_trainer.training.assembly import assemble

# Of 24 tokens with the two around it.
CAPTION: Final = "a photo of " * 7 + "a"
GIB: Final = 2**30
_STEPS: Final = 2
_TURNS: Final = 3
# Micro-batches below this share of the batch are not tried; nor those below as many sizes that fit.
_SMALLEST_SHARE: Final = 64
_SIZES_THAT_FIT: Final = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What is run on a kind of device."""

    precision: str
    models: tuple[tuple[str, int], ...]  # name, effective batch
    budgets_gib: tuple[float, ...]
    drawn: tuple[str, int]


FORMS: Final = {
    "cuda": Form(
        precision="bf16",
        models=(("ViT-B-16", 512), ("ViT-L-14", 256)),
        budgets_gib=(8, 16, 24),
        drawn=("ViT-B-16", 512),
    ),
    "mps": Form(precision="auto", models=(("ViT-B-32", 256),), budgets_gib=(4, 8), drawn=("ViT-B-32", 256)),
    "cpu": Form(
        precision="fp32",
        models=(("cliptune-tiny-vit", 16),),
        budgets_gib=(0.2,),
        drawn=("cliptune-tiny-vit", 16),
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A way to take the step."""

    micro_batch_size: int
    checkpointing: bool
    attention: AttentionPlan

    def __str__(self) -> str:
        parts = [str(self.micro_batch_size)]
        parts += ["recomputing"] if self.checkpointing else []
        parts += [self.attention.mode] if self.attention.mode != "sdpa" else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What a setting came to."""

    per_s: float
    peak_bytes: int


class Bench:
    """One model on one device, its batch and how steps of it are timed."""

    def __init__(self, name: str, batch_size: int, device: str, precision: str) -> None:
        self.name, self.batch_size, self.precision = name, batch_size, precision
        self.clip: Clip = build(ModelSource(name=name), device=device)
        self.clip.model.train()
        self.hardware: Hardware = decide_hardware(self._spec(None, device), None)
        self.batch: Batch = noise(self.clip, batch_size)

    def plan(self, budget_gib: float) -> Execution:
        """As a job's start settles it."""
        spec = self._spec(budget_gib, str(self.clip.device))
        planner = Planner(
            spec,
            self.hardware,
            self.clip,
            PlanCache(None),
            batch_size=self.batch_size,
            total_steps=10_000,
            captions=[CAPTION],
            on_device=True,
        )
        return planner.plan()

    def take(self, setting: Setting, execution: Execution, *, steps: int = _STEPS) -> Taken | None:
        """Times whole steps; None: they do not fit."""
        clip, device = self.clip, self.clip.device
        plan = replace(
            execution.plan,
            micro_batch_size=setting.micro_batch_size,
            checkpointing=setting.checkpointing,
            attention=setting.attention.mode,
            block_bytes=setting.attention.budget_bytes,
        )
        planned = Executions(
            by_size={clip.image_size: replace(execution, plan=plan)}, largest=clip.image_size
        )
        step = assemble(
            self._spec(None, str(device)), clip, planned, batch_size=self.batch_size, learning_rate=1e-6
        ).step
        release_memory(device)
        try:
            peak = self._peak_bytes(step)
            synchronize(str(device))
            times = []
            for _ in range(steps):
                began = time.perf_counter()
                step(self.batch, 1e-6)
                times.append(time.perf_counter() - began)
            return Taken(per_s=self.batch_size / sorted(times)[len(times) // 2], peak_bytes=peak)
        except StepOutOfMemoryError:
            return None
        finally:
            disable_checkpointing(clip)
            clip.model.zero_grad(set_to_none=True)
            del step
            release_memory(device)

    def _peak_bytes(self, step: Step) -> int:
        """Of a step that is not the first."""
        device = self.clip.device
        step(self.batch, 1e-6)
        if device.type == "cpu":
            with LiveBytes("cpu") as live:
                for weight in self.clip.model.parameters():
                    live.adopt(weight)
                step(self.batch, 1e-6)
            moments = 2 * sum(weight.nbytes for weight in self.clip.model.parameters())
            return int(live.peak) + moments
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            step(self.batch, 1e-6)
            synchronize(str(device))
            return torch.cuda.max_memory_allocated(device)
        step(self.batch, 1e-6)
        return torch.mps.driver_allocated_memory()

    def _spec(self, budget_gib: float | None, device: str) -> Spec:
        return Spec(
            name="memory",
            model=ModelSource(name=self.name),
            data=DataConfig(train="none.csv"),
            train=TrainConfig(batch_size=self.batch_size, precision=self.precision, compile="off"),
            resources=ResourceConfig(device=device, memory_gib=budget_gib),
        )


def grid(bench: Bench, attention: AttentionPlan) -> Iterator[Setting]:
    """What one would try by hand: halves of the batch, with and without recomputing."""
    size = bench.batch_size
    while size >= max(1, bench.batch_size // _SMALLEST_SHARE):
        for checkpointing in (False, True):
            yield Setting(micro_batch_size=size, checkpointing=checkpointing, attention=attention)
        size //= 2


def within_budget(bench: Bench, budget_gib: float) -> Columns:
    """The plan beside the best of the grid."""
    budget = int(budget_gib * GIB)
    limit_process(bench.clip.device, budget)
    began = time.perf_counter()
    execution = bench.plan(budget_gib)
    planning_s = time.perf_counter() - began
    plan = execution.plan
    planned = Setting(
        micro_batch_size=plan.micro_batch_size,
        checkpointing=plan.checkpointing,
        attention=plan.attention_plan,
    )
    found: list[tuple[float, Setting]] = []
    fitted = {True: 0, False: 0}
    for setting in grid(bench, plan.attention_plan):
        if fitted[setting.checkpointing] == _SIZES_THAT_FIT:
            continue  # more parts are only slower
        outcome = bench.take(setting, execution)
        if outcome is not None and outcome.peak_bytes <= budget:
            found.append((outcome.per_s, setting))
            fitted[setting.checkpointing] += 1
    best = max(found, key=lambda entry: entry[0])[1]
    # Those two again, in turns: what else the machine does falls on both.
    ours: list[Taken | None] = []
    by_hand: list[Taken | None] = []
    for _ in range(_TURNS):
        ours.append(bench.take(planned, execution))
        by_hand.append(bench.take(best, execution))
    ours_per_s = max(taken.per_s if taken is not None else 0.0 for taken in ours)
    by_hand_per_s = max(taken.per_s if taken is not None else 0.0 for taken in by_hand)
    return {
        "model": bench.name,
        "batch": bench.batch_size,
        "budget_gib": budget_gib,
        "planned": f"{planned} ({plan.source})",
        "planning_s": planning_s,
        "peak_gib": max(taken.peak_bytes if taken is not None else 0 for taken in ours) / GIB,
        "ours_per_s": ours_per_s,
        "by_hand": str(best),
        "by_hand_per_s": by_hand_per_s,
        "ratio": ours_per_s / by_hand_per_s,
    }


def by_micro_batch(bench: Bench) -> list[Columns]:
    """Memory and throughput against the micro-batch, without any budget."""
    execution = bench.plan(10_000.0)
    rows: list[Columns] = []
    for setting in grid(bench, execution.plan.attention_plan):
        if (taken := bench.take(setting, execution)) is not None:
            rows.append(
                {
                    "model": bench.name,
                    "batch": bench.batch_size,
                    "micro_batch": setting.micro_batch_size,
                    "checkpointing": "on" if setting.checkpointing else "off",
                    "peak_gib": taken.peak_bytes / GIB,
                    "per_s": taken.per_s,
                }
            )
    return rows[::-1]


def chart(rows: Iterable[Columns], title: str) -> str:
    """Both figures against the micro-batch, as SVG."""
    rows = list(rows)

    def line(figure: str, checkpointing: str) -> Line:
        points = [
            (float(row["micro_batch"]), float(row[figure]))
            for row in rows
            if row["checkpointing"] == checkpointing
        ]
        return Line(name=f"checkpointing {checkpointing}", points=tuple(points))

    panels = [
        Panel(title=shown, x="micro-batch", y=unit, lines=(line(figure, "off"), line(figure, "on")))
        for figure, shown, unit in (("peak_gib", "Memory", "GiB"), ("per_s", "Throughput", "pairs/s"))
    ]
    return draw(title, panels)


def main() -> None:
    """Runs the form of this machine's device."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    parser.add_argument("--device", default=found)
    parser.add_argument("--models", nargs="*", help="of the form's (default: all); none: the chart alone")
    parser.add_argument("--add", action="store_true", help="keep the budgets that are stored of other models")
    parser.add_argument("--draw", action="store_true", help="write docs/memory.DEVICE.svg")
    arguments = parser.parse_args()
    kind = arguments.device.partition(":")[0]
    form = FORMS[kind]
    device = gpu(torch.cuda.get_device_name(arguments.device)) if kind == "cuda" else cores()
    models = {name for name, _ in form.models} if arguments.models is None else set(arguments.models)
    before = of_other_models("memory", device, models) if arguments.add else {}
    rows, lines = before.get("", []), list[Columns]()

    def keep() -> None:
        """After each part: the next takes long, and what is known by then is kept."""
        more = {"Memory and throughput by micro-batch": lines} if lines else None
        report("memory", rows, device=device, more=more)

    for name, batch_size in form.models:
        if name not in models:
            continue
        bench = Bench(name, batch_size, arguments.device, form.precision)
        for budget in form.budgets_gib:
            rows.append(within_budget(bench, budget))
            keep()
        limit_process(bench.clip.device, 1 << 50)
        del bench
        gc.collect()
    lines += by_micro_batch(Bench(*form.drawn, arguments.device, form.precision))
    keep()
    if arguments.draw:
        stem = Path(Result.of("memory", (), device=device).file_name).stem
        path = Path(__file__).parents[1] / "docs" / f"{stem}.svg"
        title = f"{form.drawn[0]}, {form.drawn[1]} pairs a step, {device}"
        path.write_text(chart(lines, title), encoding="utf-8")


if __name__ == "__main__":
    main()
