from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile
from astropy.io import fits
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_windowing
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from cliptune.errors import ConflictError, ImageDecodeError, ImageSizeError, SpecError
from cliptune_model.pixels import PixelLimits, decode_image
from cliptune_trainer.data.loading.decode import Decoder
from cliptune_trainer.image.reading import Reading
from tests.support import images

RAMP: Any = np.arange(64, dtype=np.uint16).reshape(8, 8)


def grey(encoded: bytes, window: str = "file", channels: tuple[int, ...] = ()) -> Any:
    """The pixels of an image that is read as grey, [H, W]."""
    pixels = np.asarray(Reading(window=window, channels=channels)(encoded).image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def rgb(encoded: bytes, window: str = "file", channels: tuple[int, ...] = ()) -> Any:
    return np.asarray(Reading(window=window, channels=channels)(encoded).image)


def unit(values: Any) -> Any:
    """[0, 1] → 0-255, as every window ends."""
    return np.floor(np.asarray(values, np.float64) * 255 + 0.5).astype(np.uint8)


def dicom(frames: Any, **fields: Any) -> bytes:
    """A DICOM file of grey pixels; fields replace or add attributes."""
    stored = np.asarray(frames)
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, "1.2.3"
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    if stored.ndim == 3:
        ds.NumberOfFrames = len(stored)
    ds.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    for name, value in fields.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def encoded_tiff(pixels: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def encoded_fits(*pixels: Any) -> bytes:
    buffer = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), *(fits.ImageHDU(each) for each in pixels)]).writeto(buffer)
    return buffer.getvalue()


# -- DICOM


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_a_dicom_file_is_rescaled_and_windowed_as_its_standard_says(function: str) -> None:
    stored = (RAMP * 30).astype(np.int16)
    window = {"WindowCenter": [40.0, 300.0], "WindowWidth": [400.0, 1500.0], "VOILUTFunction": function}
    encoded = dicom(stored, RescaleSlope="1.5", RescaleIntercept="-1024", **window)
    ds = pydicom.dcmread(io.BytesIO(encoded))
    # pydicom maps onto the range of the stored bits after rescaling: 12 signed ones here.
    low, high = -2048 * 1.5 - 1024, 2047 * 1.5 - 1024
    expected = (apply_windowing(apply_modality_lut(stored, ds), ds) - low) / (high - low)
    assert np.abs(grey(encoded).astype(int) - unit(expected)).max() <= 1
    assert len(np.unique(grey(encoded))) > 5


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm"])
def test_real_dicom_files_of_one_image_are_read_alike_however_they_are_compressed(name: str) -> None:
    path = get_testdata_file(name, download=False)
    plain = get_testdata_file("MR_small.dcm", download=False)
    assert isinstance(path, str)
    assert isinstance(plain, str)
    ds = pydicom.dcmread(plain)
    values = ds.pixel_array.astype(np.float64)
    centre, width = float(ds.WindowCenter), float(ds.WindowWidth)
    expected = unit(np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1))
    assert np.abs(grey(Path(path).read_bytes()).astype(int) - expected).max() <= 1


def test_monochrome1_is_inverted_and_padding_stays_black_and_out_of_the_range() -> None:
    stored = (RAMP * 10 + 1000).astype(np.int16)
    stored[0, 0] = -2000
    plain = grey(dicom(stored, PixelPaddingValue=-2000), "range")
    assert plain[0, 0] == 0
    assert (plain[0, 1], plain[7, 7]) == (0, 255)
    inverted = grey(dicom(stored, PixelPaddingValue=-2000, PhotometricInterpretation="MONOCHROME1"), "range")
    assert inverted[0, 0] == 0
    assert (inverted[0, 1], inverted[7, 7]) == (255, 0)


def test_a_window_in_hounsfield_units_holds_after_rescaling() -> None:
    stored = (RAMP * 64).astype(np.uint16)
    encoded = dicom(stored, RescaleSlope="1", RescaleIntercept="-1024", WindowCenter="500", WindowWidth="1")
    expected = np.clip((stored.astype(float) - 1024 - (40 - 200)) / 400, 0, 1)
    assert np.abs(grey(encoded, "40,400").astype(int) - unit(expected)).max() <= 1
    assert set(np.unique(grey(encoded))) == {0, 255}  # the file's own window of one unit


def test_full_is_all_that_the_stored_bits_can_hold() -> None:
    encoded = dicom((RAMP * 65).astype(np.uint16))
    assert np.abs(grey(encoded, "full").astype(int) - unit(RAMP * 65 / 4095)).max() <= 1
    assert grey(dicom((RAMP * 65).astype(np.uint16), BitsStored=16, HighBit=15), "full").max() == 15


def test_of_several_frames_the_first_is_read_or_those_that_are_named() -> None:
    frames = np.stack([RAMP, RAMP[::-1], RAMP.T]).astype(np.uint16)
    encoded = dicom(frames)
    assert (grey(encoded) == unit(RAMP / 63)).all()
    assert (grey(encoded, channels=(1,)) == unit(RAMP[::-1] / 63)).all()
    assert (rgb(encoded, channels=(2, 1, 0))[..., 0] == unit(RAMP.T / 63)).all()
    with pytest.raises(ImageDecodeError, match="3 planes"):
        grey(encoded, channels=(3,))


def test_an_enhanced_image_names_its_window_in_its_functional_groups() -> None:
    window, rescale, groups = Dataset(), Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth, window.VOILUTFunction = 0, 64, "LINEAR_EXACT"
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, -32, "US"
    groups.FrameVOILUTSequence, groups.PixelValueTransformationSequence = [window], [rescale]
    encoded = dicom(np.stack([RAMP, RAMP]), SharedFunctionalGroupsSequence=[groups])
    assert (grey(encoded) == unit(RAMP / 64)).all()


def test_colour_dicom_keeps_its_colours() -> None:
    path = get_testdata_file("examples_rgb_color.dcm", download=False)
    assert isinstance(path, str)
    encoded = Path(path).read_bytes()
    assert (rgb(encoded) == pydicom.dcmread(path).pixel_array).all()
    assert Reading()(encoded).depth == "8-bit"


@pytest.mark.parametrize("name", ["rtplan.dcm", "test-SR.dcm", "reportsi.dcm"])
def test_dicom_without_pixels_says_what_it_is(name: str) -> None:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    with pytest.raises(ImageDecodeError, match=r"no pixels: it is a .*(Plan|SR) Storage"):
        Reading()(Path(path).read_bytes())


@pytest.mark.parametrize("cut", [140, 400, -20])
def test_a_damaged_dicom_file_is_an_unreadable_image(cut: int) -> None:
    with pytest.raises(ImageDecodeError, match="DICOM"):
        Reading()(dicom(RAMP)[:cut])


# -- TIFF and PNG


def test_16_bit_grey_is_spread_over_its_range_alike_in_png_and_tiff() -> None:
    values = RAMP * 50 + 700
    png, tiff = io.BytesIO(), io.BytesIO()
    Image.fromarray(values).save(png, "PNG")
    Image.fromarray(values).save(tiff, "TIFF")
    for encoded in (png.getvalue(), tiff.getvalue(), encoded_tiff(values)):
        assert (grey(encoded) == unit(RAMP / 63)).all()
        assert (grey(encoded, "full") == values >> 8).all()
        assert (grey(encoded, "full") == np.asarray(decode_image(png.getvalue()))[..., 0]).all()
        assert (grey(encoded, "2275,3150") == unit(RAMP / 63)).all()
        assert Reading()(encoded).depth == "16-bit"


def test_percentiles_leave_hot_pixels_out() -> None:
    values = np.tile(np.arange(100, dtype=np.uint16) * 100 + 1000, (100, 1))
    values[0, 0] = 65_535
    low, high = np.percentile(values, [1, 99])
    expected = unit(np.clip((values.astype(float) - low) / (high - low), 0, 1))
    assert np.abs(grey(encoded_tiff(values), "percentile").astype(int) - expected).max() <= 1
    assert grey(encoded_tiff(values), "range").max() == 255
    assert np.median(grey(encoded_tiff(values), "range")) < 40


def test_channels_of_a_micrograph_are_chosen_and_windowed_each_by_itself() -> None:
    channels = np.stack([RAMP * scale for scale in (1, 10, 100, 1000, 7)]).astype(np.uint16)
    encoded = encoded_tiff(channels, photometric="minisblack", metadata={"axes": "CYX"})
    default = rgb(encoded)
    assert all((default[..., place] == unit(RAMP / 63)).all() for place in range(3))
    assert (grey(encoded, channels=(3,)) == unit(RAMP / 63)).all()
    assert rgb(encoded, "full", (0, 2, 4))[7, 7].tolist() == [0, 6300 >> 8, 441 >> 8]
    with pytest.raises(ImageDecodeError, match="5 planes"):
        grey(encoded, channels=(5,))


def test_colours_of_16_bits_share_one_window() -> None:
    colours = np.stack([RAMP, RAMP * 2, RAMP * 4], axis=-1).astype(np.uint16)
    pixels = rgb(encoded_tiff(colours, photometric="rgb"))
    assert pixels[7, 7].tolist() == unit([63 / 252, 126 / 252, 1]).tolist()


def test_of_depth_and_time_the_first_is_read() -> None:
    stack = np.stack([RAMP, RAMP[::-1]])[:, None].repeat(2, axis=1).astype(np.uint16)
    encoded = encoded_tiff(stack, imagej=True, metadata={"axes": "ZCYX"})
    assert (grey(encoded) == unit(RAMP / 63)).all()


def test_floats_have_a_range_and_no_full_one_and_missing_values_are_black() -> None:
    values = RAMP.astype(np.float32) * 3 - 7
    values[0, 0] = np.nan
    encoded = encoded_tiff(values)
    pixels = grey(encoded)
    assert (pixels[0, 0], pixels[0, 1], pixels[7, 7]) == (0, 0, 255)
    with pytest.raises(ImageDecodeError, match="no full range"):
        grey(encoded, "full")
    assert Reading()(encoded).depth == "32-bit float"


def test_ordinary_pictures_are_read_as_the_server_reads_them() -> None:
    for encoded in (images.png(), images.jpeg(), images.encoded(images.draw(), "TIFF")):
        assert (rgb(encoded, "40,400") == np.asarray(decode_image(encoded))).all()
        assert (rgb(encoded, channels=(2, 1, 0)) == np.asarray(decode_image(encoded))[..., ::-1]).all()
        assert (grey(encoded, channels=(1,)) == np.asarray(decode_image(encoded))[..., 1]).all()
        assert Reading()(encoded).depth == "8-bit"
    with pytest.raises(ImageDecodeError, match="plane 4"):
        grey(images.png(), channels=(4,))


def test_a_damaged_tiff_file_is_an_unreadable_image() -> None:
    planes = np.stack([RAMP] * 5)
    for whole in (encoded_tiff(planes), encoded_tiff(planes, compression="zlib"), encoded_tiff(RAMP)):
        pixels = rgb(whole)
        for cut in range(4, len(whole), 60):
            try:
                assert (rgb(whole[:cut]) == pixels).all()  # only what describes further planes is gone
            except ImageDecodeError:
                continue
    with pytest.raises(ImageDecodeError):
        Reading()(b"II*\0" + b"\xff" * 100)


def test_size_is_judged_before_pixels_are_decoded() -> None:
    limits = PixelLimits(max_pixels=63, max_side=100)
    for encoded in (dicom(RAMP), encoded_tiff(np.stack([RAMP] * 5)), encoded_fits(RAMP.astype(np.int16))):
        with pytest.raises(ImageSizeError):
            Reading()(encoded, limits)


# -- FITS


def test_a_fits_image_is_read_the_way_up_that_astronomers_show_it() -> None:
    values = RAMP.astype(np.float32) * 0.5
    values[3, 3] = np.nan
    pixels = grey(encoded_fits(values))
    expected = unit(RAMP / 63)[::-1].copy()
    expected[4, 3] = 0
    assert (pixels == expected).all()


def test_a_fits_cube_gives_the_planes_that_are_named() -> None:
    cube = np.stack([RAMP, RAMP * 2, RAMP.T, RAMP * 4]).astype(np.int16)
    assert (grey(encoded_fits(cube), channels=(2,)) == unit(RAMP.T / 63)[::-1]).all()
    assert (
        np.abs(grey(encoded_fits(cube), "64,128", (1,)) - unit(RAMP * 2 / 128)[::-1].astype(int)).max() <= 1
    )
    with pytest.raises(ImageDecodeError, match="no image"):
        grey(encoded_fits())


# -- what reads it


@pytest.mark.parametrize(
    ("module", "encoded", "extra"),
    [
        ("pydicom", dicom(RAMP), "medical"),
        ("tifffile", encoded_tiff(np.stack([RAMP] * 5)), "medical"),
        ("astropy.io.fits", encoded_fits(RAMP.astype(np.int16)), "fits"),
    ],
    ids=["pydicom", "tifffile", "astropy"],
)
def test_a_reader_that_is_not_installed_names_the_command(
    monkeypatch: pytest.MonkeyPatch, module: str, encoded: bytes, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConflictError, match=rf"pip install 'cliptune\[{extra}\]'"):
        Reading()(encoded)


@pytest.mark.parametrize("window", ["wide", "40", "40,0", "40,-1", "nan,3", "1,2,3", ""])
def test_a_window_that_is_none_is_refused(window: str) -> None:
    with pytest.raises(SpecError, match=r"data\.reading\.window"):
        Reading(window=window)


@pytest.mark.parametrize("channels", [(0, 1), (-1,), (0, 1, 2, 3)])
def test_channels_that_make_no_picture_are_refused(channels: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match=r"data\.reading\.channels"):
        Reading(channels=channels)


@pytest.mark.parametrize("exact", [True, False])
def test_the_decoder_reads_a_slice_like_the_picture_of_its_window(tmp_path: Path, exact: bool) -> None:
    stored = np.kron(RAMP, np.ones((12, 12), np.uint16)) * 60
    (tmp_path / "slice.dcm").write_bytes(dicom(stored))
    Image.fromarray(unit(stored / stored.max())).save(tmp_path / "picture.png")
    config = {
        "size": (32, 32),
        "mode": "RGB",
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    decoder = Decoder.of(config, exact=exact, reading=Reading(window="range"))
    difference = decoder(tmp_path / "slice.dcm").astype(int) - decoder(tmp_path / "picture.png")
    assert np.abs(difference).max() <= 1
