"""What a study varies: what its spec says, checked; or what is worth varying in any job.

Enters: the spec, and what preparation has decided for it. Leaves: `Dimension`s. Called by preparation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Final

from cliptune.errors import InvalidInputError, SpecError
from cliptune.metric_names import CALIBRATION_ERROR, MAIN_METRICS
from cliptune.spec import spec_to_mapping
from cliptune.v1 import spec_pb2
from cliptune_model.choice import Choice
from cliptune_model.nearest import nearest
from cliptune_trainer.losses.entry import Parameter
from cliptune_trainer.spec import Spec, from_proto
from cliptune_trainer.spec.tune import Dimension, TuneConfig
from cliptune_trainer.tuning.settings import with_tried

# How far from what would be taken without a search.
_LEARNING_RATE_FACTOR: Final = 10.0
_HIGHEST_LEARNING_RATE: Final = 1e-2
_WEIGHT_DECAYS: Final = (1e-3, 1.0)
# A parameter whose bounds lie further apart is looked at around its default.
_WIDE: Final = 100.0
_PARAMETER_FACTOR: Final = 5.0


def check_measured(config: TuneConfig, *, validation_rows: int, classes: int) -> None:
    """Raises unless every trial will have the metric, and what searches is installed.

    Args:
        config: the search.
        validation_rows: of the job's data.
        classes: that its rows are told apart by; fewer than 2: none.

    Raises:
        SpecError: a metric that no evaluation of this job has.
        InvalidInputError: nothing to measure on, or Optuna is missing.
    """
    if find_spec("optuna") is None or find_spec("plotly") is None or find_spec("tomli_w") is None:
        raise InvalidInputError("a study needs Optuna: pip install 'cliptune[tune]'")
    if not validation_rows:
        raise InvalidInputError(
            "a study compares trials on validation rows, and the job has none: set data.validation,"
            " data.split_column or data.validation_fraction"
        )
    metric, known = config.metric, (*MAIN_METRICS, CALIBRATION_ERROR)
    if metric and metric not in known:
        raise SpecError(
            f"tune.metric is {metric!r}{nearest(metric, known)}; allowed: {', '.join(known)}",
            path="tune.metric",
            allowed=", ".join(known),
        )
    if metric.startswith("zero_shot/") and classes < 2:
        raise SpecError(
            f"tune.metric is {metric!r}, but no evaluation will have it: the data has fewer than two labels"
            " (data.label_column, evaluation.classes)",
            path="tune.metric",
            allowed=", ".join(name for name in known if name.startswith("retrieval/")),
        )
    if metric == CALIBRATION_ERROR and not config.minimize:
        raise SpecError(
            "of tune.metric less is better: set tune.minimize", path="tune.minimize", allowed="true"
        )


def space_choices(dimensions: Sequence[Dimension]) -> list[Choice]:
    """For the plan: what varies, and how."""
    return [Choice(subject="tune", value=dimension.path, reason=_told(dimension)) for dimension in dimensions]


def space_of(message: spec_pb2.JobSpec, spec: Spec, learning_rate: float) -> tuple[Dimension, ...]:
    """What varies, and what the first trial takes of it: the settings without a search, where they fit.

    Args:
        message: the study's spec over its recipe over the defaults.
        spec: the same, typed; it has a search.
        learning_rate: decided for the job.

    Raises:
        SpecError: a path that is no field, or a bound or value that the field does not allow.
    """
    if spec.tune is None:
        raise ValueError("the spec has no search")
    wanted = spec.tune.dimensions or _usual(spec, learning_rate)
    known = {
        "train.learning_rate": f"{learning_rate!r}",
        "train.weight_decay": f"{spec.train.weight_decay!r}",
        **_parameter_defaults(spec),
        **_leaves(spec_to_mapping(message)),
    }
    dimensions = tuple(_started(dimension, known.get(dimension.path, "")) for dimension in wanted)
    for dimension in dimensions:
        _check(message, dimension)
    return dimensions


def _usual(spec: Spec, learning_rate: float) -> tuple[Dimension, ...]:
    high = min(learning_rate * _LEARNING_RATE_FACTOR, max(_HIGHEST_LEARNING_RATE, learning_rate * 2))
    rate = Dimension(
        path="train.learning_rate", low=learning_rate / _LEARNING_RATE_FACTOR, high=high, log=True
    )
    decay = Dimension(path="train.weight_decay", low=_WEIGHT_DECAYS[0], high=_WEIGHT_DECAYS[1], log=True)
    parameters = (
        _around(path, parameter) for path, parameter in _parameters(spec).items() if not parameter.needs
    )
    return (rate, decay, *parameters)


def _parameters(spec: Spec) -> dict[str, Parameter]:
    """Of the job's one loss, by path. Of several, the list's places are no paths."""
    if len(spec.loss.terms) > 1:
        return {}
    entry = spec.loss.terms[0].entry(spec.loss.temperature)
    return {f"loss.parameters.{name}": value for name, value in entry.parameters.items()}


def _parameter_defaults(spec: Spec) -> dict[str, str]:
    return {path: f"{parameter.default:.17g}" for path, parameter in _parameters(spec).items()}


def _around(path: str, parameter: Parameter) -> Dimension:
    if parameter.switch:
        return Dimension(path=path, values=("0", "1"))
    low, high, middle = parameter.low, parameter.high, parameter.default
    if middle > 0 and (high - low) > _WIDE * middle:
        low, high = max(low, middle / _PARAMETER_FACTOR), min(high, middle * _PARAMETER_FACTOR)
    return Dimension(path=path, low=low, high=high)


def _told(dimension: Dimension) -> str:
    first = f"; first {dimension.start}" if dimension.start else ""
    if dimension.values:
        return f"one of {', '.join(dimension.values)}{first}"
    kind = ", whole numbers" * dimension.integer + ", in the logarithm" * dimension.log
    return f"{dimension.low:g} to {dimension.high:g}{kind}{first}"


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """ "train.epochs" → "2" for all that a spec says outside lists."""
    found: dict[str, str] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            found[f"{prefix}{key}"] = value
        else:
            found[f"{prefix}{key}"] = json.dumps(value)
    return found


def _started(dimension: Dimension, start: str) -> Dimension:
    """With the first trial's value, if it is one of the dimension's."""
    if dimension.values:
        return replace(dimension, start=start if start in dimension.values else "")
    try:
        inside = dimension.low <= float(start) <= dimension.high
    except ValueError:
        inside = False
    return replace(dimension, start=start if inside else "")


def _check(message: spec_pb2.JobSpec, dimension: Dimension) -> None:
    """Every value, or both ends of the range, make a spec that is allowed."""
    number = int if dimension.integer else float
    ends = dimension.values or tuple(repr(number(end)) for end in (dimension.low, dimension.high))
    for end in ends:
        try:
            from_proto(with_tried(message, {dimension.path: end}))
        except SpecError as error:
            raise SpecError(f"tune.parameters: {error.message}", **error.metadata) from error
