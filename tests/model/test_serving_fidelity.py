"""Faster ways of serving: what they change, and that they are taken only where that is little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import PIL.Image
import pytest
import torch

from cliptune.errors import ImageDecodeError, TensorError
from cliptune_model.acceleration.fidelity import LEAST_COSINE, _photo, choose_way
from cliptune_model.acceleration.measured import FILE, read_measured, write_measured
from cliptune_model.clip import Clip, build
from cliptune_model.exported import load_exported
from cliptune_model.image_reader import ImageReader
from cliptune_model.machine.hardware import Machine
from cliptune_model.pixels import decode_image
from cliptune_model.source import ModelSource
from tests.support import images
from tests.support.models import TEST_MODEL, export_test_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return build(ModelSource(name=TEST_MODEL))


def machine(*, cpu_bf16: bool = False) -> Machine:
    return Machine(system="Linux", accelerator="cpu", cpu_bf16=cpu_bf16)


def test_the_exact_reader_is_open_clips_transform_bit_by_bit(clip: Clip) -> None:
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**clip.preprocess_config), is_train=False
    )
    reader = ImageReader(clip)
    for encoded in (images.jpeg(size=97), images.png("red"), _photo(1)):
        expected = transform(decode_image(encoded))
        assert torch.equal(reader.encoded(encoded), expected)
        pixels = np.asarray(decode_image(encoded))
        assert torch.equal(reader.pixels(pixels), expected)


def test_pixels_of_the_towers_own_size_skip_the_transform_and_equal_it_bit_by_bit(clip: Clip) -> None:
    height, width = clip.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels.flags.writeable = False
    expected = clip.preprocess(PIL.Image.fromarray(pixels))
    assert torch.equal(ImageReader(clip).pixels(pixels), expected)
    flipped = pixels[:, ::-1]
    assert torch.equal(
        ImageReader(clip).pixels(flipped),
        clip.preprocess(PIL.Image.fromarray(np.ascontiguousarray(flipped))),
    )


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_a_jpeg_decoded_at_a_part_of_its_size_is_never_smaller_than_the_tower_wants(
    clip: Clip, mode: str
) -> None:
    other = replace(clip, preprocess_config={**clip.preprocess_config, "resize_mode": mode})
    reader = ImageReader(other, fast=True)
    height, width = clip.image_size
    for size in ((640, 480), (480, 640), (33, 5000), (width, height)):
        enough = reader._enough(*size)
        if mode == "longest":
            assert max(enough) >= max(width, height)
        else:
            assert min(enough) >= min(width, height)


def test_fast_reading_differs_a_little_and_refuses_the_same_files(clip: Clip) -> None:
    exact, fast = ImageReader(clip), ImageReader(clip, fast=True)
    photo = _photo(3)
    difference = (exact.encoded(photo) - fast.encoded(photo)).abs()
    assert 0 < float(difference.mean()) < 0.1
    assert torch.equal(exact.encoded(images.png("red")), fast.encoded(images.png("red")))
    with pytest.raises(ImageDecodeError):
        fast.encoded(images.truncated_jpeg())
    with pytest.raises(TensorError):
        fast.pixels(np.zeros((4, 4), np.uint8))


def test_a_faster_way_is_taken_with_the_cosine_that_was_measured(clip: Clip) -> None:
    way = choose_way(clip, machine(cpu_bf16=True), precision="auto", decode="fast")
    assert (way.precision.value, way.decode.value) == ("bf16", "fast")
    assert LEAST_COSINE <= way.precision_cosine < 1
    assert LEAST_COSINE <= way.decode_cosine < 1
    assert f"{way.decode_cosine:.5f}" in way.decode.reason
    with way.autocast("cpu")():
        assert torch.is_autocast_enabled("cpu")


def test_nothing_is_measured_and_nothing_changes_where_nothing_faster_is_asked_for(clip: Clip) -> None:
    way = choose_way(clip, machine(), precision="exact", decode="exact")
    assert (way.precision.value, way.precision_cosine, way.decode_cosine) == ("fp32", 1.0, 1.0)
    with way.autocast("cpu")():
        assert not torch.is_autocast_enabled("cpu")
    slow = choose_way(clip, machine(cpu_bf16=False), precision="auto", decode="exact")
    assert slow.precision.value == "fp32"
    assert "no bf16" in slow.precision.reason


def test_a_faster_way_whose_cosine_is_too_low_or_no_number_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clip = build(ModelSource(name=TEST_MODEL))
    monkeypatch.setattr("cliptune_model.acceleration.fidelity.LEAST_COSINE", 1.1)
    way = choose_way(clip, machine(cpu_bf16=True), precision="auto", decode="fast")
    assert (way.precision.value, way.decode.value) == ("fp32", "exact")
    assert "would leave a cosine" in way.decode.reason
    assert (way.precision_cosine, way.decode_cosine) == (1.0, 1.0)
    monkeypatch.undo()
    with torch.no_grad():
        cast(Any, clip.model).visual.conv1.weight.fill_(float("nan"))
    way = choose_way(clip, machine(cpu_bf16=True), precision="auto", decode="fast")
    assert (way.precision.value, way.decode.value) == ("fp32", "exact")


def test_what_was_measured_is_kept_beside_the_model_and_not_measured_again(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine(cpu_bf16=True)
    folder = tmp_path / "m"
    export_test_model(folder)
    manifest = (folder / "cliptune.json").read_bytes()
    assert read_measured(folder, "cpu", here) == {}
    way = choose_way(clip, here, precision="auto", decode="fast")
    assert way.measured == {"bf16": way.precision_cosine, "fast": way.decode_cosine}
    write_measured(folder, "cpu", here, way.measured)
    known = read_measured(folder, "cpu", here)
    assert known == way.measured
    assert (folder / "cliptune.json").read_bytes() == manifest
    monkeypatch.setattr("cliptune_model.acceleration.fidelity._photo", None)  # measuring needs it
    again = choose_way(clip, here, precision="auto", decode="fast", known=known)
    assert (again.precision, again.precision_cosine) == (way.precision, way.precision_cosine)
    assert (again.decode, again.decode_cosine) == (way.decode, way.decode_cosine)
    load_exported(folder)  # a file more does not matter to a load


def test_what_was_measured_counts_for_one_device_and_these_weights_alone(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    export_test_model(folder)
    here, there = machine(), replace(machine(), torch_version="1.0")
    write_measured(folder, "cpu", here, {"bf16": 0.9995, "fast": float("nan")})
    write_measured(folder, "cpu", there, {"bf16": 0.5})
    assert read_measured(folder, "cpu", here) == {"bf16": 0.9995}
    assert read_measured(folder, "cpu", there) == {"bf16": 0.5}
    assert read_measured(folder, "cuda:0", here) == {}
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert read_measured(folder, "cpu", here) == {}
    (folder / FILE).write_text("[")
    assert read_measured(folder, "cpu", there) == {}


def test_a_folder_that_cannot_be_written_is_served_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    export_test_model(folder)
    (folder / FILE).mkdir()
    write_measured(folder, "cpu", machine(), {"bf16": 0.9995})
    assert read_measured(folder, "cpu", machine()) == {}
