"""What must be set in a process before torch first touches the device.

Enters: the device wanted and the machine, as `hardware.host` knows it without torch. Leaves: environment
variables, and a `Choice` that says so. Called first thing by the `main` of trainer and engine.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Final

from cliptune.errors import InvalidInputError
from cliptune_model.choice import Choice
from cliptune_model.machine.hardware import GIB, Machine

HIGH: Final = "PYTORCH_MPS_HIGH_WATERMARK_RATIO"
LOW: Final = "PYTORCH_MPS_LOW_WATERMARK_RATIO"


def watermarks(machine: Machine) -> tuple[float, float]:
    """(high, low) for Apple's allocator, as shares of what Metal recommends: by how much the system needs.

    torch's own, 1.7 and 1.4, lie beyond the RAM: a Mac would swap for hours rather than say that it is full.
    """
    if machine.memory_bytes < 12 * GIB:
        return 0.8, 0.7
    if machine.memory_bytes < 30 * GIB:
        return 0.9, 0.8
    return 1.0, 0.9


def prepare_process(
    device: str, machine: Machine, environment: MutableMapping[str, str] = os.environ
) -> Choice:
    """Sets the limits of Apple's allocator, which reads them at the first use of the device.

    What the user has set stays; only its missing half is added, since torch refuses a low mark above the high
    one. On other devices there is nothing to set.

    Raises:
        InvalidInputError: a variable that the user set is no number, or the low one is above the high one.
    """
    if machine.system != "Darwin" or device.partition(":")[0] not in ("auto", "mps"):
        return Choice(
            subject="watermarks", value="none", reason="only Apple's GPU shares its memory with the system"
        )
    high, low = watermarks(machine)
    given_high, given_low = _ratio(environment, HIGH), _ratio(environment, LOW)
    reason = f"{machine.memory_bytes / GIB:.0f} GiB of RAM; torch's own limit would swap instead of failing"
    if (given_high, given_low) not in ((None, None), (high, low)):
        reason = f"{HIGH if given_high is not None else LOW} is set"
        # 0 means no limit to torch.
        high = given_high if given_high is not None else max(high, given_low or 0.0)
        low = given_low if given_low is not None else round(0.9 * high, 3)
        if 0 < high < low:
            raise InvalidInputError(
                f"{LOW} = {low:g} is above {HIGH} = {high:g}: torch refuses that; unset both"
            )
    environment[HIGH], environment[LOW] = f"{high:g}", f"{low:g}"
    return Choice(subject="watermarks", value=f"{high:.3g}/{low:.3g}", reason=reason)


def _ratio(environment: MutableMapping[str, str], name: str) -> float | None:
    given = environment.get(name)
    if given is None:
        return None
    try:
        ratio = float(given)
    except ValueError:
        ratio = -1.0
    if not 0.0 <= ratio <= 2.0:
        raise InvalidInputError(f"{name} = {given!r} is no number from 0 to 2")
    return ratio
