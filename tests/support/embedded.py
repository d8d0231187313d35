"""A package like cliptune-mini's around tiny models, for tests of how such a package is found and checked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cliptune.embedded import DEFAULT_MODEL, MANIFEST, SUMS, WEIGHTS
from cliptune_model.clip import Clip
from cliptune_model.exported import export_model, manifest_of


def write_package(root: Path, clip: Clip, *names: str) -> Path:
    """Write `root`/cliptune_mini with `clip` under each name; its folder."""
    package = root / "cliptune_mini"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name in names:
        export_model(clip, package / name, manifest_of(clip))
        seal(package / name)
    return package


def seal(folder: Path) -> None:
    """Write the checksums that a release of the model in `folder` has."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["weights_sha256"] = _digest(folder / WEIGHTS)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    root = folder.parent
    files = [path for path in sorted(root.glob("*/*")) if path.parent.name.startswith(DEFAULT_MODEL)]
    (root / SUMS).write_text("".join(f"{_digest(path)}  {path.relative_to(root)}\n" for path in files))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
