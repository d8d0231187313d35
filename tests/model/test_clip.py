"""A Clip against plain open_clip, which is the reference for every vector."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from dataclasses import replace

import open_clip
import PIL.Image
import pytest
import torch

from cliptune.errors import TextError
from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, manifest_of
from cliptune_model.pixels import decode_image
from cliptune_model.source import ModelSource
from tests.model.conftest import encoded, photo

TEXTS = ["a defective solar cell", "a photo of a cat, sitting; très joli!", "word " * 200]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_the_same_bytes_give_the_vectors_of_plain_open_clip_bit_for_bit(
    clip: Clip, tmp_path_factory: pytest.TempPathFactory, kind: str, mode: str
) -> None:
    folder = tmp_path_factory.mktemp("model") / "export"
    export_model(clip, folder, manifest_of(clip))
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    data = encoded(photo().convert(mode), kind)

    theirs_image = transform(PIL.Image.open(io.BytesIO(data)))
    ours_image = clip.preprocess(decode_image(data))
    assert torch.equal(ours_image, theirs_image)
    with torch.inference_mode():
        assert torch.equal(clip.encode_images(ours_image[None]), model.encode_image(theirs_image[None]))
        assert torch.equal(clip.encode_texts(clip.tokenize(TEXTS)), model.encode_text(tokenizer(TEXTS)))
    assert clip.logit_scale == float(model.logit_scale.detach().exp())


def test_training_mode_gives_the_vectors_of_evaluation_within_1e_5(clip: Clip) -> None:
    images = torch.stack([clip.preprocess(photo(seed=seed)) for seed in range(3)])
    tokens = clip.tokenize(TEXTS)
    with torch.inference_mode():
        image_eval, text_eval = clip.encode_images(images), clip.encode_texts(tokens)
    trained = build(ModelSource(name="cliptune-test-vit"), seed=3)
    trained.model.train()
    assert torch.allclose(trained.encode_images(images), image_eval, rtol=0, atol=1e-5)
    assert torch.allclose(trained.encode_texts(tokens), text_eval, rtol=0, atol=1e-5)


def test_embeddings_are_fp32_and_not_normalised_also_under_autocast(clip: Clip) -> None:
    images = torch.stack([clip.preprocess(photo())])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = clip.encode_images(images)
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (1, clip.embedding_dim)
    assert not torch.allclose(embeddings.norm(dim=-1), torch.ones(1), atol=1e-2)


def test_towers_that_normalise_by_default_are_told_not_to() -> None:
    config = open_clip.get_model_config("coca_base")
    config |= {"embed_dim": 32}
    config["vision_cfg"] |= {"image_size": 32, "width": 32, "layers": 1, "head_width": 16, "patch_size": 16}
    config["text_cfg"] |= {"width": 32, "layers": 1, "heads": 2, "context_length": 16}
    config["multimodal_cfg"] |= {"width": 32, "layers": 1, "heads": 2, "context_length": 16}
    config.pop("custom_text", None)
    coca = open_clip.CoCa(**config).eval()
    source = build(ModelSource(name="cliptune-test-vit"))
    clip = replace(source, model=coca)
    with torch.inference_mode():
        image = clip.encode_images(torch.randn(1, 3, 32, 32))
        text = clip.encode_texts(clip.tokenize(["a cat"]))
    for embedding in (image, text):
        assert embedding.shape == (1, 32)
        assert abs(float(embedding.norm()) - 1.0) > 1e-3


def test_random_weights_depend_on_the_seed_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second, other = (build(ModelSource(name="cliptune-test-vit"), seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    ours, same, different = (
        each.model.state_dict()["visual.conv1.weight"] for each in (first, second, other)
    )
    assert torch.equal(ours, same)
    assert not torch.equal(ours, different)
    assert not first.pretrained


def test_a_clip_knows_its_sizes() -> None:
    for name, side, context in (("cliptune-tiny-vit", 64, 32), ("cliptune-test-vit", 32, 16)):
        clip = build(ModelSource(name=name))
        assert clip.image_size == (side, side)
        assert clip.context_length == context == clip.tokenize(["a cat"]).shape[1]
        assert clip.encode_texts(clip.tokenize(["a cat"])).shape == (1, clip.embedding_dim)
        assert clip.preprocess(photo()).shape == (3, side, side)
        assert clip.architecture == name
        assert not clip.model.training


def test_tokens_equal_open_clips_for_long_and_strange_texts(clip: Clip) -> None:
    texts = [
        *TEXTS,
        "x" * 900,
        "字" * 500,
        "a&amp;b <start_of_text> ok",
        "ﬁ ligature café",
        "1234567890 " * 30,
    ]
    reference = open_clip.SimpleTokenizer(context_length=clip.context_length)
    assert torch.equal(clip.tokenize(texts), reference(texts))
    assert clip.tokenize(texts).dtype == torch.int64
    assert clip.tokenize([]).shape == (0, clip.context_length)


def test_tokenising_an_empty_text_is_refused(clip: Clip) -> None:
    with pytest.raises(TextError, match="white space"):
        clip.tokenize(["fine", "  \n"])


def test_building_installs_no_log_handler() -> None:
    code = (
        "import logging\n"
        "from cliptune_model.clip import build\n"
        "from cliptune_model.source import ModelSource\n"
        "build(ModelSource(name='cliptune-test-vit'))\n"
        "assert logging.getLogger().handlers == [], logging.getLogger().handlers\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_building_keeps_the_programs_own_log_handlers(caplog: pytest.LogCaptureFixture) -> None:
    handlers = list(logging.getLogger().handlers)
    with caplog.at_level(logging.WARNING):
        build(ModelSource(name="cliptune-test-vit"))
    assert logging.getLogger().handlers == handlers
