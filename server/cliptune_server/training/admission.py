"""What a new job may ask for: the shape of its spec, and the paths that it may read.

Enters: a `JobSpec` as a client sent it. Leaves: the spec as accepted, with absolute paths, uploaded data sets
among them, and the published model it starts from resolved to one version. Called by `jobs.py` before
anything is written.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final

from cliptune.dataset_layout import SCHEME, is_pattern
from cliptune.errors import DataError, PathOutsideRootsError, SpecError
from cliptune.spec import validate_shape
from cliptune.v1 import spec_pb2
from cliptune_server.training.data_names import DataNames
from cliptune_server.training.publisher import Publisher

_LOCAL_MODEL: Final = "local-dir:"
_REGISTRY: Final = "registry:"


class Admission:
    """Checks specs against the folders that this daemon may read."""

    def __init__(
        self, *, data_dir: Path, models_dir: Path, data_roots: tuple[Path, ...], data_names: DataNames
    ) -> None:
        self._data_dir = data_dir
        self._data_names = data_names
        self.roots: Final = tuple(
            Path(os.path.realpath(root)) for root in (*data_roots, data_dir, models_dir)
        )
        """Real paths: a trainer is told the same."""

    async def admit(self, spec: spec_pb2.JobSpec, publisher: Publisher) -> spec_pb2.JobSpec:
        """The spec as accepted.

        `SpecError`, `PathOutsideRootsError`, `DataError`, `DatasetNotFoundError`, `ModelNotFoundError`.
        """
        validate_shape(spec)
        admitted = spec_pb2.JobSpec()
        admitted.CopyFrom(spec)
        if admitted.model.name.startswith(_REGISTRY):
            admitted.model.name = await publisher.resolve_source(admitted.model.name)
        await asyncio.to_thread(self._check_paths, admitted)
        admitted.publish.model = admitted.publish.model or admitted.name
        return admitted

    def _check_paths(self, spec: spec_pb2.JobSpec) -> None:
        data = spec.data
        data.train = self._source("data.train", data.train)
        if data.validation:
            data.validation = self._source("data.validation", data.validation)
        if data.image_root:
            data.image_root = self._folder("data.image_root", data.image_root)
        if spec.guard.HasField("probe"):
            probe = spec.guard.probe
            probe.data = self._source("guard.probe.data", probe.data)
            if probe.image_root:
                probe.image_root = self._folder("guard.probe.image_root", probe.image_root)
        if spec.model.name.startswith(_LOCAL_MODEL):
            folder = self._inside("model.name", spec.model.name.removeprefix(_LOCAL_MODEL))
            if not folder.is_dir():
                allowed = "a folder with open_clip_config.json and weights"
                raise SpecError(
                    f"model.name: there is no folder {folder}", path="model.name", allowed=allowed
                )
            spec.model.name = f"{_LOCAL_MODEL}{folder}"
        # open_clip takes a tag or a weights file here; a tag holds no separator.
        if os.sep in spec.model.pretrained or os.path.isfile(spec.model.pretrained):  # noqa: PTH113 (any text)
            weights = self._inside("model.pretrained", spec.model.pretrained)
            if not weights.is_file():
                allowed = "a pretrained tag of the architecture or a weights file"
                raise SpecError(
                    f"model.pretrained: there is no file {weights}", path="model.pretrained", allowed=allowed
                )
            spec.model.pretrained = str(weights)

    def _folder(self, field: str, value: str) -> str:
        path = self._inside(field, self._located(value))
        if not path.is_dir():
            raise DataError(f"{field}: {path} is not a folder", path=field)
        return str(path)

    def _source(self, field: str, value: str) -> str:
        """A table, a folder or a pattern of shards: what is in it is for the trainer to say."""
        located = self._located(value)
        path = self._inside(field, located)
        if path.is_file() or path.is_dir():
            return str(path)
        fixed, pattern = _parted(located)
        if pattern and ".." not in pattern.split("/") and self._inside(field, fixed).is_dir():
            return str(self._inside(field, fixed) / pattern)
        raise DataError(f"{field}: there is no file or folder {value}", path=field, file=value)

    def _located(self, value: str) -> str:
        return self._data_names.locate(value) if value.startswith(SCHEME) else value

    def _inside(self, field: str, value: str) -> Path:
        """The real path, links followed. A relative one starts from the home's uploads."""
        try:
            real = Path(os.path.realpath(self._data_dir / Path(value).expanduser()))
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, a "~user" that is not there
            raise _unusable(field, value, error) from None
        if not any(real.is_relative_to(root) for root in self.roots):
            roots = ", ".join(str(root) for root in self.roots)
            raise PathOutsideRootsError(
                f"{field}: {value} is outside the folders that this daemon may read: {roots}",
                path=value,
                field=field,
                roots=roots,
            )
        try:
            real.is_file()
        except OSError as error:  # too long, or in a folder that may not be searched
            raise _unusable(field, value, error) from None
        return real


def _parted(value: str) -> tuple[str, str]:
    """ "shards/a-*.tar" → "shards", "a-*.tar": the folder, and what of it is a pattern."""
    parts = value.split("/")
    fixed = next((place for place, part in enumerate(parts) if is_pattern(part)), len(parts))
    return "/".join(parts[:fixed]) or ("/" if value.startswith("/") else "."), "/".join(parts[fixed:])


def _unusable(field: str, value: str, error: Exception) -> DataError:
    return DataError(f"{field}: {value[:200]!r} is no usable path: {error}", path=field)
