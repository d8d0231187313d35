"""The similarity that a model is built with: the spec's, else that of its manifest, else the cosine.

Enters: a `ModelSource`, whose folder or repository may hold a manifest and what a similarity has learned.
Leaves: a `Similarity` on the CPU. Called by `clip.build`; the plan tells of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from cliptune.errors import CliptuneError, ConflictError, InvalidInputError, WeightsUnavailableError
from cliptune_model.choice import Choice
from cliptune_model.manifest import MANIFEST_FILE, SIMILARITY_FILE, Manifest, read_manifest
from cliptune_model.similarity import DEFAULT, SIMILARITIES, Similarity, similarity_for
from cliptune_model.source import HF_HUB, LOCAL_DIR, ModelSource


def build_similarity(source: ModelSource, dim: int) -> Similarity:
    """As the source says, with what it has learned unless the source names another or gives it parameters.

    Raises:
        SpecError, PathOutsideRootsError: as `similarity_for`.
        InvalidInputError: the manifest or what was learned is damaged.
        WeightsUnavailableError: the hub does not answer.
        ConflictError: the user's own code that the model was trained with has changed, or is not to be had.
    """
    folder = _folder(source)
    if folder is None or not (folder / MANIFEST_FILE).is_file():
        return similarity_for(source.similarity or DEFAULT, dim, source.similarity_parameters)
    manifest = read_manifest(folder)
    if source.similarity:
        given = source.similarity_parameters or _known(manifest, source.similarity)
        similarity = similarity_for(source.similarity, dim, given)
    else:
        similarity = _as_trained(folder, manifest, dim, source.similarity_parameters)
    if similarity.name == manifest.similarity and not source.similarity_parameters:
        _take_over(similarity, folder, manifest)
    return similarity


def _folder(source: ModelSource) -> Path | None:
    """Where a manifest would lie; None: nowhere."""
    if source.name.startswith(LOCAL_DIR):
        return Path(source.name.removeprefix(LOCAL_DIR)).expanduser()
    if not source.name.startswith(HF_HUB):
        return None
    repository = source.name.removeprefix(HF_HUB)
    try:
        folder = Path(hf_hub_download(repository, MANIFEST_FILE)).parent
        if read_manifest(folder).similarity != DEFAULT:
            hf_hub_download(repository, SIMILARITY_FILE)
    except EntryNotFoundError:
        pass  # a model of others; one whose similarity learns nothing; or neither is in an offline cache
    except OSError as error:
        raise WeightsUnavailableError(
            f"what {source.name!r} is compared by could not be fetched ({error})"
        ) from error
    else:
        return folder
    found = try_to_load_from_cache(repository, MANIFEST_FILE)
    return Path(found).parent if isinstance(found, str) else None


def tell_similarity(source: ModelSource, similarity: Similarity) -> Choice:
    """By what a model is compared, and why."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in similarity.values().items())
    reason = "asked for" if source.similarity else "the model's own"
    return Choice(
        subject="similarity", value=similarity.name, reason=f"{reason}; {values}" if values else reason
    )


def _as_trained(folder: Path, manifest: Manifest, dim: int, parameters: Mapping[str, float]) -> Similarity:
    try:
        return similarity_for(manifest.similarity, dim, parameters or manifest.similarity_parameters)
    except CliptuneError as error:
        if manifest.similarity in SIMILARITIES:
            raise
        raise ConflictError(
            f"the model in {str(folder)!r} is compared by {manifest.similarity}, which cannot be had:"
            f" {error.message}"
        ) from error


def _known(manifest: Manifest, name: str) -> dict[str, float]:
    same = name == manifest.similarity or manifest.similarity.endswith(f"/{name}")  # a relative FILE.py:NAME
    return dict(manifest.similarity_parameters) if same else {}


def _take_over(similarity: Similarity, folder: Path, manifest: Manifest) -> None:
    if similarity.sha256 != manifest.similarity_sha256:
        raise ConflictError(
            f"the model in {str(folder)!r} was trained with {similarity.name} as it was then (sha256"
            f" {manifest.similarity_sha256[:12]}, now {similarity.sha256[:12]}): put that file back, or train"
            " a model with the new one"
        )
    path = folder / SIMILARITY_FILE
    wanted = similarity.state_dict()
    if not wanted:
        return
    try:
        similarity.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        why = " ".join(str(error).split())[:300]
        raise InvalidInputError(f"{str(path)!r} does not load as {similarity.name}: {why}") from error
