"""Single choices: what one machine, one wish and one proof say of one setting.

Enters: a `Machine`, the user's word, doctor's `Proofs`. Leaves: a `Choice` with its reason, or the refusal of
what the device cannot do. Called by `policy.decide`, which weighs them against the memory, by the engine, and
by doctor. Pure: nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cliptune.errors import InvalidInputError
from cliptune_model.choice import Choice
from cliptune_model.machine.hardware import Machine
from cliptune_model.machine.proofs import UNKNOWN, Proofs

PRECISIONS: Final = ("fp32", "bf16", "fp16")
ATTENTIONS: Final = ("sdpa", "sliced", "chunked")
SWITCHES: Final = ("auto", "on", "off")

# Apple's GPUs up to M2 summed past the end of their operands from here on (pytorch#177116, #193487, #195163).
LONG_SUM: Final = 32_767
# Below, a step's own matrices outweigh the score matrix on MPS; blocks would only cost time.
_SDPA_TOKENS: Final = 190
_SDPA_TOKENS_RECOMPUTED: Final = 300
# Beyond, one head's scores for one image are themselves large: 1,024² fp32 are 4 MiB.
_CHUNKED_TOKENS: Final = 1024
# Fewer steps than this are over before compiled ones have won back the wait for the compiler.
_COMPILE_STEPS: Final = 100


def choose_device_by_proofs(device: Choice, proofs: Proofs) -> Choice:
    """`device`, or the CPU where doctor found that the device computes wrong gradients.

    Raises:
        InvalidInputError: that device was asked for by name.
    """
    if device.value == "cpu" or not (proof := proofs.failed("gradients") or proofs.failed("real shapes")):
        return device
    if device.reason.startswith("asked for"):
        raise InvalidInputError(
            f"cliptune doctor found that {device.value} computes wrongly here ({proof.told}): use device ="
            " 'cpu', or update torch and run cliptune doctor again",
            allowed="auto, cpu",
        )
    return Choice(
        subject="device",
        value="cpu",
        reason=f"{device.value} computes wrongly by doctor's proof: {proof.told}",
    )


def choose_precision(wanted: str, machine: Machine, proofs: Proofs = UNKNOWN) -> Choice:
    """ "auto", "fp32", "bf16" or "fp16" → the precision of the towers' forward and backward pass.

    Weights, normalisation, loss and optimiser stay in fp32 whatever is chosen.

    Raises:
        InvalidInputError: not such a name; the device lacks it, or doctor found it broken there.
    """
    check_one_of("precision", wanted, ("auto", *PRECISIONS))
    if wanted == "auto":
        return automatic_precisions(machine, proofs)[0]
    if lack := _lacks(wanted, machine):
        raise InvalidInputError(f"precision {wanted!r}: {lack}", allowed=_allowed_precisions(machine, proofs))
    if proof := proofs.failed(wanted):
        raise InvalidInputError(
            f"precision {wanted!r}: cliptune doctor found it broken on this device ({proof.told}); use"
            f" {_allowed_precisions(machine, proofs)}, or update torch and run cliptune doctor again",
            allowed=_allowed_precisions(machine, proofs),
        )
    reason = "asked for"
    if wanted == "bf16" and machine.accelerator == "mps" and not machine.gpu_bf16:
        reason = f"asked for; {machine.chip} emulates it: less memory than fp32, not more speed"
    if wanted == "bf16" and machine.accelerator == "cpu" and not machine.cpu_bf16:
        reason = "asked for; this processor has no bf16 instructions: less memory than fp32, but slower"
    return Choice(subject="precision", value=wanted, reason=reason)


def choose_attention(
    wanted: str, machine: Machine, tokens: int, proofs: Proofs = UNKNOWN, *, recomputed: bool = False
) -> Choice:
    """ "auto", "sdpa", "sliced" or "chunked" → how attention is computed for sequences of `tokens`.

    Args:
        wanted: the user's word.
        machine: with its device.
        tokens: of the longer tower.
        proofs: a mode that doctor found broken is not taken by itself.
        recomputed: checkpointing is on, so that scores live for one layer only.

    Raises:
        InvalidInputError: no such mode, or the one asked for was found broken.
    """
    check_one_of("attention", wanted, ("auto", *ATTENTIONS))
    if wanted != "auto":
        if proof := proofs.failed(f"{wanted} attention"):
            raise InvalidInputError(
                f"attention {wanted!r}: cliptune doctor found it broken on this device ({proof.told})",
                allowed="auto",
            )
        return Choice(subject="attention", value=wanted, reason="asked for")
    value, reason = "sdpa", "torch's kernels keep no score matrix here"
    if machine.accelerator == "mps":
        limit = _SDPA_TOKENS_RECOMPUTED if recomputed else _SDPA_TOKENS
        if tokens < limit:
            reason = f"{tokens} tokens: the score matrices are small"
            reason += ", and live for one layer at a time" if recomputed and tokens >= _SDPA_TOKENS else ""
        else:
            value = "sliced" if tokens < _CHUNKED_TOKENS else "chunked"
            reason = (
                f"{tokens} tokens: torch on Apple's GPU would keep every score matrix for the backward pass"
            )
    for other in (value, *ATTENTIONS):
        if not (proof := proofs.failed(f"{other} attention")):
            break
        reason = f"{other} was found broken by doctor ({proof.told})"
    return Choice(subject="attention", value=other, reason=reason)


def choose_serving_attention(proofs: Proofs = UNKNOWN) -> Choice:
    """How attention is computed without gradients: by torch's kernels, unless doctor found them broken."""
    for mode in ATTENTIONS:
        if not proofs.failed(f"{mode} attention"):
            break
    reason = "every device has a kernel for it that keeps no score matrix"
    if broken := proofs.failed("sdpa attention"):
        reason = f"sdpa was found broken by doctor ({broken.told})"
    return Choice(subject="attention", value=mode, reason=reason)


def longest_sum(machine: Machine, proofs: Proofs = UNKNOWN) -> Choice:
    """Rows that one matrix product may reduce over and still be right; "any" where there is no such limit.

    For weight gradients these are micro-batch × tokens; in a contrastive loss, the pairs of a block.
    """
    limit = str(LONG_SUM - 1)
    if proof := proofs.failed("long sums"):
        return Choice(subject="longest_sum", value=limit, reason=f"doctor's proof failed: {proof.told}")
    if machine.accelerator != "mps" or machine.generation not in (1, 2):
        return Choice(
            subject="longest_sum", value="any", reason="no device of this kind is known to sum wrongly"
        )
    if proofs.holds("long sums"):
        return Choice(
            subject="longest_sum", value="any", reason="doctor proved longer ones right on this Mac"
        )
    return Choice(
        subject="longest_sum",
        value=limit,
        reason=f"{machine.chip} may sum past the end of longer operands; cliptune doctor can lift this",
    )


def choose_fused_optimizer(machine: Machine, proofs: Proofs = UNKNOWN, *, scaled: bool) -> Choice:
    """Whether AdamW runs as one kernel. `scaled`: a gradient scaler is in use."""
    if proof := proofs.failed("fused optimiser"):
        return _switch("fused_optimizer", on=False, reason=f"doctor's proof failed: {proof.told}")
    if machine.accelerator == "mps" and scaled and machine.torch < (2, 13):
        reason = f"fused AdamW of torch {machine.torch_version} steps even where the scaler found an overflow"
        return _switch("fused_optimizer", on=False, reason=reason)
    reason = "one kernel instead of several a parameter"
    if machine.accelerator == "mps":
        reason = "the alternative on Apple's GPU reads a number back for every parameter"
    return _switch("fused_optimizer", on=True, reason=reason)


def choose_compile(wanted: str, machine: Machine, *, total_steps: int = 0) -> Choice:
    """ "auto", "on" or "off" → whether the towers are compiled. `total_steps`: of the job; 0: unknown."""
    check_one_of("compile", wanted, SWITCHES)
    if wanted == "off":
        return _switch("compile", on=False, reason="asked for")
    if machine.accelerator == "mps":
        reason = "compiled code is slower than eager on Apple's GPU (pytorch#192551)"
        return _switch("compile", on=False, reason=reason)
    if machine.accelerator == "cuda" and not machine.triton:
        return _switch("compile", on=False, reason="triton, which writes the kernels, is not installed")
    if machine.accelerator == "cuda" and not machine.c_compiler:
        return _switch("compile", on=False, reason="no C compiler is here (gcc or clang), which triton needs")
    if machine.accelerator == "cpu" and not machine.cpp_compiler:
        return _switch("compile", on=False, reason="no C++ compiler is here (g++ or clang++)")
    if wanted == "on":
        return _switch("compile", on=True, reason="asked for")
    if machine.accelerator == "cpu":
        reason = "the first steps would wait for the C++ compiler; train.compile = 'on' for long jobs"
        return _switch("compile", on=False, reason=reason)
    if 0 < total_steps < _COMPILE_STEPS:
        return _switch("compile", on=False, reason=f"{total_steps} steps would not win back the compilation")
    return _switch("compile", on=True, reason="fewer, larger kernels")


def choose_threads(wanted: int | None, machine: Machine) -> Choice:
    """CPU threads of a process: `wanted`, or the fast cores that it may use. Raises `InvalidInputError`."""
    if wanted is not None:
        if wanted < 1:
            raise InvalidInputError(f"threads = {wanted}: at least 1 is needed")
        return Choice(subject="threads", value=str(wanted), reason="asked for")
    reason = "the cores that this process may use"
    if machine.performance_cores < machine.cores:
        reason = "the performance cores; the efficiency cores would slow each step down"
    elif machine.container:
        reason = "the container's share of the cores"
    return Choice(subject="threads", value=str(max(1, machine.performance_cores)), reason=reason)


def automatic_precisions(machine: Machine, proofs: Proofs) -> list[Choice]:
    """The automatic precisions, best first; later ones save memory."""
    found: list[Choice] = []
    doubt = ""
    for value, reason in _PREFERENCES[machine.accelerator](machine):
        if _lacks(value, machine):
            continue
        if proof := proofs.failed(value):
            doubt = f"doctor found {value} broken ({proof.told}); "
            continue
        found.append(Choice(subject="precision", value=value, reason=doubt + reason))
    return found or [Choice(subject="precision", value="fp32", reason=f"{doubt}nothing else is left")]


def _cuda_precisions(machine: Machine) -> list[tuple[str, str]]:
    if machine.gpu_bf16:
        return [("bf16", "this GPU computes bf16, which needs no loss scaling")]
    return [("fp16", f"{machine.gpu_name} has no bf16; fp16 with loss scaling"), _FP32_LEFT]


def _mps_precisions(machine: Machine) -> list[tuple[str, str]]:
    saving = ("fp16", "fp32 would leave too little room; fp16 with loss scaling")
    if not machine.gpu_bf16:
        return [("fp32", f"{machine.chip} only emulates bf16"), saving]
    if machine.macos < 14:
        return [("fp32", f"bf16 on mps needs macOS 14; this is macOS {machine.os_version}"), saving]
    return [("bf16", f"{machine.chip} computes bf16, which needs no loss scaling"), _FP32_LEFT]


def _cpu_precisions(machine: Machine) -> list[tuple[str, str]]:
    return [("fp32", "exact, and half precision is rarely faster on a CPU")]


_FP32_LEFT: Final = ("fp32", "exact")
_PREFERENCES: Final[dict[str, Callable[[Machine], list[tuple[str, str]]]]] = {
    "cuda": _cuda_precisions,
    "mps": _mps_precisions,
    "cpu": _cpu_precisions,
}


def _lacks(precision: str, machine: Machine) -> str:
    """Why the device cannot do it, with the way out; empty: it can."""
    if precision == "bf16" and machine.accelerator == "cuda" and not machine.gpu_bf16:
        return f"{machine.gpu_name} has no bf16; use 'fp16' (with loss scaling) or 'fp32'"
    if precision == "bf16" and machine.accelerator == "mps" and machine.macos < 14:
        return f"bf16 on mps needs macOS 14; this is macOS {machine.os_version}: use 'fp16' or 'fp32'"
    return ""


def _allowed_precisions(machine: Machine, proofs: Proofs) -> str:
    good = [name for name in PRECISIONS if not _lacks(name, machine) and not proofs.failed(name)]
    return ", ".join(("auto", *good))


def choose_pin_memory(machine: Machine) -> Choice:
    """Whether batches wait for the device in pinned memory."""
    if machine.accelerator == "cuda":
        return _switch("pin_memory", on=True, reason="copies to the GPU then run beside its work")
    return _switch("pin_memory", on=False, reason="there is no copy over a bus to speed up")


def choose_memory_format(machine: Machine) -> Choice:
    """In which order images and feature maps lie in memory."""
    reason = "the layout that every kernel takes"
    if machine.accelerator == "mps":
        reason = (
            "channels-last gave wrong gradients beside batch normalisation on Apple's GPU (pytorch#175189)"
        )
    return Choice(subject="memory_format", value="contiguous", reason=reason)


def _switch(subject: str, *, on: bool, reason: str) -> Choice:
    return Choice(subject=subject, value="on" if on else "off", reason=reason)


def check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises `InvalidInputError`, naming what is allowed."""
    if value not in allowed:
        raise InvalidInputError(
            f"unknown {name} {value!r}: use {', '.join(allowed)}", allowed=", ".join(allowed)
        )
