"""The pretrained model that ships beside this project: whole, small, and a plain open_clip model."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import open_clip
import PIL.Image
import PIL.ImageDraw
import pytest
import torch
from torch.nn import functional as F

from cliptune.embedded import (
    DEFAULT_MODEL,
    SUMS,
    WEIGHTS,
    embedded_folder,
    embedded_names,
    embedded_probe,
)
from cliptune_model.acceleration.folded import fold
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource

DISTRIBUTION = Path(__file__).parents[2] / "mini"
LARGEST = {DEFAULT_MODEL: 36_000_000, f"{DEFAULT_MODEL}-vit": 12_000_000}  # bytes


LARGEST_PROBE = 1_000_000  # bytes


@pytest.fixture(scope="module")
def mini() -> Clip:
    """Shared: not to be changed."""
    return build(ModelSource(name=DEFAULT_MODEL))


def circle(colour: str) -> PIL.Image.Image:
    image = PIL.Image.new("RGB", (160, 120), "white")
    PIL.ImageDraw.Draw(image).ellipse((40, 20, 120, 100), fill=colour)
    return image


def test_it_holds_the_models_that_it_says() -> None:
    assert embedded_names() == sorted(LARGEST)


@pytest.mark.parametrize("name", LARGEST)
def test_every_file_has_its_checksum_and_the_weights_are_small(name: str) -> None:
    folder = embedded_folder(name)
    listed = (folder.parent / SUMS).read_text()
    assert all(f"  {name}/{path.name}\n" in listed for path in folder.iterdir())
    assert (folder / WEIGHTS).stat().st_size <= LARGEST[name]
    assert "cannot do" in (folder / "README.md").read_text()


def test_its_general_probe_is_small_whole_and_of_distinct_captions_with_its_licences_named() -> None:
    shard = embedded_probe()
    assert shard is not None
    assert shard.stat().st_size <= LARGEST_PROBE
    with tarfile.open(shard) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    captions = [content.decode() for name, content in files.items() if name.endswith(".txt")]
    assert len(set(captions)) == len(captions) == len(files) / 2 >= 150
    for name in files:
        if name.endswith(".webp"):
            with PIL.Image.open(io.BytesIO(files[name])) as image:
                assert image.size == (128, 128)
    card = (shard.parent / "README.md").read_text()
    assert f"{len(captions)} pictures" in card
    assert f"  general-probe/{shard.name}\n" in (shard.parents[1] / SUMS).read_text()
    assert "general-probe" in (DISTRIBUTION / "NOTICE").read_text()


@pytest.mark.parametrize("name", LARGEST)
def test_plain_open_clip_loads_it_and_computes_the_same(name: str) -> None:
    ours = build(ModelSource(name=name))
    source = f"local-dir:{embedded_folder(name)}"
    model, _, preprocess = open_clip.create_model_and_transforms(source)
    model.eval()
    tokens = open_clip.get_tokenizer(source)(["a drawing of a frog", "a red circle"])
    image = circle("red")
    with torch.inference_mode():
        for found, wanted in (
            (ours.encode_texts(tokens), model.encode_text(tokens)),
            (ours.encode_images(ours.preprocess(image)[None]), model.encode_image(preprocess(image)[None])),
        ):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_folded_for_serving_it_gives_the_same_vectors(mini: Clip) -> None:
    served, choice = fold(mini)
    assert choice.value == "on"
    images = torch.stack([mini.preprocess(circle(colour)) for colour in ("red", "green", "blue")])
    with torch.inference_mode():
        wanted_BD, found_BD = mini.encode_images(images), served.encode_images(images)
    assert ((found_BD - wanted_BD).norm(dim=-1) <= 1e-4 * wanted_BD.norm(dim=-1)).all()


def test_it_tells_drawings_apart_that_it_was_never_shown(mini: Clip) -> None:
    images = torch.stack([mini.preprocess(circle(colour)) for colour in ("red", "blue")])
    with torch.inference_mode():
        image_BD = F.normalize(mini.encode_images(images), dim=-1)
        texts = mini.tokenize_trimmed(["a red circle", "a blue circle"])
        text_BD = F.normalize(mini.encode_texts(texts), dim=-1)
    assert (image_BD @ text_BD.T).argmax(-1).tolist() == [0, 1]


def test_the_wheel_and_the_source_distribution_hold_every_file_and_the_licences(tmp_path: Path) -> None:
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(DISTRIBUTION)).build(directory=str(tmp_path))
    (source,) = SdistBuilder(str(DISTRIBUTION)).build(directory=str(tmp_path))
    package = DISTRIBUTION / "cliptune_mini"
    files = {path.relative_to(DISTRIBUTION).as_posix(): path for path in package.rglob("*") if path.is_file()}
    files = {name: path for name, path in files.items() if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        licences = {name.rpartition("/")[2] for name in archive.namelist() if "/licenses/" in name}
        assert licences == {"LICENSE", "NOTICE"}
        for name, path in files.items():
            assert archive.read(name) == path.read_bytes()
    with tarfile.open(source) as sources:
        held = {name.partition("/")[2] for name in sources.getnames()}
    assert held >= {*files, "LICENSE", "NOTICE", "README.md", "pyproject.toml"}
