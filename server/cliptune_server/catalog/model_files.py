"""Published models on disk: the truth that the registry's index is rebuilt from.

    models/<name>/<version>/      open_clip_config.json, open_clip_model.safetensors, cliptune.json; immutable
    models/<name>/aliases.json    {"prod": 3}; one that cannot be read is kept beside as aliases.json.damaged
    models/<name>/last.json       {"version": 4}: the highest ever given, once it was deleted
    models/.staging/              what is not published yet; emptied at start

Enters: a finished export of a job. Leaves: a version that appeared by one rename, whole or not at all. All
calls block and are made by `registry.py`, in a thread, one at a time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cliptune.durable import sync
from cliptune.errors import InternalError, InvalidInputError, ModelNotFoundError
from cliptune_server.home import write_json

MANIFEST: Final = "cliptune.json"
_ALIASES: Final = "aliases.json"
_LAST: Final = "last.json"
_STAGING: Final = ".staging"
_NAME_RULE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedModel:
    """One version, as its manifest describes it."""

    name: str
    version: int
    path: Path
    created: datetime
    bytes: int
    """Size on disk."""
    architecture: str
    embedding_dim: int
    image_size: int
    """Height in pixels."""
    job_id: str
    metrics: Mapping[str, float]
    similarity: str
    similarity_values: Mapping[str, float]
    """What the similarity computes with, given or learned."""
    serving_size: int
    """Height in pixels where a request asks for none."""
    sizes: tuple[Mapping[str, float], ...]
    """Those that it was measured at: fields of `ProvenSize`."""

    @property
    def key(self) -> str:
        """ "NAME:VERSION"."""
        return f"{self.name}:{self.version}"


def check_name(name: str, what: str = "model name") -> str:
    """The name itself, or `InvalidInputError`: letters, digits, "-", "_", "."; at most 64; no "." first."""
    if not _NAME_RULE.fullmatch(name):
        raise InvalidInputError(
            f"{name!r} is no {what}: letters, digits, '-', '_' and '.', at most 64, a letter or digit first",
            name=name,
        )
    return name


class DamagedAliasesError(Exception):
    """The aliases of a name cannot be read."""


class ModelFiles:
    """The folder `models/` of one home."""

    def __init__(self, root: Path) -> None:
        self.root: Final = root

    def clean(self) -> int:
        """Remove what a kill left half-copied or half-deleted; returns how many folders that was."""
        staging = self.root / _STAGING
        leftovers = list(staging.iterdir()) if staging.is_dir() else []
        for leftover in leftovers:
            shutil.rmtree(leftover)
        return len(leftovers)

    def names(self) -> list[str]:
        """Every name with a folder, sorted."""
        if not self.root.is_dir():
            return []
        return sorted(
            entry.name for entry in self.root.iterdir() if entry.is_dir() and _NAME_RULE.fullmatch(entry.name)
        )

    def versions(self, name: str) -> list[int]:
        """Published versions of a name, ascending."""
        folder = self.root / name
        if not folder.is_dir():
            return []
        return sorted(
            int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir()
        )

    def scan(self) -> Iterator[PublishedModel | tuple[Path, str]]:
        """Every version; one whose manifest cannot be read comes as (path, why)."""
        for name in self.names():
            for version in self.versions(name):
                try:
                    yield self.read(name, version)
                except (OSError, ValueError, TypeError, KeyError) as error:
                    yield self.path(name, version), f"{type(error).__name__}: {error}"

    def path(self, name: str, version: int) -> Path:
        """Where this version lies, or would."""
        return self.root / name / str(version)

    def read(self, name: str, version: int) -> PublishedModel:
        """A version by its manifest. OSError, ValueError, TypeError or KeyError when that is damaged."""
        path = self.path(name, version)
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        image_size = manifest["image_size"]
        height = int(image_size[0] if isinstance(image_size, list) else image_size)
        return PublishedModel(
            name=name,
            version=version,
            path=path,
            created=_moment(manifest["created"]),
            bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
            architecture=str(manifest["architecture"]),
            embedding_dim=int(manifest["embedding_dim"]),
            image_size=height,
            job_id=str(manifest.get("job_id") or ""),
            metrics=_numbers(manifest.get("metrics")),
            similarity=str(manifest.get("similarity") or "cosine"),
            similarity_values=_numbers(manifest.get("similarity_values")),
            serving_size=int((manifest.get("serving_size") or [height])[0]),
            sizes=tuple(_numbers(entry) for entry in manifest.get("proven_sizes") or ()),
        )

    def publish(
        self, export_dir: Path, *, name: str, job_id: str, metrics: Mapping[str, float]
    ) -> PublishedModel:
        """Give `export_dir` the next version of `name` and take its files; the manifest gets what is new.

        A kill at any point leaves either no new version or a whole one; the export stays until the version is
        there. OSError when the disk is full; `InternalError` when the export has no manifest.
        """
        check_name(name)
        if not (export_dir / MANIFEST).is_file():
            raise InternalError(f"{export_dir} is no exported model: it has no {MANIFEST}", path=export_dir)
        manifest: dict[str, Any] = json.loads((export_dir / MANIFEST).read_text(encoding="utf-8"))
        version = self._next_version(name)
        staging = self.draft()
        try:
            shutil.copytree(export_dir, staging, copy_function=_link_or_copy)
            # The manifest is replaced, not written through: its file may be a hard link to the export's.
            kept = {str(key): float(value) for key, value in metrics.items()}
            added = {"name": name, "version": version, "job_id": job_id}
            added_metrics = {"metrics": kept or manifest.get("metrics") or {}}
            write_json(staging / MANIFEST, {**manifest, **added, **added_metrics}, mode=0o644)
            final = self.path(name, version)
            final.parent.mkdir(parents=True, exist_ok=True)
            staging.rename(final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        sync(final.parent)
        shutil.rmtree(export_dir, ignore_errors=True)
        return self.read(name, version)

    def delete(self, name: str, version: int) -> None:
        """Remove a version; its number is not given again. `ModelNotFoundError` when there is none."""
        path = self.path(name, version)
        if not path.is_dir():
            raise ModelNotFoundError(f"there is no model {name}:{version}", model=f"{name}:{version}")
        if version >= self._next_version(name) - 1:
            write_json(self.root / name / _LAST, {"version": version})
        away = self.draft()
        path.rename(away)
        sync(path.parent)
        shutil.rmtree(away)

    def aliases(self, name: str) -> dict[str, int]:
        """Alias → version, those whose version exists. `DamagedAliasesError`."""
        path = self.root / name / _ALIASES
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            found = {check_name(alias, "alias"): int(version) for alias, version in written.items()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, TypeError, AttributeError, InvalidInputError) as error:
            raise DamagedAliasesError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        there = set(self.versions(name))
        return {alias: version for alias, version in sorted(found.items()) if version in there}

    def mend_aliases(self, name: str, aliases: Mapping[str, int]) -> dict[str, int]:
        """Put what is known from elsewhere in the place of a damaged file, which is kept beside it."""
        path = self.root / name / _ALIASES
        path.replace(path.with_name(f"{_ALIASES}.damaged"))
        self.write_aliases(name, aliases)
        return self.aliases(name)

    def write_aliases(self, name: str, aliases: Mapping[str, int]) -> None:
        """Replace the aliases of a name, at once."""
        write_json(self.root / name / _ALIASES, dict(sorted(aliases.items())))

    def _next_version(self, name: str) -> int:
        try:
            last = int(json.loads((self.root / name / _LAST).read_text(encoding="utf-8"))["version"])
        except FileNotFoundError:
            last = 0
        return max([last, *self.versions(name)]) + 1

    def draft(self) -> Path:
        """A new folder's path, below models/.staging/."""
        folder = self.root / _STAGING
        folder.mkdir(parents=True, exist_ok=True)
        return folder / uuid.uuid4().hex


def _link_or_copy(source: str, target: str) -> None:
    """A hard link costs no space and no time; other file systems get a copy, flushed to the disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        with Path(target).open("rb") as file:
            os.fsync(file.fileno())


def _numbers(written: Any) -> dict[str, float]:
    """A table of a manifest."""
    return {str(key): float(value) for key, value in (written or {}).items()}


def _moment(written: object) -> datetime:
    """Time of a manifest: ISO 8601 or seconds since 1970."""
    if isinstance(written, int | float):
        return datetime.fromtimestamp(written, UTC)
    moment = datetime.fromisoformat(str(written))
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
