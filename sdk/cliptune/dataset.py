"""Uploaded data sets as the user sees them: frozen dataclasses over the messages of `data.proto`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cliptune.v1 import data_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """A data set that lies with the daemon, whole. It never changes."""

    name: str
    created: datetime | None
    files: int
    bytes: int
    entry: str
    """The table, shard pattern or folder among its files that a job reads. Empty: all of them."""
    sha256: str
    """Over paths, sizes and checksums of all files, in hex."""
    message: data_pb2.Dataset = field(repr=False, compare=False)

    @property
    def reference(self) -> str:
        """ "dataset:NAME", as `data.train` takes it."""
        return f"dataset:{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetList:
    """All data sets of a daemon, by name."""

    datasets: tuple[Dataset, ...]
    used_bytes: int
    """What they and what is uploaded of others take together."""
    quota_bytes: int
    """What they may take. 0: no limit."""
    message: data_pb2.ListDatasetsResponse = field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.datasets)

    def __iter__(self) -> Iterator[Dataset]:
        return iter(self.datasets)

    def __getitem__(self, index: int) -> Dataset:
        return self.datasets[index]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRow:
    """A row of a data set."""

    row: int
    """1 is the first."""
    fields: dict[str, str]
    jpeg: bytes | None = field(repr=False)
    """A small picture of its image. None: it could not be read, or only the trainer reads its format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetPreview:
    """A data set with a look into it."""

    dataset: Dataset
    columns: tuple[str, ...]
    rows: int
    """-1: not counted."""
    samples: tuple[SampleRow, ...]
    """Spread evenly over the rows."""
    message: data_pb2.GetDatasetResponse = field(repr=False, compare=False)


def dataset_from_message(message: data_pb2.Dataset) -> Dataset:
    """The view of a `Dataset`."""
    return Dataset(
        name=message.name,
        created=message.created.ToDatetime(tzinfo=UTC) if message.HasField("created") else None,
        files=message.files,
        bytes=message.bytes,
        entry=message.entry,
        sha256=message.sha256,
        message=message,
    )


def list_from_message(message: data_pb2.ListDatasetsResponse) -> DatasetList:
    """The view of a `ListDatasetsResponse`."""
    return DatasetList(
        datasets=tuple(dataset_from_message(each) for each in message.datasets),
        used_bytes=message.used_bytes,
        quota_bytes=message.quota_bytes,
        message=message,
    )


def preview_from_message(message: data_pb2.GetDatasetResponse) -> DatasetPreview:
    """The view of a `GetDatasetResponse`."""
    return DatasetPreview(
        dataset=dataset_from_message(message.dataset),
        columns=tuple(message.columns),
        rows=message.rows,
        samples=tuple(
            SampleRow(
                row=sample.row,
                fields=dict(sample.fields),
                jpeg=sample.image.encoded if sample.image.encoded else None,
            )
            for sample in message.samples
        ),
        message=message,
    )
