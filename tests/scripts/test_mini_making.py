"""How the pretrained models are made: the parts that can be proved without a data set or a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from scripts.mini import general, pictures, towers, trunk, wordnet
from scripts.mini.bag import RESERVED, Bag, begin_as
from scripts.mini.classes import ImageClass
from scripts.mini.head import new_head
from scripts.mini.inversion import InversionPlan, invert
from scripts.mini.meanings import Meanings
from scripts.mini.photos import PhotoFeatures
from scripts.mini.token_rows import TokenRows

FROG = (
    "01642406 05 n 02 frog 0 toad_frog 0 002 @ 01630148 n 0000 ~ 01643094 n 0000 | "
    'tailless amphibian with long hind limbs; "a frog croaked in the pond"'
)


def test_a_text_tower_begins_as_the_weighted_sum_of_its_words() -> None:
    torch.manual_seed(0)
    model = towers.build(towers.MINI).eval()
    width = model.token_embedding.weight.shape[1]
    words_VD = towers.widened(F.normalize(torch.randn(towers.VOCABULARY, 384), dim=-1))
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


def test_a_class_goes_by_common_names_from_above_it() -> None:
    lines = (
        "00000010 05 n 01 sorrel 0 001 @ 00000020 n 0000 | a horse of a brownish orange colour",
        "00000011 20 n 01 sorrel 0 001 @ 00000040 n 0000 | any plant of the genus Rumex",
        "00000020 05 n 02 horse 0 Equus_caballus 0 001 @ 00000030 n 0000 | solid-hoofed mammal",
        "00000030 05 n 01 equine 0 000 | hoofed mammals having slender legs",
        "00000040 20 n 01 herb 0 000 | a plant lacking a permanent woody stem",
    )
    synsets = [wordnet.parse("noun", line) for line in lines]
    sorrel = ImageClass(lemmas=("sorrel",), definition="a horse of a brownish orange to light brown colour")
    (names,) = general.general_names(synsets, [sorrel], common={"horse", "herb"})
    assert names == ("a horse",)
    with pytest.raises(ValueError, match="WordNet has none of hoopoe"):
        general.general_names(synsets, [ImageClass(lemmas=("hoopoe",), definition="")], common=set())


def test_a_class_without_a_general_name_keeps_its_own() -> None:
    known = Meanings(
        all_MD=torch.eye(2),
        of_picture_N4=torch.zeros(0, 4, dtype=torch.long),
        of_class_KD=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        general_GD=torch.tensor([[0.6, 0.8]]),
        general_share_KG=torch.tensor([[1.0], [0.0]]),
    )
    table_KD = known.class_table(1.0, torch.Generator().manual_seed(0))
    assert torch.equal(table_KD, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    assert torch.equal(known.class_table(0.0, torch.Generator().manual_seed(0)), known.of_class_KD)


@pytest.fixture(scope="module")
def classifier() -> Any:
    torch.manual_seed(0)
    return timm.create_model(trunk.NAME, pretrained=False).eval().requires_grad_(False)


def test_the_head_begins_as_the_classifiers_opinion_in_words(classifier: Any) -> None:
    pictures_NF = torch.rand(64, trunk.FEATURES)
    photos = PhotoFeatures.of(classifier, pictures_NF)
    # Rows as far apart as a trained classifier's.
    photos = replace(photos, weight_KF=torch.eye(trunk.CLASSES, trunk.FEATURES), bias_K=torch.zeros(1000))
    class_KD = towers.widened(F.normalize(torch.randn(trunk.CLASSES, 384), dim=-1))
    head = new_head(photos, class_KD)
    features_BF = torch.zeros(3, trunk.FEATURES)
    features_BF[range(3), [7, 300, 999]] = 40.0
    with torch.inference_mode():
        found_BD = F.normalize(head(features_BF), dim=-1)
    assert (found_BD @ class_KD.T).argmax(-1).tolist() == [7, 300, 999]


def test_an_inverted_image_is_white_outside_and_takes_the_classifiers_side(classifier: Any) -> None:
    def sureness(plan: InversionPlan) -> tuple[torch.Tensor, float]:
        images, classes = invert(classifier, plan, "cpu")
        with torch.inference_mode():
            logits = classifier(images * 2 - 1)
        return images, float(logits.softmax(-1).gather(1, classes[:, None]).mean())

    images, before = sureness(InversionPlan(images=2, batch=2, steps=0))
    _, after = sureness(InversionPlan(images=2, batch=2, steps=4))
    assert images.shape == (2, 3, trunk.IMAGE_SIZE, trunk.IMAGE_SIZE)
    assert float(images[:, :, 0, 0].min()) > 0.99
    assert after > before
