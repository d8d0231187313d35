"""Users' own code: a loss or a similarity by its entry point, or in a file that the daemon's owner allows.

Enters: what stands in a spec: "NAME" of an entry point, or "FILE.py:NAME". Leaves: the object of that name,
and what is to be told of it. Called where losses and similarities are looked up, in trainer and engine.

An entry point was installed by the owner of the environment. A file is run only if it lies, links followed,
in one of the folders of `CLIPTUNE_ALLOW_CODE`, which `cliptune serve --allow-code` hands to its trainers
and engines: whoever may submit a job must not so become who may run code. A model's folder never brings
code.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from cliptune.errors import PathOutsideRootsError, SpecError

ENVIRONMENT: Final = "CLIPTUNE_ALLOW_CODE"
_MARK: Final = ".py:"


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnCode:
    """An object that cliptune does not bring.

    Attributes:
        value: the object.
        reference: what finds it again from anywhere: the entry point, or "/absolute/FILE.py:NAME".
        sha256: of the file. Empty: an entry point, whose package has a version.
        origin: where it came from, for a person.
    """

    value: Any = field(repr=False)
    reference: str
    sha256: str = ""
    origin: str


def code_folders() -> tuple[Path, ...]:
    """Folders whose files may be run, links followed."""
    named = os.environ.get(ENVIRONMENT, "").split(os.pathsep)
    return tuple(Path(os.path.realpath(Path(folder).expanduser())) for folder in named if folder)


def names(group: str) -> list[str]:
    """Entry points of a group that are installed, sorted."""
    return sorted({point.name for point in entry_points(group=group)})


def find(group: str, reference: str, *, path: str) -> OwnCode | None:
    """The object that `reference` names; None: no entry point has this name.

    Args:
        group: "cliptune.losses" or "cliptune.similarities".
        reference: as in the spec.
        path: of the spec's field, for errors.

    Raises:
        PathOutsideRootsError: a file outside of the folders that are allowed.
        SpecError: no such file, the code does not load, or it holds no such name.
    """
    if _MARK in reference:
        return _from_file(reference, path)
    for point in entry_points(group=group, name=reference):
        try:
            value = point.load()
        except Exception as error:  # anything may go wrong in it
            raise _does_not_load(path, f"the entry point {point.name} = {point.value}", error) from error
        owner = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
        return OwnCode(value=value, reference=reference, origin=f"entry point {point.value}{owner}")
    return None


def _from_file(reference: str, path: str) -> OwnCode:
    written, _, name = reference.rpartition(":")
    folders = code_folders()
    if not folders:
        raise PathOutsideRootsError(
            f"{path} is {reference!r}, but this daemon runs no code of files; its owner may allow folders:"
            " cliptune serve --allow-code DIR",
            path=written,
            field=path,
            roots="",
        )
    candidates = [Path(os.path.realpath(folder / Path(written).expanduser())) for folder in folders]
    inside = [file for file in candidates if any(file.is_relative_to(folder) for folder in folders)]
    if not inside:
        roots = ", ".join(map(str, folders))
        raise PathOutsideRootsError(
            f"{path}: {written} is outside the folders whose code this daemon may run: {roots}",
            path=written,
            field=path,
            roots=roots,
        )
    file = next((file for file in inside if file.is_file()), None)
    if file is None:
        allowed = f"a file below {', '.join(map(str, folders))}"
        raise SpecError(f"{path}: there is no file {written}; allowed: {allowed}", path=path, allowed=allowed)
    try:
        content = file.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        module = _run(str(file), content, sha256)
    except Exception as error:  # anything may go wrong in it
        raise _does_not_load(path, str(file), error) from error
    value = module.get(name)
    if value is None:
        found = ", ".join(key for key, entry in module.items() if callable(entry) and key[0] != "_") or "none"
        raise SpecError(f"{path}: {file} has no {name!r}; allowed: {found}", path=path, allowed=found)
    return OwnCode(
        value=value, reference=f"{file}:{name}", sha256=sha256, origin=f"{file}, sha256 {sha256[:12]}"
    )


@functools.cache
def _run(file: str, content: bytes, sha256: str) -> dict[str, Any]:
    """The names of a file, which runs once for each of its contents: these very bytes, no cache of others."""
    module = ModuleType(f"cliptune_own_{Path(file).stem}_{sha256[:12]}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses look their own module up
    try:
        exec(compile(content, file, "exec", dont_inherit=True), vars(module))
    except BaseException as error:
        del sys.modules[module.__name__]
        if isinstance(error, SystemExit):
            raise RuntimeError("it ends the process") from error
        raise
    return vars(module)


def _does_not_load(path: str, what: str, error: Exception) -> SpecError:
    why = (str(error).strip().splitlines() or [""])[0]
    return SpecError(f"{path}: {what} does not load: {type(error).__name__}: {why}", path=path, allowed="")
