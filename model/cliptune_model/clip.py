"""A loaded CLIP: the two towers, and what surrounds them (transform, tokeniser, sizes).

Enters: a `ModelSource`. Leaves: a `Clip`, called by the trainer (with gradients) and by the engine (without).
The model is open_clip's own, so whatever is computed here equals plain open_clip.

Shape suffixes: B batch, C channels, H height, W width, L tokens, D embedding.
"""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, cast

import open_clip
import PIL.Image
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors import SafetensorError
from torch import Tensor, nn

from cliptune.errors import InvalidInputError, WeightsUnavailableError
from cliptune_model.chosen_similarity import build_similarity
from cliptune_model.similarity import Similarity
from cliptune_model.source import CUSTOM, OFFLINE_WAYS, ModelSource, Recipe, resolve
from cliptune_model.tokens import check_text, without_waste
from cliptune_model.towers.context import extend_context
from cliptune_model.towers.image_tower import encode_image
from cliptune_model.towers.patch_size import change_patch_size
from cliptune_model.towers.text_tower import encode_text
from cliptune_model.towers.trimming import TextTrim

if TYPE_CHECKING:
    from cliptune_model.adapters.attached import Attached

# What open_clip, torch and safetensors raise on configurations and weights that are damaged or do not fit.
_BAD_WEIGHTS: Final = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    EOFError,
    StopIteration,  # a file without a single tensor
    SafetensorError,
)

# A tokeniser remembers words and belongs to one thread at a time; the loader's and the step's share one.
_tokenising = threading.Lock()


@dataclass(kw_only=True, slots=True)
class Clip:
    """A CLIP model with everything needed to use it. `build` makes it; the model may be trained in place.

    Attributes:
        model: open_clip's CLIP or CustomTextCLIP with fp32 weights, in evaluation mode when built.
        model_config: open_clip's form, as `open_clip_config.json` holds it under "model_cfg".
        preprocess_config: open_clip's form, under "preprocess_cfg".
        architecture: open_clip's name, or "custom".
        context_length: tokens of a text, L.
        embedding_dim: D.
        image_size: (height, width) in pixels that images are brought to; `at` gives another.
        pretrained: the weights came from a source; otherwise they are random.
        similarity: how alike embeddings are, in loss, evaluation and serving; on the model's device. What it
            learns is trained, kept and exported beside the model, which stays open_clip's own.
        adapter: what the model carries beside its own weights; None: nothing.
    """

    model: nn.Module
    model_config: dict[str, Any] = field(repr=False)
    preprocess_config: dict[str, Any] = field(repr=False)
    architecture: str
    context_length: int
    embedding_dim: int
    image_size: tuple[int, int]
    pretrained: bool
    transform: Callable[[PIL.Image.Image], Tensor] = field(repr=False)
    tokenizer: Callable[[list[str]], Tensor] = field(repr=False)
    similarity: Similarity
    adapter: Attached | None = None

    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] preprocessed → [B, D] fp32, not normalised. H, W: any multiples of the patch."""
        return encode_image(self.model, images_BCHW).float()

    def at(self, size: tuple[int, int]) -> Clip:
        """The same model, weights shared, as one that sees images of (height, width) pixels."""
        if size == self.image_size:
            return self
        config = self.preprocess_config | {"size": size}
        return replace(
            self,
            image_size=size,
            preprocess_config=config,
            transform=image_transform_v2(PreprocessCfg(**config), is_train=False),
        )

    def encode_texts(self, tokens_BL: Tensor) -> Tensor:
        """[B, L] int64 → [B, D] fp32, not normalised. L: the context length, or what `trim` left of it."""
        return encode_text(self.model, tokens_BL).float()

    @property
    def logit_scale(self) -> float:
        """What similarities are multiplied by before a softmax: exp of the learned parameter."""
        return float(cast(Tensor, self.model.logit_scale).detach().float().exp())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts → [B, L] int64 on the CPU; longer texts are cut as open_clip cuts them.

        Raises:
            TextError: a text is empty or too long.
        """
        for text in texts:
            check_text(text)
        if not texts:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        with _tokenising:
            return self.tokenizer(list(texts))

    def trim(self, tokens_BL: Tensor) -> Tensor:
        """Tokens on the CPU, cut to one of a few lengths where `encode_texts` gives the same for them."""
        return TextTrim.of(self.model, self.context_length)(tokens_BL)

    def tokenize_trimmed(self, texts: Sequence[str]) -> Tensor:
        """As `tokenize`, trimmed: the form to encode a batch at once."""
        return self.trim(self.tokenize(texts))

    def count_tokens(self, tokens_L: Tensor) -> int:
        """Of a text, those of start and end included, padding not."""
        pad_id = getattr(getattr(self.tokenizer, "tokenizer", None), "pad_token_id", None)
        if pad_id is None:  # open_clip's own: the end of the text has the largest number, and 0 pads
            return int(tokens_L.argmax()) + 1
        return int((tokens_L != pad_id).sum())

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """open_clip's evaluation transform: any image → [3, H, W] float32 on the CPU."""
        return self.transform(image)


def build(source: ModelSource, *, device: str = "cpu", seed: int = 0) -> Clip:
    """Build a CLIP and load its weights, in evaluation mode.

    Random weights depend on `seed` alone, whatever the device; the process's random state is left as it was.

    Raises:
        InvalidInputError: unknown architecture or tag, or weights that are damaged or do not fit.
        ModelNotFoundError: the folder of "local-dir:" does not exist.
        WeightsUnavailableError: the hub cannot be reached; the message names the offline ways.
        ModelDamagedError: the weights are not those that the model was released with.
        ConflictError: the architecture needs a package that is not installed.
        ContextLengthError: the text tower cannot be made to take `source.context_length` tokens.
        SpecError: the similarity or a parameter of it is unknown.
    """
    recipe = resolve(source)
    with _no_root_handler(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _create(recipe)
        model_config, architecture = recipe.model_config, recipe.architecture
        if source.context_length is not None:
            model_config = extend_context(model, model_config, source.context_length, name=source.name)
            architecture = architecture if model_config is recipe.model_config else CUSTOM
        if source.patch_size is not None:
            before = model_config
            model_config = change_patch_size(model, model_config, source.patch_size, name=source.name)
            architecture = architecture if model_config is before else CUSTOM
        context_length = int(
            model_config["text_cfg"].get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
        )
        try:
            tokenizer = open_clip.get_tokenizer(recipe.name, context_length=context_length)
        except OSError as error:
            raise WeightsUnavailableError(
                f"the tokeniser of {recipe.name!r} could not be fetched ({error}). {OFFLINE_WAYS}"
            ) from error
    preprocess_config = deepcopy(model.visual.preprocess_cfg)
    return Clip(
        model=model.to(device).eval(),
        model_config=model_config,
        preprocess_config=preprocess_config,
        architecture=architecture,
        context_length=context_length,
        embedding_dim=int(model_config["embed_dim"]),
        image_size=_pair(model.visual.image_size),
        pretrained=recipe.pretrained_weights,
        transform=image_transform_v2(PreprocessCfg(**preprocess_config), is_train=False),
        tokenizer=without_waste(tokenizer),
        similarity=build_similarity(source, int(model_config["embed_dim"])).to(device),
    )


def _create(recipe: Recipe) -> Any:
    try:
        return open_clip.create_model(
            recipe.name,
            recipe.pretrained,
            force_quick_gelu=recipe.force_quick_gelu,
            pretrained_text=False,  # "random" means random, also for text towers that a hub has weights for
            require_pretrained=recipe.pretrained_weights,
            weights_only=True,
        )
    except pickle.UnpicklingError as error:
        raise InvalidInputError(
            f"the weights of {recipe.pretrained or recipe.name!r} are damaged, or hold more than tensors: "
            "that may run code and is not loaded; convert them to safetensors"
        ) from error
    except _BAD_WEIGHTS as error:
        what = recipe.pretrained or recipe.name
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = " ".join(line.strip() for line in lines[:3])[:500]
        raise InvalidInputError(f"{what!r} does not load as {recipe.architecture}: {why}") from error


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


@contextmanager
def _no_root_handler() -> Iterator[None]:
    """open_clip logs through the root logger, which would install a handler where the program has none."""
    root = logging.getLogger()
    if root.handlers:
        yield
        return
    silence = logging.NullHandler()
    root.addHandler(silence)
    try:
        yield
    finally:
        root.removeHandler(silence)
