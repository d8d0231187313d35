"""The exported model: a folder in open_clip's own format, plus a manifest.

Enters: a trained `Clip`. Leaves: a folder that plain open_clip loads with "local-dir:", that the registry
keeps and that the engine serves. Called by the trainer (export) and the engine (load). The folder appears
whole or not at all.

    open_clip_config.json            model_cfg and preprocess_cfg, open_clip's form
    open_clip_model.safetensors      weights
    tokenizer files                  only for models with a Hugging Face tokeniser
    cliptune_similarity.safetensors  what a learned similarity has learned, if there is one
    cliptune.json                    the manifest
    adapter/                         the adapter by itself, of a model that was trained with one

A model that was trained with an adapter is written with the adapter in its weights; or the adapter alone is,
beside configuration and manifest, to be served over its base.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cliptune.durable import is_disk_full, sync
from cliptune.errors import DiskFullError
from cliptune_model.adapters import (
    INSIDE,
    SharedBase,
    holds_adapter,
    load_adapted,
    merged_state,
    write_adapter,
)
from cliptune_model.clip import Clip, build
from cliptune_model.manifest import FORMAT_VERSION, MANIFEST_FILE, SIMILARITY_FILE, Manifest, read_manifest
from cliptune_model.proven_sizes import ProvenSize
from cliptune_model.similarity import DEFAULT
from cliptune_model.source import CONFIG_FILE, LOCAL_DIR, ModelSource

__all__ = [
    "MANIFEST_FILE",
    "WEIGHTS_FILE",
    "Manifest",
    "export_model",
    "load_exported",
    "manifest_of",
    "read_manifest",
]

WEIGHTS_FILE: Final = "open_clip_model.safetensors"


def manifest_of(
    clip: Clip,
    *,
    precision: str = "fp32",
    job_id: str = "",
    metrics: Mapping[str, float] | None = None,
    matryoshka_dims: tuple[int, ...] = (),
    serving_size: tuple[int, int] | None = None,
    proven_sizes: tuple[ProvenSize, ...] = (),
    guard: Mapping[str, float] | None = None,
) -> Manifest:
    """The manifest of `clip` as it is now."""
    return Manifest(
        architecture=clip.architecture,
        embedding_dim=clip.embedding_dim,
        image_size=clip.image_size,
        context_length=clip.context_length,
        similarity=clip.similarity.name,
        similarity_parameters=dict(clip.similarity.parameters_given),
        similarity_values=clip.similarity.values(),
        similarity_sha256=clip.similarity.sha256,
        matryoshka_dims=matryoshka_dims,
        precision=precision,
        job_id=job_id,
        metrics=dict(metrics or {}),
        serving_size=serving_size,
        proven_sizes=proven_sizes,
        guard=dict(guard or {}),
        # A cliptune that knows only the cosine would serve another similarity's model wrongly: it refuses.
        format_version=1 if clip.similarity.name == DEFAULT else FORMAT_VERSION,
    )


def export_model(clip: Clip, directory: Path, manifest: Manifest, *, adapter_alone: bool = False) -> None:
    """Write `clip` to `directory`, which appears whole; a model that is there already is replaced.

    One writer a directory: leftovers of an export that was killed are swept away.

    Args:
        clip: with or without an adapter.
        directory: of the model.
        manifest: of the model.
        adapter_alone: the adapter, not the weights of its base.

    Raises:
        ConflictError: the adapter is no linear one, and so cannot be in the weights.
        DiskFullError: no space left; nothing is changed.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    for stale in directory.parent.glob(f".{directory.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    try:
        with _disk_full_told(directory):
            _write(clip, partial, manifest, adapter_alone=adapter_alone)
            _into_place(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_exported(directory: Path, *, device: str = "cpu", loaded: Iterable[SharedBase] = ()) -> Clip:
    """An exported model or adapter, or any folder in open_clip's format, in evaluation mode.

    `loaded`: models in memory, whose weights an adapter shares where they are its base's.

    Raises:
        ModelNotFoundError: no such folder, or an adapter's base is not there any more.
        AdapterBaseError: what is there now has other weights than the adapter's base had.
        InvalidInputError: not a model, or damaged.
    """
    if holds_adapter(Path(directory)):
        return load_adapted(Path(directory), device=device, loaded=loaded)
    return build(ModelSource(name=f"{LOCAL_DIR}{directory}"), device=device)


def _write(clip: Clip, folder: Path, manifest: Manifest, *, adapter_alone: bool) -> None:
    if adapter_alone:
        write_adapter(clip, folder)
    else:
        weights = _separate_tensors(merged_state(clip.model))
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        if clip.adapter is not None:
            (folder / INSIDE).mkdir()
            _write(clip, folder / INSIDE, manifest, adapter_alone=True)
    learned = _separate_tensors(clip.similarity.state_dict())
    if learned:
        save_file(learned, folder / SIMILARITY_FILE, metadata={"format": "pt"})
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


def _separate_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights on the CPU; a tensor under two names is written twice, for open_clip loads strictly."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
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
