"""Models that come as a Python package, without a download: found by name, and proved whole before use.

Enters: a name ("cliptune-mini"). Leaves: the folder of a model in open_clip's format, every file of which has
the checksum that the package was released with. Called by the model runtime (`ModelSource`) and by the
daemon, which serves one while nothing else is. Standard library alone: the daemon has no torch.

    cliptune_mini/SHA256SUMS                      as `sha256sum --check` reads it; says which file is whose
    cliptune_mini/cliptune-mini/…                 the model
    cliptune_mini/cliptune-mini/cliptune.json     its manifest; `weights_sha256` travels with every copy
    cliptune_mini/general-probe/pairs.tar         pictures and captions of no domain, for the forgetting guard
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from cliptune.errors import ModelDamagedError, ModelNotFoundError, WeightsUnavailableError

DEFAULT_MODEL: Final = "cliptune-mini"
PACKAGE: Final = "cliptune_mini"
INSTALL: Final = "pip install cliptune-mini"
_REINSTALL: Final = f"reinstall it: {INSTALL} --force-reinstall"
SUMS: Final = "SHA256SUMS"
MANIFEST: Final = "cliptune.json"
WEIGHTS: Final = "open_clip_model.safetensors"
PROBE_FOLDER: Final = "general-probe"
PROBE_PAIRS: Final = "pairs.tar"


def is_embedded(name: str) -> bool:
    """Whether this is the name of such a model, installed or not."""
    return name == DEFAULT_MODEL or name.startswith(f"{DEFAULT_MODEL}-")


def embedded_names() -> list[str]:
    """Those installed, sorted; none without the package."""
    root = _root()
    return _models(_sums(root)) if root else []


def embedded_digest(name: str) -> str:
    """SHA-256 of the weights that this name stands for, in hexadecimal.

    Raises:
        WeightsUnavailableError: the package is not installed.
        ModelNotFoundError: it has no model of this name.
        ModelDamagedError: its list of checksums is missing or cannot be read.
    """
    return _files(name)[1][WEIGHTS]


def embedded_folder(name: str) -> Path:
    """The model's folder, every file of it read and found whole.

    Raises:
        As `embedded_digest`, and ModelDamagedError where a file is missing or has another checksum.
    """
    folder, digests = _files(name)
    for file, digest in digests.items():
        _check(folder / file, digest, _REINSTALL)
    return folder


def embedded_probe() -> Path | None:
    """The general probe, a tar shard of images and captions, read and found whole. None: the package is not
    installed, or is one from before it.

    Raises:
        ModelDamagedError: it is missing or has another checksum, or the list of checksums cannot be read.
    """
    root = _root()
    digest = _sums(root).get(f"{PROBE_FOLDER}/{PROBE_PAIRS}") if root else None
    if root is None or digest is None:
        return None
    path = root / PROBE_FOLDER / PROBE_PAIRS
    _check(path, digest, _REINSTALL)
    return path


def check_weights(folder: Path) -> None:
    """Compare a model's weights with the checksum in its manifest; a model without one is not checked.

    Raises:
        ModelDamagedError: the weights are missing, cut short or other than the manifest says.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digest = str(manifest.get("weights_sha256") or "")
    except (OSError, ValueError, AttributeError):
        return  # there is no manifest, or it is damaged: whoever reads it for more says so
    if digest:
        _check(folder / WEIGHTS, digest, "take the model anew from where it came from")


def _files(name: str) -> tuple[Path, Mapping[str, str]]:
    """The folder, and its files' checksums."""
    root = _root()
    if root is None:
        raise WeightsUnavailableError(f"{name} is a package of its own and is not installed: {INSTALL}")
    sums = _sums(root)
    digests = {path.partition("/")[2]: digest for path, digest in sums.items() if path.startswith(f"{name}/")}
    if WEIGHTS not in digests:
        there = ", ".join(_models(sums))
        raise ModelNotFoundError(
            f"the installed {DEFAULT_MODEL} has no model {name!r}; it has: {there}", model=name
        )
    return root / name, digests


def _models(sums: Mapping[str, str]) -> list[str]:
    return sorted(path.partition("/")[0] for path in sums if path.endswith(f"/{WEIGHTS}"))


def _root() -> Path | None:
    spec = find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _sums(root: Path) -> dict[str, str]:
    """Path below the package → checksum."""
    try:
        lines = (root / SUMS).read_text(encoding="utf-8").splitlines()
        return {path: digest for digest, path in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise ModelDamagedError(
            f"the checksums of {DEFAULT_MODEL} cannot be read ({error}); {_REINSTALL}",
            file=root / SUMS,
        ) from error


def _check(path: Path, wanted: str, remedy: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelDamagedError(f"{path} cannot be read ({error.strerror}); {remedy}", file=path) from error
    if not hmac.compare_digest(found, wanted):
        raise ModelDamagedError(
            f"{path} is not the file it should be: its SHA-256 is {found[:16]}…, expected {wanted[:16]}…; "
            f"it was cut short, changed, or is another model; {remedy}",
            file=path,
            found=found,
            expected=wanted,
        )
