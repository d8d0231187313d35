"""The picture of the house, held against the imports of the code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "cliptune": ROOT / "sdk" / "cliptune",
    "cliptune_model": ROOT / "model" / "cliptune_model",
    "cliptune_server": ROOT / "server" / "cliptune_server",
    "cliptune_trainer": ROOT / "trainer" / "cliptune_trainer",
}
ROOMS = set(FOLDERS)
MAY_IMPORT = {
    "cliptune": set(),
    "cliptune_model": {"cliptune"},
    "cliptune_server": {"cliptune", "cliptune_model"},
    "cliptune_trainer": {"cliptune", "cliptune_model"},
}
TORCH_WORLD = {
    "torch",
    "torchvision",
    "open_clip",
    "timm",
    "safetensors",
    "PIL",
    "cliptune_model",
    "cliptune_trainer",
}
# Parts of the daemon, each below the faces; and what each may import of the others. They meet in `daemon.py`.
PARTS = {
    "training": set(),
    "catalog": {"cliptune_server.training.publisher"},
    "inference": set(),
    "datasets": set(),
}
# Processes of their own below the daemon: they may decode images and compute, and it never reaches into them.
PROCESSES = ("engine", "sampler")
# What the light client may import when its modules are loaded. Anything else is imported inside a function.
CLIENT_IMPORTS = {"cliptune", "grpc", "google", "numpy", "opentelemetry"}


def sources(room: str) -> list[Path]:
    return sorted(FOLDERS[room].rglob("*.py"))


def imported(path: Path, *, top_level_only: bool = False, types: bool = False) -> set[str]:
    """Dotted names that a file imports; `top_level_only`: none inside functions or, without `types`,
    TYPE_CHECKING.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if top_level_only and guard and not types:
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return names


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    for path in sources(room):
        above = (roots(imported(path)) & ROOMS) - MAY_IMPORT[room] - {room}
        assert not above, f"{path.relative_to(ROOT)} imports {sorted(above)}"


def test_the_daemon_part_of_the_server_never_imports_torch_or_the_model_room() -> None:
    apart = {FOLDERS["cliptune_server"] / process for process in PROCESSES}
    for path in sources("cliptune_server"):
        names = imported(path)
        if not apart & set(path.parents):
            assert not roots(names) & TORCH_WORLD, (
                f"{path.relative_to(ROOT)}: {sorted(roots(names) & TORCH_WORLD)}"
            )
            inside = {
                name
                for name in names
                for process in PROCESSES
                if f"{name}.".startswith(f"cliptune_server.{process}.")
            }
            assert not inside, f"{path.relative_to(ROOT)} reaches into another process: {inside}"


@pytest.mark.parametrize("process", PROCESSES)
def test_a_process_below_the_daemon_never_imports_the_daemon(process: str) -> None:
    for path in sorted((FOLDERS["cliptune_server"] / process).rglob("*.py")):
        outside = {
            name
            for name in imported(path)
            if name.startswith("cliptune_server") and not name.startswith(f"cliptune_server.{process}")
        }
        assert not outside, f"{path.relative_to(ROOT)} imports {sorted(outside)}"


def test_the_client_imports_nothing_heavy_when_loaded() -> None:
    import sys

    allowed = CLIENT_IMPORTS | set(sys.stdlib_module_names)
    for path in sources("cliptune"):
        heavy = roots(imported(path, top_level_only=True)) - allowed
        assert not heavy, f"{path.relative_to(ROOT)} imports {sorted(heavy)} when loaded"


@pytest.mark.parametrize("part", sorted(PARTS))
def test_a_part_of_the_daemon_knows_neither_the_faces_nor_the_other_parts(part: str) -> None:
    others = {f"cliptune_server.{name}." for name in {*PARTS, "rpc", "gateway"} - {part}}
    paths = sorted((FOLDERS["cliptune_server"] / part).glob("*.py"))
    assert len(paths) > 3
    for path in paths:
        reached = {name for name in imported(path) if name.startswith(tuple(others))} - PARTS[part]
        assert not reached, f"{path.relative_to(ROOT)} imports {sorted(reached)}"


def test_faces_hold_no_logic_of_each_other() -> None:
    rpc, gateway = FOLDERS["cliptune_server"] / "rpc", FOLDERS["cliptune_server"] / "gateway"
    assert sorted(rpc.glob("*.py"))
    assert sorted(gateway.glob("*.py"))
    for path in rpc.rglob("*.py"):
        assert not {n for n in imported(path) if n.startswith("cliptune_server.gateway")}, path
    for path in gateway.rglob("*.py"):
        assert not {n for n in imported(path) if n.startswith("cliptune_server.rpc")}, path


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_modules_of_a_room_do_not_import_in_a_circle(room: str) -> None:
    base = FOLDERS[room].parent
    modules = {
        ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sources(room)
    }
    types = room == "cliptune_server"  # elsewhere two modules may know each other's types
    graph = {
        name: (imported(path, top_level_only=True, types=types) & modules.keys()) - {name}
        for name, path in modules.items()
    }
    assert not circle(graph)


@pytest.mark.parametrize("room", ["cliptune_model", "cliptune_trainer"])
def test_parts_of_a_room_do_not_import_in_a_circle(room: str) -> None:
    parts = {path.name for path in FOLDERS[room].iterdir() if (path / "__init__.py").is_file()}
    assert len(parts) > 3

    def part_of(name: str) -> str:
        """ "cliptune_trainer.steps.step" → "steps"; a module beside the folders is a part of its own."""
        return name.split(".")[1] if name.count(".") else ""

    graph: dict[str, set[str]] = {}
    for path in sources(room):
        mine = path.relative_to(FOLDERS[room]).with_suffix("").parts[0]
        others = {
            part_of(name) for name in imported(path, top_level_only=True) if name.startswith(f"{room}.")
        }
        graph.setdefault(mine, set()).update(others - {mine})
    assert not circle({part: others & graph.keys() for part, others in graph.items()})


def circle(graph: dict[str, set[str]]) -> str:
    """Names that lead back to the first, or nothing."""
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> str:
        if name in trail:
            return " → ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                if found := walk(target, (*trail, name)):
                    return found
            done.add(name)
        return ""

    return next((found for name in sorted(graph) if (found := walk(name, ()))), "")


def test_no_room_is_called_utils() -> None:
    nameless = {"utils.py", "helpers.py", "misc.py", "common.py"}
    assert not [path for room in ROOMS for path in sources(room) if path.name in nameless]
