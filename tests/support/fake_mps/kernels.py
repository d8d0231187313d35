"""Which operators MPS has, by the list that every torch carries: torchgen's native_functions.yaml.

Enters: an operator. Leaves: why a Mac would refuse it, or nothing. Called by `watch.py`.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torchgen
import yaml

from tests.support.fake_mps.library import ENVIRONMENT

# Kernels in the list for MPS that copy to the CPU and back, and those that are sent there (MPSFallback.mm).
_ON_THE_CPU = frozenset(
    {"embedding_renorm_", "linalg_svd", "linalg_svd.U", "col2im", "upsample_nearest3d.vec"}
)
# Operators with a neutral kernel, of which the trace does not see what that calls inside.
_CALLS = {
    "convolution": "_mps_convolution",
    "convolution_backward": "mps_convolution_backward",
    "embedding": "index_select",
    "index_put": "_index_put_impl_",
    "_foreach_norm.Scalar": "linalg_vector_norm",
    "_safe_softmax": "_softmax",
    "stack": "cat",
}
_NEUTRAL = (
    "CompositeImplicitAutograd",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
)


def refusal(operator: Any) -> str:
    """Why MPS cannot run an operator such as `torch.ops.aten.mm.default`; "" if it can."""
    space, _, name = operator._schema.name.partition("::")
    key = name + (f".{operator._schema.overload_name}" if operator._schema.overload_name else "")
    if space != "aten":
        return f"{operator} is no operator of torch"
    if key in _ON_THE_CPU:
        return f"{operator} runs on the CPU"
    table = _runs_on_mps()
    for needed in (key, _CALLS.get(key, key)):
        if not table.get(needed, False):
            return f"{operator} has no kernel for MPS" + (f" ({needed})" if needed != key else "")
    return ""


@cache
def _runs_on_mps() -> dict[str, bool]:
    """By operator; read from the list once for each torch, since that takes seconds."""
    kept = Path(os.environ[ENVIRONMENT]).with_suffix(".kernels.json")
    if not kept.exists():
        half = kept.with_suffix(f".{os.getpid()}")
        half.write_text(json.dumps(_read()))
        half.replace(kept)
    return dict(json.loads(kept.read_text()))


def _read() -> dict[str, bool]:
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    entries = {entry["func"].partition("(")[0]: entry for entry in yaml.load(path.read_text(), Loader=loader)}
    found = {}
    for name, entry in entries.items():
        # The forms of a structured operator all call the kernel of its `out` form.
        kernels = entries[entry["structured_delegate"]] if "structured_delegate" in entry else entry
        keys = {key.strip() for line in kernels.get("dispatch") or {} for key in line.split(",")}
        found[name] = "MPS" in keys or (
            "structured" not in kernels and (not keys or any(key in keys for key in _NEUTRAL))
        )
        # Forms that torchgen writes by itself from this one.
        for generated in (entry.get("autogen") or "").split(","):
            if generated.strip():
                found[generated.strip()] = found[name]
    return found
