"""Generates the protobuf stubs under `sdk/cliptune` from `proto/`.

    python -m scripts.proto          write them
    python -m scripts.proto --check  fail, with the difference, when the committed ones are stale

Called by `make proto` and `make lint`. The generator runs in `.venv-proto`, pinned by
`scripts/proto-requirements.txt`: older than the runtime, because generated code refuses a runtime older than
its generator.
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "proto"
TARGET = ROOT / "sdk"
GENERATOR = ROOT / ".venv-proto" / "bin"
PACKAGES = ("cliptune/v1", "cliptune/internal/v1", "cliptune/internal/open_inference")
_OPEN_INFERENCE = (
    '"""Generated: the Open Inference Protocol v2, for the daemon alone.\n\n'
    "Its names (package `inference`) are those of other libraries' stubs: one process cannot hold both.\n"
    '"""\n'
)
INIT = {
    "cliptune/v1": '"""Generated: the public wire contract, `proto/cliptune/v1`."""\n',
    "cliptune/internal": '"""Generated: the links between daemon, engine and trainer."""\n',
    "cliptune/internal/open_inference": _OPEN_INFERENCE,
    "cliptune/internal/v1": '"""Generated: the links between daemon, engine and trainer."""\n',
}


def generate(into: Path) -> None:
    """Runs the generator over every contract; `into` receives the tree that belongs under `sdk/`."""
    names = [
        str(p.relative_to(SOURCES))
        for package in PACKAGES
        for p in sorted((SOURCES / package).glob("*.proto"))
    ]
    subprocess.run(
        [
            GENERATOR / "python",
            "-m",
            "grpc_tools.protoc",
            f"--plugin=protoc-gen-mypy={GENERATOR / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={GENERATOR / 'protoc-gen-mypy_grpc'}",
            f"--proto_path={SOURCES}",
            f"--python_out={into}",
            f"--grpc_python_out={into}",
            f"--mypy_out=quiet:{into}",
            f"--mypy_grpc_out=quiet:{into}",
            *names,
        ],
        check=True,
    )
    for path in into.rglob("*_pb2_grpc.py*"):
        # A contract without a service gets an empty stub file from the generator: noise.
        if "\nservice " not in (SOURCES / path.relative_to(into).parent / proto_name(path)).read_text():
            path.unlink()
    for folder, text in INIT.items():
        (into / folder / "__init__.py").write_text(text)


def proto_name(stub: Path) -> str:
    """`training_pb2_grpc.pyi` → `training.proto`."""
    return stub.name.split("_pb2")[0] + ".proto"


def generated_files(base: Path) -> dict[str, str]:
    """Relative path → text of every stub under `base`."""
    return {
        str(path.relative_to(base)): path.read_text()
        for folder in INIT
        for path in sorted((base / folder).glob("*.py*"))
        if path.suffix in {".py", ".pyi"}
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        new, old = generated_files(Path(folder)), generated_files(TARGET)
    if check:
        for name in sorted(new.keys() | old.keys()):
            diff = difflib.unified_diff(
                old.get(name, "").splitlines(),
                new.get(name, "").splitlines(),
                f"committed/{name}",
                f"generated/{name}",
            )
            sys.stderr.writelines(line + "\n" for line in diff)
        return int(new != old)
    for name in old.keys() - new.keys():
        (TARGET / name).unlink()
    for name, text in new.items():
        path = TARGET / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
