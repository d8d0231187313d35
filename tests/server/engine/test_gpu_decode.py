"""Decoding beside a GPU: what goes where, and that a failing decoder costs no answer.

The steps run on the CPU here, by the same functions; on CUDA the last test asks nvJPEG itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cliptune.errors import ImageDecodeError
from cliptune_model.acceleration.fidelity import LEAST_COSINE, _photo, choose_way
from cliptune_model.clip import Clip, build
from cliptune_model.gpu_jpeg import GpuJpeg
from cliptune_model.image_reader import ImageReader
from cliptune_model.machine.hardware import detect
from cliptune_model.source import ModelSource
from cliptune_server.engine.decode import Decoder
from cliptune_server.engine.gpu_decode import GpuDecoding
from cliptune_server.engine.payload import Picture
from cliptune_server.engine.progress import Progress
from tests.support import images
from tests.support.models import TEST_MODEL

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return build(ModelSource(name=TEST_MODEL))


class Counting(GpuJpeg):
    """Counts its batches; fails as often as it is told to."""

    def __init__(self, clip: Clip, failures: int = 0) -> None:
        super().__init__(clip, "cpu")
        self.batches: list[int] = []
        self.failures = failures

    def read(self, files: Sequence[bytes]) -> list[Tensor]:
        self.batches.append(len(files))
        if self.failures:
            self.failures -= 1
            raise RuntimeError("nvjpegDecode failed: 6")
        return super().read(files)


def test_the_steps_on_the_gpu_are_those_of_the_transform(clip: Clip) -> None:
    photos = [_photo(seed) for seed in range(2)] + [images.jpeg(size=97)]
    exact = torch.stack([ImageReader(clip).encoded(photo) for photo in photos])
    found = torch.stack(GpuJpeg(clip, "cpu").read(photos))
    assert found.shape == exact.shape
    assert float((found - exact).abs().mean()) < 0.002
    with torch.inference_mode():
        cosine = torch.nn.functional.cosine_similarity(clip.encode_images(found), clip.encode_images(exact))
    assert float(cosine.min()) >= LEAST_COSINE


def test_what_is_no_whole_jpeg_of_a_usual_kind_is_left_to_the_threads(clip: Clip) -> None:
    reader = GpuJpeg(clip, "cpu")
    assert reader.takes(images.jpeg(size=40))
    assert not reader.takes(images.png("red"))
    assert not reader.takes(images.truncated_jpeg())
    assert not reader.takes(images.jpeg(size=40)[:-2])
    assert not reader.takes(b"\xff\xd8\xff\xd9")
    assert not reader.takes(b"")


def test_models_whose_transform_has_other_steps_say_so(clip: Clip) -> None:
    assert not GpuJpeg.why_not(clip)
    other = build(ModelSource(name=TEST_MODEL))
    other.preprocess_config = {**clip.preprocess_config, "resize_mode": "longest"}
    assert "longest" in GpuJpeg.why_not(other)


async def test_files_that_come_while_the_gpu_decodes_leave_together(clip: Clip) -> None:
    told: list[int] = []
    decoding = GpuDecoding(progress=Progress(), on_batch=lambda files, seconds: told.append(files))
    reader = Counting(clip)
    files = [images.jpeg(size=40 + size) for size in range(9)]
    found = await asyncio.gather(*(decoding.image(reader, file) for file in files))
    assert all(image_CHW is not None for image_CHW in found)
    assert sum(reader.batches) == sum(told) == decoding.files == 9
    assert len(reader.batches) <= 2
    for file, image_CHW in zip(files, found, strict=True):
        assert image_CHW is not None
        torch.testing.assert_close(image_CHW, GpuJpeg(clip, "cpu").read([file])[0])
    decoding.close()


async def test_a_file_goes_where_it_is_decoded_sooner(clip: Clip) -> None:
    decoding = GpuDecoding(progress=Progress(), on_batch=lambda files, seconds: None)
    assert decoding.is_sooner(0.0)  # nothing is measured: the first goes to the GPU
    await decoding.image(Counting(clip), images.jpeg(size=40))
    assert decoding.file_s > 0
    assert decoding.is_sooner(2 * decoding.file_s)
    assert not decoding.is_sooner(0.5 * decoding.file_s)
    decoding.close()


async def test_interactive_files_leave_before_bulk_that_came_earlier(clip: Clip) -> None:
    decoding = GpuDecoding(progress=Progress(), on_batch=lambda files, seconds: None)
    reader = Counting(clip)
    order: list[str] = []

    async def ask(name: str, *, bulk: bool) -> None:
        await decoding.image(reader, images.jpeg(size=40), bulk=bulk)
        order.append(name)

    await asyncio.gather(
        *(ask("bulk", bulk=True) for _ in range(150)), *(ask("interactive", bulk=False) for _ in range(2))
    )
    assert order.index("interactive") < 64
    assert sorted(order)[-2:] == ["interactive"] * 2
    assert max(reader.batches) == 64
    decoding.close()


async def test_a_batch_that_fails_is_decoded_by_the_threads_and_a_broken_decoder_is_not_asked_again(
    clip: Clip,
) -> None:
    decoder = Decoder(threads=1, progress=Progress())
    gpu = Counting(clip, failures=10**6)
    reader = ImageReader(clip, fast=True, gpu=gpu)
    plain = ImageReader(clip, fast=True)
    good = Picture(images.jpeg(size=97))
    for _ in range(40):
        decoder.image_stage.record(1, 1.0)  # the threads are slow: the GPU is asked as long as it may be
        found = await decoder.image(reader, good)
        assert torch.equal(found, plain.encoded(images.jpeg(size=97)))
    assert len(gpu.batches) == 16
    decoder.close()


async def test_a_damaged_file_among_good_ones_fails_alone_with_the_usual_error(clip: Clip) -> None:
    decoder = Decoder(threads=1, progress=Progress())
    gpu = Counting(clip)
    reader = ImageReader(clip, fast=True, gpu=gpu)
    files = [images.jpeg(size=97), images.truncated_jpeg(), images.jpeg("blue", size=64), b"rubbish"]
    found = await asyncio.gather(
        *(decoder.image(reader, Picture(file), bulk=True) for file in files), return_exceptions=True
    )
    assert [isinstance(one, Tensor) for one in found] == [True, False, True, False]
    assert all(isinstance(one, ImageDecodeError) for one in (found[1], found[3]))
    assert sum(gpu.batches) >= 1
    decoder.close()


async def test_a_caller_that_has_gone_is_not_decoded_for(clip: Clip) -> None:
    decoding = GpuDecoding(progress=Progress(), on_batch=lambda files, seconds: None)
    reader = Counting(clip)
    gone = asyncio.create_task(decoding.image(reader, images.jpeg(size=40)))
    await asyncio.sleep(0)
    gone.cancel()
    assert await decoding.image(reader, images.jpeg(size=50)) is not None
    assert sum(reader.batches) == 1
    decoding.close()


def test_without_a_gpu_no_file_goes_there(clip: Clip) -> None:
    way = choose_way(clip, detect("cpu"), precision="exact", decode="fast")
    assert way.decode.value == "fast"
    assert "gpu" not in way.measured


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda_the_gpu_decodes_near_enough_and_says_how_near() -> None:
    clip = build(ModelSource(name=TEST_MODEL), device="cuda")
    way = choose_way(clip, detect("cuda"), precision="auto", decode="fast")
    assert way.decode.value == "gpu", way.decode.reason
    assert LEAST_COSINE <= way.measured["gpu"] <= 1.0001
    photos = [_photo(seed) for seed in range(3)]
    found = GpuJpeg(clip, "cuda").read(photos)
    assert all(image_CHW.is_cuda for image_CHW in found)
    exact = torch.stack([ImageReader(clip).encoded(photo) for photo in photos])
    assert float((torch.stack(found).cpu() - exact).abs().mean()) < 0.02
