"""A trial's spec: the study's own, with some fields set to what the trial tries.

Enters: the study's spec, settings by path. Leaves: a `JobSpec`. Called by preparation, which checks that
every end of every range is allowed, and by the runner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cliptune.spec import spec_from_mapping, spec_to_mapping, with_settings
from cliptune.v1 import spec_pb2

# Of a name.
_LONGEST: Final = 64
# A trial is short: it saves when it is told to leave, not on the way.
_NEVER: Final = 2**31 - 1


def with_tried(spec: spec_pb2.JobSpec, settings: Mapping[str, str]) -> spec_pb2.JobSpec:
    """The spec without its search and with these settings, "PATH" → value as in "PATH=VALUE".

    Raises:
        SpecError: no such field, or a value that may not stand there.
    """
    base = spec_pb2.JobSpec()
    base.CopyFrom(spec)
    base.ClearField("tune")
    changes = [f"{path}={value}" for path, value in settings.items()]
    return spec_from_mapping(with_settings(spec_to_mapping(base), changes))


def trial_spec(spec: spec_pb2.JobSpec, number: int, settings: Mapping[str, str]) -> spec_pb2.JobSpec:
    """What the trial is submitted as: a job that publishes nothing and is measured without intervals."""
    made = with_tried(spec, settings)
    ending = f"-trial-{number}"
    made.name = f"{spec.name[: _LONGEST - len(ending)]}{ending}"
    made.publish.CopyFrom(spec_pb2.PublishSpec(skip=True))
    if not made.checkpoint.HasField("every_steps"):
        made.checkpoint.every_steps = _NEVER
    if not made.evaluation.HasField("bootstrap_samples"):
        made.evaluation.bootstrap_samples = 0
    return made
