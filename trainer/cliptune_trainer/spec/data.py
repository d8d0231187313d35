"""Where image-caption pairs come from: the spec's `[data]`, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from cliptune.spec_shape import LABEL_PLACE
from cliptune.v1 import spec_pb2
from cliptune_trainer.image.augment import NAMED, NONE, Augmentation
from cliptune_trainer.image.reading import Reading
from cliptune_trainer.spec.check import one_of, within, wrong

DECODES: Final = ("auto", "exact", "fast")
DUPLICATES: Final = ("notice", "drop", "refuse")
LEAKAGES: Final = ("refuse", "notice")
FORMS: Final = "a CSV, TSV, JSON lines or parquet file, a folder of images or of parquet files, or tar shards"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where image-caption pairs come from."""

    train: str
    validation: str = ""
    image_root: str = ""
    image_column: str = "image"
    caption_column: str = "caption"
    label_column: str = ""
    split_column: str = ""
    group_column: str = ""
    validation_fraction: float = 0.1
    max_bad_fraction: float = 0.01
    augment: Augmentation = NONE
    workers: int | None = None  # chosen by device, cores and rows
    decode: str = "auto"
    caption_templates: tuple[str, ...] = ()
    label_separator: str = ""  # an image has one label
    duplicates: str = "notice"
    leakage: str = "refuse"
    reading: Reading = field(default_factory=Reading)

    def __post_init__(self) -> None:
        if not self.train:
            raise wrong("data.train", "empty", FORMS)
        within("data.validation_fraction", self.validation_fraction, 0.0, 0.9)
        within("data.max_bad_fraction", self.max_bad_fraction, 0.0, 1.0)
        within("data.augment.rotate_degrees", self.augment.rotate_degrees, 0.0, 180.0)
        within("data.augment.crop_min_area", self.augment.crop_min_area, 0.0, 1.0)
        within("data.augment.brightness", self.augment.brightness, 0.0, 0.9)
        within("data.augment.contrast", self.augment.contrast, 0.0, 0.9)
        within("data.augment.saturation", self.augment.saturation, 0.0, 1.0)
        within("data.augment.hue", self.augment.hue, 0.0, 0.5)
        if self.workers is not None:
            within("data.workers", self.workers, 0, 256)
        one_of("data.decode", self.decode, DECODES)
        for place, template in enumerate(self.caption_templates):
            if LABEL_PLACE not in template:
                raise wrong(
                    f"data.caption_templates[{place}]", repr(template), f"a text with {LABEL_PLACE} in it"
                )
        one_of("data.duplicates", self.duplicates, DUPLICATES)
        one_of("data.leakage", self.leakage, LEAKAGES)


def data_config(data: spec_pb2.DataSpec) -> DataConfig:
    """The typed form of `DataSpec`; unset fields take their documented defaults. Raises `SpecError`."""
    return DataConfig(
        train=data.train,
        validation=data.validation,
        image_root=data.image_root,
        image_column=data.image_column or "image",
        caption_column=data.caption_column or "caption",
        label_column=data.label_column,
        split_column=data.split_column,
        group_column=data.group_column,
        validation_fraction=data.validation_fraction if data.HasField("validation_fraction") else 0.1,
        max_bad_fraction=data.max_bad_fraction if data.HasField("max_bad_fraction") else 0.01,
        augment=_augmentation(data),
        workers=data.workers if data.HasField("workers") else None,
        decode=data.decode or "auto",
        caption_templates=tuple(data.caption_templates),
        label_separator=data.label_separator,
        duplicates=data.duplicates or "notice",
        leakage=data.leakage or "refuse",
        reading=Reading(window=data.reading.window or "file", channels=tuple(data.reading.channels)),
    )


def _augmentation(data: spec_pb2.DataSpec) -> Augmentation:
    if not data.HasField("augment"):
        one_of("data.augmentation", data.augmentation or "none", tuple(NAMED))
        return NAMED[data.augmentation or "none"]
    if data.augmentation:
        raise wrong(
            "data.augmentation", repr(data.augmentation), "nothing beside data.augment, which says it in full"
        )
    wanted = data.augment
    return Augmentation(
        flip_horizontal=wanted.flip_horizontal,
        flip_vertical=wanted.flip_vertical,
        rotate_quarter=wanted.rotate_quarter,
        rotate_degrees=wanted.rotate_degrees,
        crop_min_area=wanted.crop_min_area or 1.0,
        brightness=wanted.brightness,
        contrast=wanted.contrast,
        saturation=wanted.saturation,
        hue=wanted.hue,
    )
