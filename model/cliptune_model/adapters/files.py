"""An adapter's files, and adapters put over their base.

Enters: a `Clip` that carries an adapter, or a folder. Leaves: the folder's files, or a `Clip`. Called by
export and load (`exported`), by the command `cliptune adapters`, and by the engine.

    cliptune_adapter.safetensors   the adapter's weights, and the logit scale and bias trained with it
    cliptune_adapter.json          kind and rank, the layers, and the base: its source and its weights' digest

Nothing is put over a base whose weights are others than those that the adapter was trained over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from cliptune.errors import (
    AdapterBaseError,
    ConflictError,
    InvalidInputError,
    ModelDamagedError,
    ModelNotFoundError,
)
from cliptune_model.adapters.attach import SCALES, adapter_tensors, base_state, load_adapter, put_in
from cliptune_model.adapters.attached import Attached, Layer
from cliptune_model.adapters.config import AdapterConfig
from cliptune_model.adapters.identity import BaseIdentity, digest
from cliptune_model.adapters.sharing import SharedBase
from cliptune_model.chosen_similarity import build_similarity
from cliptune_model.clip import Clip, build
from cliptune_model.manifest import MANIFEST_FILE, read_manifest
from cliptune_model.source import ADAPTER_FILE, CONFIG_FILE, LOCAL_DIR, ModelSource

TENSORS_FILE: Final = "cliptune_adapter.safetensors"
# In the folder of a merged model: the adapter by itself.
INSIDE: Final = "adapter"
FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterDescription:
    """What `cliptune_adapter.json` says.

    Attributes:
        attached: the adapter, its base and its layers.
        sha256: of the file of its weights.
    """

    attached: Attached
    sha256: str


def holds_adapter(folder: Path) -> bool:
    """Whether the folder is an adapter's."""
    return (folder / ADAPTER_FILE).is_file()


def write_adapter(clip: Clip, folder: Path) -> None:
    """Writes the two files of `clip`'s adapter; `InvalidInputError` where it has none."""
    attached = clip.adapter
    if attached is None:
        raise InvalidInputError(f"{clip.architecture} carries no adapter")
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in adapter_tensors(clip.model).items()
    }
    save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
    described = {
        "format": FORMAT,
        "config": asdict(attached.config),
        "base": attached.base.to_values(),
        "layers": [asdict(layer) for layer in attached.layers],
        "sha256": hashlib.sha256((folder / TENSORS_FILE).read_bytes()).hexdigest(),
    }
    (folder / ADAPTER_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def describe_adapter(folder: Path) -> AdapterDescription:
    """What the folder says of its adapter.

    Raises:
        ModelNotFoundError: no adapter there.
        ConflictError: a merged model: its adapter is in its weights already.
        InvalidInputError: damaged, or of a newer format.
    """
    path = Path(folder) / ADAPTER_FILE
    if not path.is_file():
        if holds_adapter(Path(folder) / INSIDE):
            raise ConflictError(
                f"{str(folder)!r} is a whole model, which has its adapter in its weights already; the adapter"
                f" by itself is {str(Path(folder) / INSIDE)!r}"
            )
        raise ModelNotFoundError(f"no adapter at {str(folder)!r}: {ADAPTER_FILE} is missing", path=folder)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if int(values["format"]) > FORMAT:
            raise InvalidInputError(
                f"the adapter has format {values['format']}; this cliptune reads up to {FORMAT}: upgrade it"
            )
        config = dict(values["config"])
        return AdapterDescription(
            attached=Attached(
                config=AdapterConfig(**config | {"targets": tuple(config["targets"])}),
                base=BaseIdentity.from_values(values["base"]),
                layers=tuple(_layer(one) for one in values["layers"]),
            ),
            sha256=str(values["sha256"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"{str(path)!r} is damaged: {error!r}") from error


def load_adapted(
    folder: Path,
    *,
    device: str = "cpu",
    base: ModelSource | None = None,
    loaded: Iterable[SharedBase] = (),
) -> Clip:
    """The adapter of a folder over its base, in evaluation mode; what is trained of it is the adapter alone.

    Args:
        folder: an adapter's.
        device: of the base, where it is not loaded yet.
        base: where the base is now; None: where it was.
        loaded: models that are in memory. Their weights are shared, where they are the base's.

    Raises:
        AdapterBaseError: the base has other weights; both are named.
        ConflictError: that base has this adapter in its weights already.
        ModelNotFoundError: no adapter there, or no base any more. Errors of `build`.
        InvalidInputError, ModelDamagedError: the adapter is damaged.
    """
    folder = Path(folder)
    described = describe_adapter(folder)
    attached = described.attached
    tensors = _read(folder, described)
    clip = _base(folder, described, device, base, loaded)
    try:
        put_in(clip.model, attached.layers, attached.config)
    except (AttributeError, KeyError) as error:
        raise InvalidInputError(f"the adapter in {str(folder)!r} does not fit its base: {error}") from error
    _check_tensors(folder, clip, tensors)
    load_adapter(clip.model, tensors)
    clip.model.requires_grad_(False).eval()
    for tensor in adapter_tensors(clip.model).values():
        tensor.requires_grad_(True)
    return _as_told(folder, replace(clip, adapter=attached))


def _base(
    folder: Path,
    described: AdapterDescription,
    device: str,
    base: ModelSource | None,
    loaded: Iterable[SharedBase],
) -> Clip:
    wanted = described.attached.base
    if base is None:
        for shared in loaded:
            if shared.sha256 == wanted.sha256:
                return shared.copy()
    source = base or wanted.source
    try:
        clip = build(source, device=device, seed=wanted.seed)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"the base of the adapter in {str(folder)!r} is not there any more: {error.message}",
            **error.metadata,
        ) from error
    found = BaseIdentity(source=source, seed=wanted.seed, sha256=digest(base_state(clip.model)))
    if found.sha256 != wanted.sha256:
        inside = Path(source.name.removeprefix(LOCAL_DIR)).expanduser() / INSIDE
        merged = source.name.startswith(LOCAL_DIR) and holds_adapter(inside)
        if merged and describe_adapter(inside).sha256 == described.sha256:
            raise ConflictError(f"{source.name} has the adapter in {str(folder)!r} in its weights already")
        raise AdapterBaseError(
            f"the adapter in {str(folder)!r} belongs to {wanted.told}, not to {found.told}",
            wanted=wanted.sha256,
            found=found.sha256,
        )
    return clip


def _as_told(folder: Path, clip: Clip) -> Clip:
    """With the similarity, the image size and the configuration that lie beside the adapter."""
    if not (folder / MANIFEST_FILE).is_file():
        return clip
    similarity = build_similarity(ModelSource(name=f"{LOCAL_DIR}{folder}"), clip.embedding_dim)
    try:
        model_config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["model_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{str(folder / CONFIG_FILE)!r} is damaged: {error!r}") from error
    clip = replace(clip, model_config=model_config, similarity=similarity.to(clip.device))
    return clip.at(read_manifest(folder).image_size)


def _read(folder: Path, described: AdapterDescription) -> dict[str, Tensor]:
    path = folder / TENSORS_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelDamagedError(f"{str(path)!r} is missing", file=path) from error
    if hashlib.sha256(content).hexdigest() != described.sha256:
        raise ModelDamagedError(
            f"{str(path)!r} is not the file that was written with {ADAPTER_FILE}", file=path
        )
    try:
        return load(content)
    except (SafetensorError, ValueError) as error:
        raise InvalidInputError(f"{str(path)!r} holds no tensors: {error}") from error


def _check_tensors(folder: Path, clip: Clip, tensors: dict[str, Tensor]) -> None:
    wanted = adapter_tensors(clip.model)
    lost = sorted(wanted.keys() - tensors.keys() - set(SCALES))
    strange = sorted(tensors.keys() - wanted.keys() - set(SCALES))
    other = [name for name in tensors.keys() & wanted.keys() if tensors[name].shape != wanted[name].shape]
    if lost or strange or other:
        name = (lost + strange + other)[0]
        raise InvalidInputError(f"the adapter in {str(folder)!r} does not fit its base: {name}")


def _layer(values: dict[str, Any]) -> Layer:
    return Layer(
        name=str(values["name"]),
        targets=tuple(map(str, values["targets"])),
        slices={str(name): (int(first), int(last)) for name, (first, last) in values["slices"].items()},
        ends=bool(values["ends"]),
    )
