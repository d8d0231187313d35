"""Doctor's proofs on the fake MPS device; run by `test_fake_mps_doctor.py` in its own process.

Enters: nothing. Leaves: one line of JSON, for each proof what a Mac would refuse of it. What is compared is
nonsense here, for nothing is computed; that a Mac can run the proofs at all is what is shown.
"""

from __future__ import annotations

from tests.support.fake_mps import device as _device  # noqa: F401  # before torch

# isort: split
import json
import sys
import traceback
from collections.abc import Callable, Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cliptune_model.proving import PROVERS
from cliptune_model.proving.compare import SMALL
from cliptune_model.proving.model import exact_gradients
from cliptune_model.proving.training import overflow_fault
from tests.support.fake_mps.watch import Watch


def proofs() -> Iterator[tuple[str, Callable[[], object]]]:
    """The provers, and what one of them leaves out when its first part fails."""
    for name, prover in PROVERS.items():
        yield name, lambda prover=prover: prover("mps", SMALL)  # type: ignore[misc]
    yield "overflow", lambda: overflow_fault("mps", fused=True)


def main() -> None:
    """Entry point."""
    # The fake device's kernel of attention is not found in inference mode.
    really = torch.inference_mode
    torch.inference_mode = lambda *mode: really(*mode) if mode else torch.no_grad()  # type: ignore[assignment,misc]
    report = {}
    for name, prove in proofs():
        exact_gradients.cache_clear()  # they belong to one fake mode
        with FakeTensorMode(), torch.random.fork_rng(devices=[]):
            try:
                with Watch() as watch:
                    prove()
                report[name] = watch.findings
                if not watch.operators:
                    report[name].append("nothing ran on the device")
            except Exception:
                report[name] = [traceback.format_exc(limit=-6)]
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
