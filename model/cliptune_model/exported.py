"""The exported model: a folder in open_clip's own format, plus a manifest.

Enters: a trained `Clip`. Leaves: a folder that plain open_clip loads with "local-dir:", that the registry
keeps and that the engine serves. Called by the trainer (export) and the engine (load). The folder appears
whole or not at all.

    open_clip_config.json            model_cfg and preprocess_cfg, open_clip's form
    open_clip_model.safetensors      weights
    tokenizer files                  only for models with a Hugging Face tokeniser
    cliptune.json                    the manifest
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cliptune.durable import is_disk_full, sync
from cliptune.errors import DiskFullError, InvalidInputError, ModelNotFoundError
from cliptune_model.clip import Clip, build
from cliptune_model.source import CONFIG_FILE, LOCAL_DIR, ModelSource

FORMAT_VERSION: Final = 1
WEIGHTS_FILE: Final = "open_clip_model.safetensors"
MANIFEST_FILE: Final = "cliptune.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What is known of an exported model beyond open_clip's own files. Plain JSON under these names.

    Attributes:
        architecture: open_clip's name, or "custom".
        embedding_dim: D.
        image_size: (height, width) in pixels.
        context_length: tokens of a text.
        similarity: "cosine".
        precision: of training: "fp32", "bf16" or "fp16". The weights are fp32.
        job_id: the job that trained it. Empty: none.
        metrics: evaluation after training, by name.
        created: ISO 8601, UTC.
    """

    architecture: str
    embedding_dim: int
    image_size: tuple[int, int]
    context_length: int
    similarity: str = "cosine"
    precision: str = "fp32"
    job_id: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    created: str = field(default_factory=_now)
    cliptune_version: str = field(default_factory=lambda: version("cliptune"))
    torch_version: str = field(default_factory=lambda: version("torch"))
    open_clip_version: str = field(default_factory=lambda: version("open_clip_torch"))
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(
        cls,
        clip: Clip,
        *,
        precision: str = "fp32",
        job_id: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> Manifest:
        """The manifest of `clip` as it is now."""
        return cls(
            architecture=clip.architecture,
            embedding_dim=clip.embedding_dim,
            image_size=clip.image_size,
            context_length=clip.context_length,
            precision=precision,
            job_id=job_id,
            metrics=dict(metrics or {}),
        )

    def to_json(self) -> str:
        """Text of `cliptune.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Inverse of `to_json`; fields that a newer cliptune has added are passed over.

        Raises:
            InvalidInputError: not a manifest, or of a newer format.
        """
        try:
            values = json.loads(text)
            found = int(values["format_version"])
            if found > FORMAT_VERSION:
                raise InvalidInputError(
                    f"the model has format {found}; this cliptune reads up to {FORMAT_VERSION}: upgrade it"
                )
            known = {item.name for item in dataclasses.fields(cls)}
            height, width = values["image_size"]
            kept = {key: value for key, value in values.items() if key in known}
            return cls(**{**kept, "image_size": (int(height), int(width))})
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(f"{MANIFEST_FILE} is damaged: {error!r}") from error


def export_model(clip: Clip, directory: Path, manifest: Manifest) -> None:
    """Write `clip` to `directory`, which appears whole; a model that is there already is replaced.

    One writer a directory: leftovers of an export that was killed are swept away.

    Raises:
        DiskFullError: no space left; nothing is changed.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    for stale in directory.parent.glob(f".{directory.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    try:
        with _disk_full_told(directory):
            _write(clip, partial, manifest)
            _into_place(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_exported(directory: Path, *, device: str = "cpu") -> Clip:
    """An exported model, or any folder in open_clip's format, in evaluation mode.

    Raises:
        ModelNotFoundError: no such folder.
        InvalidInputError: not a model, or damaged.
    """
    directory = Path(directory)
    if (directory / MANIFEST_FILE).is_file():
        read_manifest(directory)
    return build(ModelSource(name=f"{LOCAL_DIR}{directory}"), device=device)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an exported model.

    Raises:
        ModelNotFoundError: no such folder, or it has no manifest.
        InvalidInputError: the manifest is damaged or of a newer format.
    """
    path = Path(directory) / MANIFEST_FILE
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotFoundError(
            f"no exported model at {str(directory)!r}: {MANIFEST_FILE} is missing"
        ) from error


def _write(clip: Clip, folder: Path, manifest: Manifest) -> None:
    save_file(_separate_tensors(clip.model), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {"model_cfg": clip.model_config, "preprocess_cfg": clip.preprocess_config}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # open_clip reads a Hugging Face tokeniser from the model's own folder; its default one comes with itself.
    save_tokenizer = getattr(clip.tokenizer, "save_pretrained", None)
    if save_tokenizer is not None:
        save_tokenizer(folder)
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    folder.chmod(0o755)  # mkdtemp's is private; the daemon may run as another user
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _separate_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights on the CPU; a tensor under two names is written twice, for open_clip loads strictly."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        held = tensor.detach().to("cpu").contiguous()
        storage = held.untyped_storage().data_ptr()
        tensors[name] = held.clone() if storage in seen else held
        seen.add(storage)
    return tensors


def _into_place(partial: Path, directory: Path) -> None:
    """Rename. A folder cannot be replaced by a rename, so an old model steps aside first."""
    aside: Path | None = None
    if directory.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
        directory.replace(aside)
    partial.replace(directory)
    sync(directory.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _disk_full_told(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            raise DiskFullError(f"no space left for the model at {str(directory)!r}: {error}") from error
        raise
