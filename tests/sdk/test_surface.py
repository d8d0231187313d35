"""The package as its user meets it: light to import, its public names complete, both clients alike."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import cliptune
from cliptune import AsyncClient, AsyncSession, Client, Session, errors
from cliptune.job import EventBody

LOADED = "import sys; print(*sorted(sys.modules))"
LIBRARIES = {"grpc", "numpy", "google", "opentelemetry", "asyncio"}
HEAVY = {"torch", "PIL", "rich", "fastapi", "open_clip", "sqlalchemy", "structlog", "uvicorn", "yaml"}


def loaded_by(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after `code`."""
    shown = subprocess.run(
        [sys.executable, "-c", f"{code}; {LOADED}"], check=True, capture_output=True, text=True
    )
    return set(shown.stdout.split())


def test_the_import_loads_no_library_and_no_module_of_ours() -> None:
    loaded = loaded_by("import cliptune")
    assert not (LIBRARIES | HEAVY) & loaded
    assert {name for name in loaded if name.startswith("cliptune")} == {"cliptune"}


@pytest.mark.parametrize("name", ["Client", "AsyncClient"])
def test_a_client_brings_nothing_heavy_and_not_the_other_client(name: str) -> None:
    loaded = loaded_by(f"from cliptune import {name}")
    assert not HEAVY & loaded
    assert len({"cliptune.client", "cliptune.aio"} & loaded) == 1


def test_the_base_install_is_six_packages_with_what_they_need() -> None:
    base = [line for line in metadata.requires("cliptune") or [] if "extra ==" not in line]
    assert len(base) <= 10


def test_all_names_every_public_thing_and_nothing_else() -> None:
    assert dir(cliptune) == sorted(cliptune.__all__)
    assert len(cliptune.__all__) == len(set(cliptune.__all__))
    for name in cliptune.__all__:
        assert not inspect.ismodule(getattr(cliptune, name)), name
    with pytest.raises(AttributeError, match="no attribute 'Klient'"):
        _ = cliptune.Klient  # type: ignore[attr-defined]


def test_type_checkers_see_each_name_where_python_finds_it() -> None:
    tree = ast.parse(Path(cliptune.__file__).read_text(encoding="utf-8"))
    (guarded,) = [
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    seen = {
        name.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert {*seen, "__version__"} == set(cliptune.__all__)
    for name, module in seen.items():
        assert module is not None
        assert getattr(cliptune, name) is getattr(importlib.import_module(module), name), name
    assert {name: f"cliptune.{module}" for name, module in cliptune._MODULE_OF.items()} == seen


def test_every_error_and_every_kind_of_event_is_public() -> None:
    assert set(errors.all_errors()) <= set(cliptune.__all__)
    assert {cls.__name__ for cls in EventBody.__args__} <= set(cliptune.__all__)


def test_the_version_is_the_distribution_s() -> None:
    assert cliptune.__version__ == metadata.version("cliptune")


def test_both_clients_have_the_same_methods_with_the_same_arguments_and_words() -> None:
    for left, right in ((Client, AsyncClient), (Session, AsyncSession)):
        methods = {name for name in dir(left) if not name.startswith("_")}
        assert methods == {name for name in dir(right) if not name.startswith("_")}
        for name in methods - {"address"}:
            ours, theirs = getattr(left, name), getattr(right, name)
            if not callable(ours):
                continue
            ours_signature, theirs_signature = inspect.signature(ours), inspect.signature(theirs)
            assert list(ours_signature.parameters) == list(theirs_signature.parameters), name
            for parameter in ours_signature.parameters.values():
                assert parameter.default == theirs_signature.parameters[parameter.name].default, name
            assert ours.__doc__ == theirs.__doc__, name
