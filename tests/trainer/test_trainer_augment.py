"""Changes to training images: what is drawn, what is done with it, and what a crop may lose."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as reference

from cliptune.errors import SpecError
from cliptune.v1 import spec_pb2
from cliptune_model.clip import Clip
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.loading.decode import Decoder
from cliptune_trainer.data.loading.images import Images, Normalisation
from cliptune_trainer.data.loading.loader import Loader
from cliptune_trainer.data.table import Pair
from cliptune_trainer.image.augment import GREY, NAMED, NONE, WHOLE, Augmentation, View, draws
from cliptune_trainer.image.geometry import Geometry
from cliptune_trainer.spec.data import DataConfig, data_config

CONFIG = {
    "size": 48,
    "mode": "RGB",
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
ALL = Augmentation(
    flip_horizontal=True,
    flip_vertical=True,
    rotate_quarter=True,
    rotate_degrees=20.0,
    crop_min_area=0.5,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.1,
)
CPU = torch.device("cpu")


def picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """Smooth, different at every place and in every turn."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95)
    return path


def test_draws_belong_to_seed_epoch_and_row_and_are_spread_evenly() -> None:
    together = draws(3, 1, range(20_000), stream=1, count=4)
    assert np.array_equal(draws(3, 1, [19_999], stream=1, count=4)[0], together[-1])
    assert np.array_equal(draws(3, 1, [7, 5], stream=1, count=4), together[[7, 5]])
    for other in (
        draws(4, 1, range(20_000), stream=1, count=4),
        draws(3, 2, range(20_000), stream=1, count=4),
        draws(3, 1, range(20_000), stream=3, count=4),
    ):
        assert abs(np.corrcoef(together[:, 0], other[:, 0])[0, 1]) < 0.03
    assert together.min() >= 0
    assert together.max() < 1
    assert np.abs(np.histogram(together, bins=20)[0] / together.size - 0.05).max() < 0.003
    assert np.abs(np.corrcoef(together.T) - np.eye(4)).max() < 0.03
    draws(2**64 - 1, 0, [2**40], stream=1, count=1)


@pytest.mark.parametrize("least", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(("width", "height"), [(300, 300), (640, 199), (31, 64)])
def test_a_crop_keeps_its_share_of_the_area_and_of_each_side(least: float, width: int, height: int) -> None:
    augmentation = Augmentation(crop_min_area=least)
    shares = []
    for row in range(500):
        left, top, right, bottom = augmentation.view(1, 2, row).box(width, height) or (0, 0, width, height)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert right - left >= least * width
        assert bottom - top >= least * height
        shares.append((right - left) * (bottom - top) / (width * height))
    assert min(shares) >= least
    assert np.mean(shares) == pytest.approx((1 + least) / 2, abs=0.06)
    assert len(set(shares)) > 5


def test_turns_and_flips_are_exact_and_all_sixteen_happen(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 60, 48)
    config = {**CONFIG, "size": 48}
    plain = Decoder.of(config)(path)
    seen = set()
    augmentation = Augmentation(flip_horizontal=True, flip_vertical=True, rotate_quarter=True)
    for row in range(120):
        view = augmentation.view(5, 0, row)
        wanted = np.rot90(plain, view.quarters)
        wanted = wanted[:, ::-1] if view.mirror else wanted
        wanted = wanted[::-1] if view.flip else wanted
        got = Decoder.of(config, augmentation=augmentation, seed=5)(path, 0, row)
        assert np.array_equal(got, wanted)
        seen.add((view.quarters, view.mirror, view.flip))
    assert len(seen) == 16


def test_a_quarter_turn_of_a_model_that_is_not_square_shows_the_picture_turned(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 90, 60)
    upright = Decoder.of({**CONFIG, "size": (40, 60)})
    lying = Decoder.of({**CONFIG, "size": (60, 40)}, augmentation=Augmentation(rotate_quarter=True))
    turned = 0
    for row in range(12):
        quarters = lying.augmentation.view(0, 0, row).quarters
        got = lying(path, 0, row)
        assert got.shape == (60, 40, 3)
        if quarters % 2:
            turned += 1
            assert np.array_equal(got, np.rot90(upright(path), quarters))
    assert turned


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_turning_by_any_angle_keeps_the_size_and_repeats_the_border(mode: str) -> None:
    geometry = Geometry.of({**CONFIG, "resize_mode": mode})
    flat = Image.new("RGB", (80, 64), (200, 100, 50))
    for degrees in (-180.0, -91.0, -7.5, 0.1, 45.0, 90.0):
        framing = geometry.framing(80, 64, (10, 5, 70, 60))
        turned = np.asarray(geometry.turned(flat, framing, 1.0, degrees))
        assert turned.shape == (48, 48, 3)
        inside = turned[framing.place[1] : framing.place[1] + framing.size[1]]
        inside = inside[:, framing.place[0] : framing.place[0] + framing.size[0]]
        assert (inside == (200, 100, 50)).all(), degrees


def test_turning_by_whole_quarters_is_turning(tmp_path: Path) -> None:
    image = Image.open(picture(tmp_path / "a.png", 64, 64)).convert("RGB")
    geometry = Geometry.of({**CONFIG, "size": 64})
    framing = geometry.framing(64, 64)
    for quarters in (1, 2, 3):
        got = np.asarray(geometry.turned(image, framing, 1.0, 90.0 * quarters)).astype(int)
        assert np.abs(got - np.rot90(np.asarray(image), quarters).astype(int)).max() <= 2


def test_a_turned_crop_shows_what_lies_beside_it_and_invents_nothing() -> None:
    wide = np.full((200, 200, 3), 40, dtype=np.uint8)
    wide[60:140, 60:140] = 220  # the crop, on a darker ground
    geometry = Geometry.of({**CONFIG, "size": 80})
    framing = geometry.framing(200, 200, (60, 60, 140, 140))
    turned = np.asarray(geometry.turned(Image.fromarray(wide), framing, 1.0, 45.0))
    corners = turned[[2, 2, -3, -3], [2, -3, 2, -3]]
    assert np.abs(corners.astype(int) - 40).max() <= 2
    assert np.abs(turned[30:50, 30:50].astype(int) - 220).max() <= 2


def test_a_large_jpeg_decoded_quickly_is_turned_alike(tmp_path: Path) -> None:
    augmentation = Augmentation(rotate_degrees=30.0, crop_min_area=0.5, flip_vertical=True)
    for number, (width, height) in enumerate([(640, 480), (431, 800)]):
        path = picture(tmp_path / f"{number}.jpg", width, height, seed=number)
        exact, fast = (
            Decoder.of(CONFIG, augmentation=augmentation, seed=1, exact=exact)(path, 3, number).astype(int)
            for exact in (True, False)
        )
        assert np.abs(exact - fast).mean() < 1.5


def coloured(pixels: torch.Tensor, augmentation: Augmentation, seed: int = 0) -> torch.Tensor:
    rows = list(range(len(pixels)))
    mixes = torch.from_numpy(augmentation.mixes(seed, 0, rows))
    return Images(pixels, Normalisation.of(CONFIG, CPU), mixes)[:]


def signed(seed: int, rows: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return 2 * draws(seed, 0, range(rows), stream=3, count=4) - 1


def mild(count: int = 6) -> torch.Tensor:
    """So far from black and white that nothing is cut off."""
    random = np.random.default_rng(1)
    return torch.from_numpy(random.integers(100, 156, (count, 9, 8, 3), dtype=np.uint8))


def test_brightness_contrast_and_saturation_are_those_of_torchvision_one_after_another() -> None:
    pixels = mild()
    got = coloured(pixels, Augmentation(brightness=0.3, contrast=0.4, saturation=0.6))
    for image, changed, (brightness, contrast, saturation, _) in zip(
        pixels, got, signed(0, len(pixels)), strict=True
    ):
        wanted = image.permute(2, 0, 1).double() / 255
        wanted = reference.adjust_brightness(wanted, 1 + 0.3 * brightness)
        wanted = reference.adjust_contrast(wanted, 1 + 0.4 * contrast)
        wanted = reference.adjust_saturation(wanted, 1 + 0.6 * saturation)
        assert torch.allclose(changed.double(), wanted, atol=1e-4)  # its grey is 0.2989, 0.587, 0.114


def test_the_hue_turns_and_brightness_and_greys_stay() -> None:
    pixels = mild()
    got = coloured(pixels, Augmentation(hue=0.5))
    before = pixels.permute(0, 3, 1, 2).float() / 255
    grey = torch.tensor(GREY).view(3, 1, 1)
    assert torch.allclose((got * grey).sum(1), (before * grey).sum(1), atol=1e-5)
    assert (got - before).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    flat = torch.arange(0, 250, 10, dtype=torch.uint8).view(1, -1, 1, 1).expand(1, 25, 2, 3)
    assert torch.allclose(coloured(flat, Augmentation(hue=0.5)), flat.permute(0, 3, 1, 2) / 255, atol=1e-6)
    red, half_turn = torch.tensor([180, 100, 100], dtype=torch.uint8), math.pi
    for row, (_, _, _, share) in enumerate(signed(0, 4)):
        towards = coloured(red.expand(4, 1, 1, 3), Augmentation(hue=0.5))[row, :, 0, 0]
        angle = abs(share) * half_turn
        if angle > 2.2:  # the far side of the circle
            assert towards[0] < towards[1:].max()
        if angle < 0.8:
            assert towards[0] == towards.max()


def test_colours_stay_between_black_and_white_and_none_change_unasked() -> None:
    pixels = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
    wild = coloured(pixels, Augmentation(brightness=0.9, contrast=0.9, saturation=1.0, hue=0.5))
    assert wild.min() >= 0
    assert wild.max() <= 1
    assert not Augmentation(crop_min_area=0.5, rotate_quarter=True).colours
    assert torch.allclose(coloured(pixels, NONE), pixels.permute(0, 3, 1, 2) / 255, atol=1e-6)


def test_a_loader_that_begins_anywhere_with_any_workers_draws_the_same(tiles: Path, clip: Clip) -> None:
    pairs = Pairs(
        [Pair(row=row, image=tiles / f"{row}.png", reference="", caption=f"{row}") for row in range(10)]
    )

    def load(first: int, workers: int = 0) -> list[torch.Tensor]:
        with Loader(pairs, clip, batch_size=4, seed=9, augmentation=ALL, workers=workers) as loader:
            return [batch.images_B3HW[:] for batch in loader.batches(first, 6)]

    whole = load(0)
    assert all(map(torch.equal, whole[3:], load(3, workers=1)))
    with Loader(pairs, clip, batch_size=4, seed=9) as plain:
        first = next(plain.batches(0, 1)).images_B3HW[:]
    assert all(not torch.allclose(one, other, atol=0.05) for one, other in zip(whole[0], first, strict=True))


def test_every_field_of_the_spec_is_obeyed() -> None:
    message = spec_pb2.AugmentSpec(
        flip_horizontal=True,
        flip_vertical=True,
        rotate_quarter=True,
        rotate_degrees=20.0,
        crop_min_area=0.5,
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        hue=0.1,
    )
    assert {field.name for field in fields(Augmentation)} == set(message.DESCRIPTOR.fields_by_name)
    assert data_config(spec_pb2.DataSpec(train="a.csv", augment=message)).augment == ALL
    assert data_config(spec_pb2.DataSpec(train="a.csv", augment=spec_pb2.AugmentSpec())).augment == NONE
    for name, meant in NAMED.items():
        assert data_config(spec_pb2.DataSpec(train="a.csv", augmentation=name)).augment == meant
    whole = Augmentation(crop_min_area=1.0)
    assert not whole.moves
    assert whole.view(0, 0, 0) == WHOLE == View()


@pytest.mark.parametrize(
    "wrong", [{"hue": 0.6}, {"rotate_degrees": -1.0}, {"crop_min_area": 1.1}, {"contrast": math.nan}]
)
def test_a_change_out_of_range_is_refused_with_its_path(wrong: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=f"data.augment.{next(iter(wrong))}"):
        DataConfig(train="a.csv", augment=Augmentation(**wrong))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="says it in full"):
        data_config(spec_pb2.DataSpec(train="a.csv", augmentation="flip", augment={"hue": 0.1}))
