from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cliptune_model.clip import Clip
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.hard_captions import HardCaptions
from cliptune_trainer.data.labels import Labels
from cliptune_trainer.data.loading.loader import Loader
from cliptune_trainer.data.table import Pair
from tests.trainer.batches import same

CAPTION = "A red square left of the blue circle"


def drawn(caption: str, count: int = 200) -> set[str | None]:
    hard = HardCaptions({}, seed=3)
    return {hard.draw(caption, epoch, row) for epoch in range(2) for row in range(count // 2)}


def test_a_wrong_caption_swaps_two_content_words_or_turns_one_into_its_opposite() -> None:
    found = drawn(CAPTION)
    assert "A blue square left of the red circle" in found
    assert "A red circle left of the blue square" in found
    assert "A red square right of the blue circle" in found
    words = sorted(CAPTION.lower().split())
    for text in found:
        assert text is not None
        changed = sorted(text.lower().split())
        assert text != CAPTION
        assert changed == words or "right" in changed
        assert "the" in text.split()  # a word that says nothing stays where it is
    assert not any(text is None for text in found)


def test_a_capital_stays_where_the_sentence_begins_and_abbreviations_keep_theirs() -> None:
    assert drawn("Crack beside MRI") == {"MRI beside crack"}
    assert drawn("Benign, without margins") >= {"Malignant, without margins", "Benign, with margins"}


def test_a_caption_of_one_content_word_cannot_be_made_wrong() -> None:
    hard = HardCaptions({}, seed=0)
    for caption in ("a photo of a cat", "the", "cat cat", ""):
        assert not hard.possible(caption)
        assert hard.draw(caption, 0, 0) is None
    assert hard.possible("a photo of a small cat")
    assert hard.possible("a malignant")


def test_what_is_drawn_depends_on_seed_epoch_and_row_alone() -> None:
    one, other, third = (HardCaptions({}, seed=seed) for seed in (1, 1, 2))
    draws = [
        [hard.draw(CAPTION, epoch, row) for epoch in (1, 0) for row in range(20)] for hard in (one, third)
    ]
    again = [other.draw(CAPTION, epoch, row) for epoch in (0, 1) for row in range(20)]
    assert again[20:] + again[:20] == draws[0]
    assert draws[0] != draws[1]
    assert draws[0][:20] != draws[0][20:]


def rows(folder: Path) -> Pairs:
    captions = ["a red square", "a red circle", "a circle red", "cat"]
    pairs = []
    for row, caption in enumerate(captions * 3):
        path = folder / f"{row}.png"
        pixels = np.full((8, 8, 3), 20 * row, dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        labels = (("square",), ("circle", "red"), ("circle",), ())[row % 4]
        pairs.append(Pair(row=row, image=path, reference=path.name, caption=caption, labels=labels))
    return Pairs(pairs)


def test_batches_bring_labels_and_wrong_captions_where_the_loss_needs_them(
    clip: Clip, tmp_path: Path
) -> None:
    pairs = rows(tmp_path)
    needs = {"labels", "negative_captions"}
    with Loader(pairs, clip, batch_size=6, seed=5, needs=needs) as loader:
        batches = list(loader.batches(0, 4))
    with Loader(pairs, clip, batch_size=6, seed=5, needs=needs) as loader:
        assert all(same(*both) for both in zip(batches[3:], loader.batches(3, 4), strict=True))
    with Loader(pairs, clip, batch_size=6, seed=5) as loader:
        plain = next(loader.batches(0, 1))
    assert plain.labels_BC is None
    assert plain.negative_tokens_BL is None
    labels, hard = Labels.of(pairs), HardCaptions.of(pairs, 5)
    assert labels.names == ("circle", "red", "square")
    known = dict(zip((pair.caption for pair in pairs.pairs), pairs.caption_ids.tolist(), strict=True))
    for batch in batches:
        assert batch.labels_BC is not None
        assert batch.negative_ids_B is not None
        assert batch.negative_tokens_BL is not None
        assert batch.negative_tokens_BL.shape == batch.tokens_BL.shape
        places = batch.image_ids_B.tolist()  # every row has an image of its own
        assert torch.equal(batch.labels_BC, labels.multi_hot(places))
        for at, place in enumerate(places):
            wrong = hard.draw(pairs.pairs[place].caption, batch.epoch, place)
            tokens = clip.tokenize([wrong or pairs.pairs[place].caption])[0]
            found = batch.negative_tokens_BL[at]
            assert torch.equal(found, tokens[: len(found)])
            expected = -2 if wrong is None else known.get(wrong, -1)
            assert int(batch.negative_ids_B[at]) == expected
    # "a red circle" with its words swapped is another row's caption, "cat" has no wrong form.
    ids = torch.cat([batch.negative_ids_B for batch in batches if batch.negative_ids_B is not None])
    assert known["a circle red"] in ids.tolist()
    assert -2 in ids.tolist()
