"""Where a CLIP comes from, and what open_clip must be told to build it.

Enters: the two strings of a job's model spec. Leaves: a `Recipe` for `cliptune_model.clip.build`, its weights
already on this disk, or an error that says what is wrong and what would be right. Weights of a hub are
fetched by open_clip's own code, into its own caches.
"""

from __future__ import annotations

import difflib
import json
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import open_clip
from huggingface_hub import constants
from open_clip import factory as open_clip_factory
from open_clip import pretrained as open_clip_pretrained

from cliptune.embedded import check_weights, embedded_folder, is_embedded
from cliptune.errors import (
    ConflictError,
    ContextLengthError,
    InvalidInputError,
    ModelNotFoundError,
    WeightsUnavailableError,
)

LOCAL_DIR: Final = "local-dir:"
HF_HUB: Final = "hf-hub:"
CONFIG_FILE: Final = "open_clip_config.json"
ADAPTER_FILE: Final = "cliptune_adapter.json"
CUSTOM: Final = "custom"
MAX_CONTEXT: Final = 248  # tokens of a text: 4 times what CLIP has, less the positions that are kept

# Configurations in open_clip's form that are shipped with this package.
CONFIG_FOLDER: Final = Path(__file__).parent / "configs"

OFFLINE_WAYS: Final = (
    "Offline ways: name a model folder in open_clip's format (name = 'local-dir:PATH'); or a weights file on "
    "this disk (pretrained = '/path/to/weights.safetensors'); or copy the Hugging Face cache "
    "(~/.cache/huggingface, or where HF_HOME points) from a machine that has them, and set HF_HUB_OFFLINE=1"
)

HUB_PROBE_TIMEOUT_S: Final = 10.0

_register_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """The model that training or serving starts from.

    Attributes:
        name: an open_clip architecture ("ViT-B-32"), a shipped configuration ("cliptune-tiny-vit"),
            "cliptune-mini" (pretrained, a package of its own),
            "hf-hub:ORG/REPO" or "local-dir:PATH".
        pretrained: open_clip's tag of weights or a weights file, for an architecture. Empty: random weights.
        context_length: tokens of a text, more than the model has. None: the model's own.
        patch_size: side of a patch in pixels, for open_clip's ViTs. None: the model's own.
        similarity: how alike embeddings are. Empty: the model's own.
        similarity_parameters: of it, by name.

    Raises:
        InvalidInputError: an empty name, or `pretrained` beside a source that brings its own weights.
        ContextLengthError: more tokens than any text tower can be stretched to, or none.
    """

    name: str
    pretrained: str = ""
    context_length: int | None = None
    patch_size: int | None = None
    similarity: str = ""
    similarity_parameters: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise InvalidInputError("the model's name is empty: try 'cliptune-mini' or 'ViT-B-32'")
        if not self.name.removeprefix(LOCAL_DIR).removeprefix(HF_HUB):
            raise InvalidInputError(f"nothing follows {self.name!r}")
        if self.pretrained and (self.name.startswith((LOCAL_DIR, HF_HUB)) or is_embedded(self.name)):
            raise InvalidInputError(
                f"pretrained = {self.pretrained!r} beside {self.name!r}: that source brings its own weights"
            )
        if self.context_length is not None and not 1 <= self.context_length <= MAX_CONTEXT:
            raise ContextLengthError(
                f"model.context_length is {self.context_length}; allowed: 1 to {MAX_CONTEXT}",
                wanted=self.context_length,
                limit=MAX_CONTEXT,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What open_clip is told, and what is known before it starts."""

    name: str
    pretrained: str | None
    architecture: str
    model_config: dict[str, Any] = field(repr=False)
    pretrained_weights: bool
    force_quick_gelu: bool = False


def register_shipped_configs() -> None:
    """Make the shipped configurations known to open_clip in this process, once."""
    with _register_lock:
        known = set(open_clip.list_models())
        if any(path.stem not in known for path in CONFIG_FOLDER.glob("*.json")):
            open_clip.add_model_config(CONFIG_FOLDER)


def resolve(source: ModelSource) -> Recipe:
    """Find the configuration and fetch the weights.

    Raises:
        InvalidInputError: unknown architecture or tag, or a file that is no model.
        ModelNotFoundError: the folder of "local-dir:" does not exist.
        WeightsUnavailableError: the hub cannot be reached or does not have it; no cliptune-mini here.
        ModelDamagedError: the weights are not those that the model was released with.
        ConflictError: the architecture needs a package that is not installed.
    """
    register_shipped_configs()
    if source.name.startswith(LOCAL_DIR):
        recipe = _from_folder(Path(source.name.removeprefix(LOCAL_DIR)).expanduser(), source.name)
    elif source.name.startswith(HF_HUB):
        recipe = _from_hub(source)
    elif is_embedded(source.name):
        recipe = _from_folder(embedded_folder(source.name), source.name)
    else:
        recipe = _from_architecture(source)
    _check_packages(recipe)
    return recipe


def architecture_of(model_config: dict[str, Any]) -> str:
    """open_clip's name of a configuration, or "custom"."""
    wanted = json.dumps(model_config, sort_keys=True)
    for name in open_clip.list_models():
        if json.dumps(open_clip.get_model_config(name), sort_keys=True) == wanted:
            return str(name)
    return CUSTOM


def _from_folder(folder: Path, name: str) -> Recipe:
    if not folder.is_dir():
        raise ModelNotFoundError(f"no folder {str(folder)!r} (from {name!r})", path=folder)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InvalidInputError(f"{str(folder)!r} has no {CONFIG_FILE}: it is no model in open_clip's format")
    try:
        model_config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{str(path)!r} is not a configuration of open_clip: {error!r}") from error
    check_weights(folder)
    if (folder / ADAPTER_FILE).is_file():
        raise InvalidInputError(
            f"{str(folder)!r} is an adapter, not a whole model: `cliptune adapters merge` makes one of it"
        )
    weights = [file for suffix in ("safetensors", "bin", "pth") for file in folder.glob(f"*.{suffix}")]
    if not weights:
        raise InvalidInputError(f"{str(folder)!r} has no weights (*.safetensors, *.bin or *.pth)")
    return Recipe(
        name=f"{LOCAL_DIR}{folder}",
        pretrained=None,
        architecture=architecture_of(model_config),
        model_config=model_config,
        pretrained_weights=True,
    )


def _from_hub(source: ModelSource) -> Recipe:
    repository = source.name.removeprefix(HF_HUB)
    _check_hub(repository)
    try:
        config = open_clip_pretrained.download_pretrained_from_hf(repository, filename=CONFIG_FILE)
        open_clip_pretrained.download_pretrained_from_hf(repository)
    except Exception as error:  # the hub's client has many; each means that the weights are not here
        raise _unavailable(source.name, error) from error
    try:
        model_config = json.loads(Path(config).read_text(encoding="utf-8"))["model_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{CONFIG_FILE} of {source.name!r} is damaged: {error!r}") from error
    return Recipe(
        name=source.name,
        pretrained=None,
        architecture=architecture_of(model_config),
        model_config=model_config,
        pretrained_weights=True,
    )


def _from_architecture(source: ModelSource) -> Recipe:
    name = source.name.replace("/", "-")  # "ViT-B/32" is open_clip's older spelling
    model_config = open_clip.get_model_config(name)
    if model_config is None:
        raise _unknown_architecture(source.name)
    force_quick_gelu = False
    pretrained: str | None = None
    if source.pretrained:
        tag_config = open_clip_pretrained.get_pretrained_cfg(name, source.pretrained)
        path = Path(source.pretrained).expanduser()
        if tag_config:
            pretrained = source.pretrained
            # The activation belongs to the weights: another one computes nonsense without an error.
            force_quick_gelu = bool(tag_config.get("quick_gelu")) and not model_config.get("quick_gelu")
            if tag_config.get("hf_hub"):
                _check_hub(str(tag_config["hf_hub"]).rpartition("/")[0])
            try:
                open_clip_pretrained.download_pretrained(tag_config)
            except Exception as error:  # as above
                raise _unavailable(f"{name} {source.pretrained}", error) from error
        elif path.is_file():
            pretrained = str(path)
        else:
            raise _unknown_weights(name, source.pretrained)
    if force_quick_gelu:
        model_config["quick_gelu"] = True
    return Recipe(
        name=name,
        pretrained=pretrained,
        architecture=name,
        model_config=model_config,
        pretrained_weights=pretrained is not None,
        force_quick_gelu=force_quick_gelu,
    )


def _check_hub(repository: str) -> None:
    """Fail at once without a network: the hub's client would try again and again for a minute."""
    cached = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    if constants.HF_HUB_OFFLINE or any(cached.glob("*/*")):
        return
    try:
        probe = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(probe, timeout=HUB_PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answers
    except OSError as error:
        reason = getattr(error, "reason", error)
        # Python's own certificates may be missing; the hub's client brings some and may still get through.
        if not isinstance(reason, ssl.SSLError):
            raise _unavailable(repository, error) from error


def _check_packages(recipe: Recipe) -> None:
    text = recipe.model_config.get("text_cfg", {})
    if ("hf_model_name" in text or "hf_tokenizer_name" in text) and find_spec("transformers") is None:
        raise ConflictError(f"{recipe.name!r} needs Hugging Face's text tools: pip install transformers")


def _unknown_architecture(name: str) -> InvalidInputError:
    known: list[str] = open_clip.list_models()
    by_case = {candidate.lower(): candidate for candidate in known}
    close = [by_case[match] for match in difflib.get_close_matches(name.lower(), by_case, n=5, cutoff=0.5)]
    shipped = sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))
    hint = f"did you mean {', '.join(close)}?" if close else f"shipped: {', '.join(shipped)}"
    return InvalidInputError(
        f"unknown model {name!r}: {hint} All names: open_clip.list_models(); a folder is 'local-dir:PATH'",
        allowed=", ".join(close or shipped),
    )


def _unknown_weights(name: str, pretrained: str) -> InvalidInputError:
    tags = open_clip_factory.list_pretrained_tags_by_model(name)
    allowed = ", ".join(tags) if tags else "none: this architecture has no published weights"
    return InvalidInputError(
        f"pretrained = {pretrained!r} is neither a file on this disk nor a tag of {name}; tags: {allowed}",
        allowed=", ".join(tags),
    )


def _unavailable(what: str, error: Exception) -> WeightsUnavailableError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return WeightsUnavailableError(f"the weights of {what!r} could not be fetched ({reason}). {OFFLINE_WAYS}")
