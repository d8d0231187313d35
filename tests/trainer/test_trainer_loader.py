from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageFilter

from cliptune.errors import DataError, ImageDecodeError
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from cliptune_trainer.data.choices import choose_decode, choose_workers
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.loading import pools
from cliptune_trainer.data.loading.decode import Decoder
from cliptune_trainer.data.loading.images import Images, Normalisation
from cliptune_trainer.data.loading.loader import Batch, Loader
from cliptune_trainer.data.loading.shared import NamedBytes
from cliptune_trainer.data.table import Pair
from cliptune_trainer.image.augment import NAMED, NONE, Augmentation
from tests.trainer.batches import same

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "size": (32, 32),
    "mode": "RGB",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blurred noise: it has an edge in every direction and no more detail than a photo."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_exact_decoding_equals_open_clips_transform_to_the_bit(
    tmp_path: Path, mode: str, size: tuple[int, int], interpolation: str
) -> None:
    config = {**CONFIG, "size": size, "resize_mode": mode, "interpolation": interpolation, "fill_color": 7}
    transform = image_transform_v2(PreprocessCfg(**config), is_train=False)
    decoder, normalise = Decoder.of(config), Normalisation.of(config, CPU)
    for number, (width, height) in enumerate(
        [(32, 32), (33, 32), (47, 91), (101, 50), (19, 77), (200, 21), (40, 24), (64, 64), (5, 3)]
    ):
        path = tmp_path / f"{number}.png"
        smooth(width, height, seed=number).save(path)
        wanted = transform(Image.open(path))
        got = normalise(torch.from_numpy(decoder(path)[None].copy()))[0]
        assert torch.equal(got, wanted), (width, height)


def test_a_strip_of_extreme_aspect_is_framed_without_making_it_large(tmp_path: Path) -> None:
    path = tmp_path / "strip.png"
    Image.new("RGB", (30_000, 1), (200, 100, 50)).save(path)
    pixels = Decoder.of({**CONFIG, "size": 224})(path)  # 224 × 6,720,000 when resized as a whole
    assert pixels.shape == (224, 224, 3)
    assert (pixels == (200, 100, 50)).all()


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("augmentation", ["none", "crop"])
def test_fast_decoding_of_large_jpegs_stays_close_to_the_exact_one(
    tmp_path: Path, mode: str, augmentation: str
) -> None:
    config = {**CONFIG, "size": 96, "resize_mode": mode}
    for number, (width, height) in enumerate([(640, 480), (431, 800), (2001, 1111), (90, 120)]):
        path = tmp_path / f"{number}.jpg"
        smooth(width, height, seed=number).save(path, quality=90)
        exact, fast = (
            Decoder.of(config, augmentation=NAMED[augmentation], seed=1, exact=exact)(path, 3, number).astype(
                int
            )
            for exact in (True, False)
        )
        assert np.abs(exact - fast).mean() < 1.5, (width, height)
        assert np.abs(exact - fast).max() < 32


def test_a_broken_jpeg_is_an_error_in_both_ways_of_decoding(tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    smooth(640, 480).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    for exact in (True, False):
        with pytest.raises(ImageDecodeError):
            Decoder.of(CONFIG, exact=exact)(path)


def test_slices_of_images_are_normalised_and_coloured_as_they_are_asked_for() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=np.uint8))
    mixes = torch.zeros(6, 3, 4)
    mixes[:, 0, 2] = mixes[:, 1, 1] = mixes[:, 2, 0] = 1  # red and blue change places
    normalisation = Normalisation([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], CPU)
    plain, swapped = Images(pixels, normalisation), Images(pixels, normalisation, mixes)
    assert plain.shape == (6, 3, 8, 10)
    assert len(plain) == 6
    for start in (0, 2, 4):
        assert torch.equal(swapped[start : start + 2], plain[start : start + 2].flip(1))
    assert torch.equal(swapped.to("cpu"), swapped[:])


def pairs(folder: Path, rows: int = 12) -> Pairs:
    return Pairs(
        [
            Pair(
                row=row + 1,
                image=folder / f"{row}.png",
                reference="",
                caption=" ".join(["tile"] * (row // 2 + 1)),
            )
            for row in range(rows)
        ]
    )


def load(folder: Path, clip: Clip, first: int = 0, total: int = 6, **options: Any) -> list[Batch]:
    options = {"augmentation": NAMED["crop"], "batch_size": 5, "rows": 12, **options}
    with Loader(pairs(folder, options.pop("rows")), clip, seed=5, **options) as loader:
        return list(loader.batches(first, total))


def test_half_of_the_images_are_mirrored_other_ones_each_epoch(tiles: Path, clip: Clip) -> None:
    plain = load(tiles, clip, total=4, batch_size=30, rows=60, augmentation=NONE)
    flipped = load(tiles, clip, total=4, batch_size=30, rows=60, augmentation=NAMED["flip"])
    marks = []
    for one, other in zip(plain, flipped, strict=True):
        for image, mirrored in zip(one.images_B3HW[:], other.images_B3HW[:], strict=True):
            assert torch.equal(mirrored, image) or torch.equal(mirrored, image.flip(-1))
            marks.append(not torch.equal(mirrored, image))
    assert 20 < sum(marks[:60]) < 40
    assert marks[:60] != marks[60:]


@pytest.mark.parametrize("memory", ["shared_bytes", "NamedBytes"])
def test_processes_give_the_same_batches_as_threads_from_any_step(
    tiles: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    if memory == "NamedBytes":  # what systems other than Linux use
        monkeypatch.setattr(pools, "shared_bytes", NamedBytes)
    wanted = load(tiles, clip, first=1)
    got = load(tiles, clip, first=1, workers=2)
    assert len(got) == 5
    assert all(map(same, wanted, got))


def test_losing_the_processes_costs_nothing(tiles: Path, clip: Clip) -> None:
    steps = 12  # more than are decoded ahead
    wanted = load(tiles, clip, total=steps)
    lost: list[bool] = []
    with Loader(
        pairs(tiles),
        clip,
        batch_size=5,
        seed=5,
        augmentation=NAMED["crop"],
        workers=1,
        on_workers_lost=lambda: lost.append(True),
    ) as loader:
        batches = loader.batches(0, steps)
        got = [next(batches)]
        assert not lost
        (process_id,) = loader.process_ids
        os.kill(process_id, signal.SIGKILL)
        got += batches
        assert loader.process_ids == []
    assert lost == [True]
    assert all(map(same, wanted, got))


def test_without_shared_memory_threads_decode_and_it_is_told(
    tiles: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(size: int) -> NamedBytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pools, "shared_bytes", refused)
    lost: list[bool] = []
    got = load(tiles, clip, workers=2, on_workers_lost=lambda: lost.append(True))
    assert lost == [True]
    assert len(got) == 6


def test_a_loader_can_be_left_in_the_middle_and_begun_anew(tiles: Path, clip: Clip) -> None:
    wanted = load(tiles, clip, total=50)
    for workers in (0, 1):
        with Loader(
            pairs(tiles), clip, batch_size=5, seed=5, augmentation=NAMED["crop"], workers=workers
        ) as loader:
            first = loader.batches(0, 50)
            assert same(next(first), wanted[0])
            again = loader.batches(2, 50)
            assert same(next(again), wanted[2])
            with pytest.raises(RuntimeError, match="ended"):
                next(first)
            assert same(next(again), wanted[3])


def test_what_goes_bad_is_told_in_the_callers_thread_with_the_batch_that_it_concerns(
    tmp_path: Path, tiles: Path, clip: Clip
) -> None:
    for row in range(12):
        (tmp_path / f"{row}.png").write_bytes((tiles / f"{row}.png").read_bytes())
    (tmp_path / "4.png").write_text("no image any more")
    whole = load(tiles, clip)
    spoiled = next(place for place, batch in enumerate(whole) if 4 in batch.image_ids_B)
    for workers in (0, 1):
        told: list[tuple[int, str, str]] = []
        with Loader(
            pairs(tmp_path),
            clip,
            batch_size=5,
            seed=5,
            augmentation=NAMED["crop"],
            workers=workers,
            max_bad=1,
            on_bad_row=lambda pair, reason, told=told: told.append(  # type: ignore[misc]
                (pair.row, reason, threading.current_thread().name)
            ),
        ) as loader:
            for place, batch in enumerate(loader.batches(0, 6)):
                assert bool(told) == (place >= spoiled)
                assert 4 not in batch.image_ids_B
        assert told == [
            (
                5,
                "4.png: not an image file (JPEG, PNG, WEBP, BMP, GIF, TIFF are read)",
                threading.current_thread().name,
            )
        ]


def test_when_no_stand_in_can_be_read_the_job_ends_with_the_row(tmp_path: Path, clip: Clip) -> None:
    with pytest.raises(DataError, match="others in its place"):
        load(tmp_path, clip, max_bad=100)  # no image is there


def test_texts_are_cut_to_the_longest_of_their_batch(tiles: Path, clip: Clip) -> None:
    long = build(ModelSource(name="cliptune-tiny-vit"))
    (batch,) = load(tiles, long, total=1, augmentation=NONE)
    longest = int(batch.tokens_BL.argmax(dim=1).max()) + 1
    assert longest <= batch.tokens_BL.shape[1] < long.context_length == 32


@pytest.mark.parametrize(
    ("wanted", "device", "rows", "value"),
    [(3, "cpu", 10, "3"), (None, "cpu", 10**6, "0"), (None, "cuda:0", 300, "0"), (0, "cuda", 10**6, "0")],
)
def test_processes_decode_where_they_are_asked_for_or_pay(
    wanted: int | None, device: str, rows: int, value: str
) -> None:
    choice = choose_workers(wanted, device, rows)
    assert choice.value == value
    assert choice.reason


def test_many_rows_on_a_gpu_get_a_process_a_core_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from cliptune_trainer.data import choices

    def cores(count: int) -> Callable[[None], object]:
        return lambda wanted: choices.Choice(subject="threads", value=str(count), reason="")

    for count, rows, value in [(16, 10**6, 15), (16, 2_000, 4), (2, 10**6, 0), (128, 10**6, 32)]:
        monkeypatch.setattr(choices, "choose_threads", cores(count))
        assert choose_workers(None, "cuda:0", rows).value == str(value)


def test_decoding_is_exact_on_the_cpu_and_fast_where_a_gpu_waits() -> None:
    assert choose_decode("auto", "cpu").value == "exact"
    assert choose_decode("auto", "cuda:0").value == choose_decode("auto", "mps").value == "fast"
    assert choose_decode("exact", "cuda:0").value == "exact"


def test_a_killed_trainer_leaves_no_decoding_process_behind(tiles: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from cliptune_trainer.data.loading.decode import Decoder
from cliptune_trainer.data.loading.pools import open_pool
from cliptune_trainer.data.source import Request

if __name__ == "__main__":
    decoder = Decoder.of({CONFIG!r})
    pool = open_pool(decoder, workers=1, batch_size=4)
    chunk = pool.submit([Request(Path({str(tiles / "0.png")!r}), 0, 0)], decoder)
    assert chunk.reasons.result() == [""] and chunk.pixels_NHW3.any()
    print(*pool.process_ids, flush=True)
    sys.stdin.read()
"""
    trainer = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    with trainer.stdin, trainer.stdout:
        process_ids = [int(word) for word in trainer.stdout.readline().split()]
        assert len(process_ids) == 1
        trainer.kill()
        trainer.wait()
        # The decoding process holds the other end of this pipe as long as it lives.
        assert trainer.stdout.read() == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("augmentation", [NONE, Augmentation(flip_horizontal=True, hue=0.2)])
def test_batches_on_a_cuda_device_equal_those_on_the_cpu(
    tiles: Path, clip: Clip, augmentation: Augmentation
) -> None:
    wanted = load(tiles, clip, total=20, augmentation=augmentation)
    clip.model.to("cuda")
    got = load(tiles, clip, total=20, augmentation=augmentation, workers=2)
    for one, other in zip(wanted, got, strict=True):
        assert other.images_B3HW[:].is_cuda
        assert other.tokens_BL.is_cuda
        torch.testing.assert_close(other.images_B3HW[:].cpu(), one.images_B3HW[:], atol=1e-6, rtol=1e-6)
        assert torch.equal(other.tokens_BL.cpu(), one.tokens_BL)
        assert torch.equal(other.image_ids_B.cpu(), one.image_ids_B)
