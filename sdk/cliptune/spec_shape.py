"""The shape of a job spec: which values its fields may have.

In: a `JobSpec`. Out: nothing, or a `SpecError` that names the field and what is allowed. Called by the SDK
before anything is sent and by the daemon at submission, so it needs no data, no model and no network; what a
value means (does the file exist, is the architecture known) is found out while the job prepares.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, Protocol

from google.protobuf.message import Message

from cliptune.errors import SpecError
from cliptune.metric_names import MAIN_METRICS
from cliptune.v1 import spec_pb2

# Becomes part of a folder's name and of a model reference NAME:VERSION, NAME@ALIAS.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE: Final = "a letter or digit, then at most 63 letters, digits, '-', '_' or '.'"
# Of cliptune, of an entry point, or in a file: which there are the trainer knows.
_OWN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}|[^\0]{1,4096}\.py:[A-Za-z_]\w{0,127}")
_NUMBER: Final = r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*"
_WINDOW: Final = re.compile(rf"file|range|percentile|full|{_NUMBER},{_NUMBER}")
_DEVICE: Final = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")


class Rule(Protocol):
    """Says what is allowed, and whether a value is."""

    @property
    def allowed(self) -> str:
        """What may stand here, for a person."""

    def holds(self, value: Any) -> bool:
        """Whether `value`, of the field's own type, may stand here."""


class Range(NamedTuple):
    """Numbers from `low`, itself in or out, to `high`."""

    low: float
    high: float = math.inf
    open_low: bool = False

    @property
    def allowed(self) -> str:
        """Such as "> 0 and <= 10"."""
        low = f"{'>' if self.open_low else '>='} {self.low:g}"
        return low if self.high == math.inf else f"{low} and <= {self.high:g}"

    def holds(self, value: Any) -> bool:
        """NaN and infinity never hold."""
        above = value > self.low if self.open_low else value >= self.low
        return above and value <= self.high and math.isfinite(value)


class Choice(NamedTuple):
    """One of a few words."""

    words: tuple[str, ...]

    @property
    def allowed(self) -> str:
        """The words."""
        return ", ".join(self.words)

    def holds(self, value: Any) -> bool:
        """Case matters."""
        return value in self.words


class Pattern(NamedTuple):
    """A text of a certain form."""

    regex: re.Pattern[str]
    allowed: str

    def holds(self, value: Any) -> bool:
        """The whole text, not a part of it."""
        return self.regex.fullmatch(value) is not None


_AT_LEAST_ONE: Final = Range(1)
# Of images, in pixels; what a model takes is known once it is built.
_SIDE: Final = Range(1, 4096)
_NAMED: Final = Pattern(_NAME, NAME_RULE)
_SWITCH: Final = Choice(("auto", "on", "off"))
# Layers that an adapter may be for.
_TARGET: Final = Choice(("q", "k", "v", "o", "mlp", "pointwise"))
# Which there are is known where the job will run: entry points of one's own count.
_LOSS: Final = Pattern(_OWN, "a name as infonce, or FILE.py:NAME")

# Kinds of images that a recipe is shipped for: `domains/NAME.toml`.
DOMAINS: Final = ("general", "industrial", "medical", "scientific")

# A field that is left out is never checked: its default is the trainer's.
RULES: Final[dict[str, Rule]] = {
    "name": _NAMED,
    "domain": Choice(DOMAINS),
    "model.context_length": Range(1, 4096),
    "model.patch_size": Range(1, 512),
    "model.similarity": Pattern(_OWN, "a name as cosine, or FILE.py:NAME"),
    "data.validation_fraction": Range(0, 0.9),
    "data.max_bad_fraction": Range(0, 1),
    "data.augmentation": Choice(("none", "flip", "crop")),
    "data.augment.rotate_degrees": Range(0, 180),
    "data.augment.crop_min_area": Range(0, 1),
    "data.augment.brightness": Range(0, 0.9),
    "data.augment.contrast": Range(0, 0.9),
    "data.augment.saturation": Range(0, 1),
    "data.augment.hue": Range(0, 0.5),
    "data.workers": Range(0, 256),
    "data.decode": Choice(("auto", "exact", "fast")),
    "data.duplicates": Choice(("notice", "drop", "refuse")),
    "data.leakage": Choice(("refuse", "notice")),
    "data.reading.window": Pattern(_WINDOW, "file, range, percentile, full, or CENTER,WIDTH"),
    "train.epochs": _AT_LEAST_ONE,
    "train.max_steps": _AT_LEAST_ONE,
    "train.batch_size": Range(2),  # one pair has nothing to contrast with
    "train.learning_rate": Range(0, 10, open_low=True),
    "train.weight_decay": Range(0, 10),
    "train.warmup_fraction": Range(0, 1),
    "train.schedule": Choice(("cosine", "linear", "constant")),
    "train.clip_norm": Range(0),
    "train.precision": Choice(("auto", "fp32", "bf16", "fp16")),
    "train.progress_every_steps": _AT_LEAST_ONE,
    "train.attention": Choice(("auto", "sdpa", "sliced", "chunked")),
    "train.checkpointing": _SWITCH,
    "train.micro_batch_size": _AT_LEAST_ONE,
    "train.compile": _SWITCH,
    "train.layer_decay": Range(0, 1, open_low=True),
    "train.probe_fraction": Range(0, 0.9),
    "adapter.kind": Choice(("none", "lora", "bottleneck")),
    "adapter.rank": Range(1, 1024),
    "adapter.alpha": Range(0, 10_000, open_low=True),
    "adapter.dropout": Range(0, 0.99),
    "train.resolution.schedule": Choice(("fixed", "progressive", "multi_scale")),
    "train.resolution.tail_fraction": Range(0, 1),
    "train.resolution.finish_fraction": Range(0, 1),
    "train.resolution.finish_size": _SIDE,
    "train.resolution.first_augmentation": Range(0, 1),
    "loss.name": _LOSS,
    "loss.tiling": _SWITCH,
    "loss.weighting": Choice(("fixed", "uncertainty")),
    "loss.temperature": Choice(("learned", "fixed", "global")),
    "loss.logit_scale": Range(0, 10_000, open_low=True),
    "loss.max_logit_scale": Range(1, 10_000, open_low=True),
    "evaluation.every_epochs": Range(0),
    "evaluation.batch_size": _AT_LEAST_ONE,
    "evaluation.main_metric": Choice(MAIN_METRICS),
    "evaluation.bootstrap_samples": Range(0, 100_000),
    "evaluation.latency_budget_ms": Range(0, 1e6, open_low=True),
    "guard.ema_decay": Range(0, 0.999999),
    "guard.l2_sp": Range(0, 1000),
    "guard.tolerance": Range(0, 1),
    "guard.probe.max_images": Range(2, 100_000),
    "guard.probe.main_metric": Choice(MAIN_METRICS),
    "checkpoint.every_steps": _AT_LEAST_ONE,
    "checkpoint.keep": _AT_LEAST_ONE,
    "publish.model": _NAMED,
    "publish.form": Choice(("merged", "adapter")),
    "resources.device": Pattern(_DEVICE, "auto, cpu, mps, cuda, cuda:N"),
    "resources.threads": Range(1, 1024),
    "resources.max_retries": Range(0, 100),
    "resources.memory_gib": Range(0, open_low=True),
    "resources.price_per_hour": Range(0),
    "tune.max_trials": _AT_LEAST_ONE,
    "tune.budget_seconds": Range(0),
    "tune.parallel": Range(1, 64),
}
# Lists that are left out rather than empty: without them sizes are chosen, which nobody means by [].
NOT_EMPTY: Final = ("train.resolution.sizes", "evaluation.resolutions")
LABEL_PLACE: Final = "{label}"
REQUIRED: Final = ("name", "model.name", "data.train")


def validate_shape(spec: spec_pb2.JobSpec) -> None:
    """`SpecError` for the first field that is missing or out of range. Metadata: `path`, `allowed`."""
    for path in REQUIRED:
        if not _value(spec, path):
            raise SpecError(f"{path} is missing", path=path, allowed=_allowed(path))
    validate_values(spec)


def validate_values(spec: spec_pb2.JobSpec) -> None:
    """The same of what is there, whatever is missing."""
    for path, rule in RULES.items():
        value = _value(spec, path)
        if value is not None and not rule.holds(value):
            words = rule.words if isinstance(rule, Choice) else ()
            raise wrong_value(path, value, rule.allowed, words)
    _check_model(spec.model.name)
    _check_augment(spec.data)
    _check_loss(spec.loss)
    _check_data(spec.data)
    _check_classes(spec.evaluation.classes)
    _check_prompts(spec.evaluation)
    _check_guard(spec.guard)
    _check_sizes(spec)
    for index, target in enumerate(spec.adapter.targets):
        if not _TARGET.holds(target):
            raise wrong_value(f"adapter.targets[{index}]", target, _TARGET.allowed, _TARGET.words)
    for index, alias in enumerate(spec.publish.aliases):
        if not _NAMED.holds(alias):
            raise wrong_value(f"publish.aliases[{index}]", alias, NAME_RULE)


def wrong_value(path: str, value: object, allowed: str, words: Iterable[str] = ()) -> SpecError:
    """The error of a field whose value may not stand there; of `words` the nearest is offered."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    near = difflib.get_close_matches(str(value), list(words), n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return SpecError(f"{path} is {shown}{meant}; allowed: {allowed}", path=path, allowed=allowed)


def _value(spec: spec_pb2.JobSpec, path: str) -> Any:
    """The field's value; None when it was left out."""
    node: Any = spec
    *parents, leaf = path.split(".")
    for parent in parents:
        node = getattr(node, parent)
    if not isinstance(node, Message):
        raise TypeError(path)
    field = node.DESCRIPTOR.fields_by_name[leaf]
    if field.has_presence:
        return getattr(node, leaf) if node.HasField(leaf) else None
    return getattr(node, leaf) or None


def _allowed(path: str) -> str:
    if path in RULES:
        return RULES[path].allowed
    return {
        "model.name": "an open_clip architecture, hf-hub:ORG/REPO, local-dir:PATH or registry:NAME",
        "data.train": "a CSV, TSV, JSON lines or parquet file, a folder of images or of parquet files, tar"
        " shards, or dataset:NAME",
    }[path]


def _check_model(name: str) -> None:
    scheme, colon, rest = name.partition(":")
    if colon and (scheme not in ("hf-hub", "local-dir", "registry") or not rest):
        raise wrong_value("model.name", name, _allowed("model.name"))


def _check_augment(data: spec_pb2.DataSpec) -> None:
    if data.augmentation and data.HasField("augment"):
        raise wrong_value(
            "data.augmentation", data.augmentation, "nothing beside data.augment, which says it in full"
        )


def _check_loss(loss: spec_pb2.LossSpec) -> None:
    if loss.terms and (loss.name or loss.parameters):
        path = "loss.name" if loss.name else "loss.parameters"
        raise wrong_value(path, loss.name or dict(loss.parameters), "nothing beside loss.terms")
    for index, term in enumerate(loss.terms):
        path = f"loss.terms[{index}]"
        if not _LOSS.holds(term.name):
            raise wrong_value(f"{path}.name", term.name, _LOSS.allowed)
        weight = Range(0, 1e6, open_low=True)
        if term.HasField("weight") and not weight.holds(term.weight):
            raise wrong_value(f"{path}.weight", term.weight, weight.allowed)
    before = 0
    for index, dim in enumerate(loss.matryoshka_dims):
        if dim <= before:
            raise wrong_value(f"loss.matryoshka_dims[{index}]", dim, f"> {before}, as they rise")
        before = dim


def _check_sizes(spec: spec_pb2.JobSpec) -> None:
    resolution = spec.train.resolution
    for path, sides in (
        ("train.resolution.sizes", resolution.sizes),
        ("evaluation.resolutions", spec.evaluation.resolutions),
    ):
        before = 0
        for index, side in enumerate(sides):
            if not _SIDE.holds(side):
                raise wrong_value(f"{path}[{index}]", side, f"a side in pixels, {_SIDE.allowed}")
            if side <= before:
                raise wrong_value(f"{path}[{index}]", side, f"> {before}, as they rise")
            before = side
    several = (resolution.schedule or "fixed") != "fixed"
    if resolution.sizes and several != (len(resolution.sizes) > 1):
        allowed = "two or more sizes" if several else 'one size, or schedule "progressive" or "multi_scale"'
        raise wrong_value("train.resolution.sizes", list(resolution.sizes), allowed)
    if resolution.HasField("finish_size") and not resolution.finish_fraction:
        raise wrong_value(
            "train.resolution.finish_size", resolution.finish_size, "none without finish_fraction"
        )


def _check_data(data: spec_pb2.DataSpec) -> None:
    for index, template in enumerate(data.caption_templates):
        if LABEL_PLACE not in template:
            raise wrong_value(
                f"data.caption_templates[{index}]", template, f"a text with {LABEL_PLACE} in it"
            )
    channels = list(data.reading.channels)
    if len(channels) not in (0, 1, 3) or not all(0 <= channel <= 65_535 for channel in channels):
        raise wrong_value("data.reading.channels", channels, "none, one or three planes, counted from 0")


def _check_classes(classes: Iterable[spec_pb2.ClassPrompts]) -> None:
    seen: dict[str, int] = {}
    judged_alone = False
    for index, group in enumerate(classes):
        path = f"evaluation.classes[{index}]"
        if not group.label.strip():
            raise wrong_value(f"{path}.label", group.label, "a text that is not empty")
        if group.label in seen:
            raise wrong_value(
                f"{path}.label", group.label, f"a label other than classes[{seen[group.label]}]'s"
            )
        seen[group.label] = index
        for field, prompts in (("prompts", group.prompts), ("negative_prompts", group.negative_prompts)):
            for place, prompt in enumerate(prompts):
                if not prompt.strip():
                    raise wrong_value(f"{path}.{field}[{place}]", prompt, "a text that is not empty")
        judged_alone = bool(group.negative_prompts)
    if len(seen) == 1 and not judged_alone:
        raise wrong_value(
            "evaluation.classes", list(seen), "none, at least two classes, or one with negative_prompts"
        )


def _check_prompts(evaluation: spec_pb2.EvaluationSpec) -> None:
    for index, template in enumerate(evaluation.prompt_templates):
        if LABEL_PLACE not in template:
            path = f"evaluation.prompt_templates[{index}]"
            raise wrong_value(path, template, f"a text with {LABEL_PLACE} in it")
    for label in sorted(evaluation.label_names):
        if not label.strip() or not evaluation.label_names[label].strip():
            path = f"evaluation.label_names[{label!r}]"
            raise wrong_value(path, evaluation.label_names[label], "a label and its name, neither empty")


def _check_guard(guard: spec_pb2.GuardSpec) -> None:
    if guard.HasField("probe") and not guard.probe.data:
        allowed = f"{_allowed('data.train')}; or no [guard.probe] at all"
        raise wrong_value("guard.probe.data", guard.probe.data, allowed)
    before = 0.0
    for index, point in enumerate(guard.points):
        if not before < point < 1:
            raise wrong_value(f"guard.points[{index}]", point, f"> {before:g} and < 1, as they rise")
        before = point
