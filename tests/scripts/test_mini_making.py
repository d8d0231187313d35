"""How the pretrained models are made: the parts that can be proved without a data set or a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from scripts.mini import pictures, towers, trunk, wordnet
from scripts.mini.bag import RESERVED, Bag, begin_as
from scripts.mini.token_rows import TokenRows

FROG = (
    "01642406 05 n 02 frog 0 toad_frog 0 002 @ 01630148 n 0000 ~ 01643094 n 0000 | "
    'tailless amphibian with long hind limbs; "a frog croaked in the pond"'
)


def test_a_text_tower_begins_as_the_weighted_sum_of_its_words() -> None:
    torch.manual_seed(0)
    model = towers.build(towers.MINI).eval()
    width = model.token_embedding.weight.shape[1]
    words_VD = F.normalize(torch.randn(towers.VOCABULARY, 384), dim=-1)
    bag = Bag(words_VD, content=width - RESERVED)
    begin_as(model, bag)
    start, end = towers.VOCABULARY - 2, towers.VOCABULARY - 1
    tokens_BL = torch.tensor([[start, 320, 8240, end, 0, 0], [start, 736, 901, 4321, 518, end]])
    with torch.inference_mode():
        wanted_BD = bag(tokens_BL)
        found_BD = F.normalize(towers.encode_text(model, tokens_BL), dim=-1)
    assert (found_BD * wanted_BD).sum(-1).min() > 0.95


def test_short_tokens_give_what_open_clip_gives_for_the_whole_context() -> None:
    torch.manual_seed(0)
    model = towers.build(towers.VIT).eval()
    tokens_BL = torch.zeros(1, towers.CONTEXT, dtype=torch.long)
    tokens_BL[0, :4] = torch.tensor([towers.VOCABULARY - 2, 320, 8240, towers.VOCABULARY - 1])
    with torch.inference_mode():
        torch.testing.assert_close(
            towers.encode_text(model, tokens_BL[:, :4]), model.encode_text(tokens_BL), atol=1e-5, rtol=1e-4
        )


def test_lists_of_tokens_are_padded_to_a_width() -> None:
    rows = TokenRows.of([[5, 6, 7], [8], [9, 10]])
    assert rows.padded(np.array([2, 0]), 3).tolist() == [[9, 10, 0], [5, 6, 7]]
    assert rows.padded(np.array([1]), 2).tolist() == [[8, 0]]


def test_a_line_of_wordnet_is_read() -> None:
    frog = wordnet.parse("noun", FROG)
    assert frog.lemmas == ("frog", "toad frog")
    assert frog.definition == "tailless amphibian with long hind limbs"
    assert frog.more_general == (1630148,)
    assert frog.visible


def test_weights_that_are_not_lite0_are_refused() -> None:
    with pytest.raises(ValueError, match="the package has 1 tensors"):
        trunk.timm_names({"conv.weight": torch.zeros(3)})


def test_skin_tones_and_flags_of_no_country_are_left_out() -> None:
    assert pictures.captions("noto", "waving-hand-dark-skin-tone", {}) == ()
    assert pictures.captions("flag", "xx-4x3", {"xx-4x3": None}) == ()
    assert pictures.captions("meteocons", "overcast-night-fill", {})[0] == "overcast night"
