"""Calls about data sets as values: what is sent, how its answer is read. The upload itself is in `upload.py`.

Pure: nothing here knows a channel; both clients carry these out.
"""

from __future__ import annotations

from typing import Any

from cliptune.codec import LONG_S, Call
from cliptune.dataset import (
    Dataset,
    DatasetList,
    DatasetPreview,
    dataset_from_message,
    list_from_message,
    preview_from_message,
)
from cliptune.v1 import data_pb2


def begin_upload(request: data_pb2.BeginUploadRequest) -> Call[data_pb2.BeginUploadResponse]:
    """Asks which bytes of which files are there already."""
    return Call(
        method="DataService/BeginUpload",
        request=request,
        answer=data_pb2.BeginUploadResponse,
        parse=_itself,
        timeout_s=LONG_S,
    )


def finish_upload(upload_id: str) -> Call[Dataset]:
    """Answered when every checksum was found right and the data set is there."""
    return Call(
        method="DataService/FinishUpload",
        request=data_pb2.FinishUploadRequest(upload_id=upload_id),
        answer=data_pb2.FinishUploadResponse,
        parse=lambda answer: dataset_from_message(answer.dataset),
        timeout_s=LONG_S,
    )


def list_datasets() -> Call[DatasetList]:
    """All of them, by name."""
    return Call(
        method="DataService/ListDatasets",
        request=data_pb2.ListDatasetsRequest(),
        answer=data_pb2.ListDatasetsResponse,
        parse=list_from_message,
    )


def get_dataset(name: str, samples: int | None) -> Call[DatasetPreview]:
    """One, with sample rows."""
    return Call(
        method="DataService/GetDataset",
        request=data_pb2.GetDatasetRequest(name=name, samples=samples),
        answer=data_pb2.GetDatasetResponse,
        parse=preview_from_message,
    )


def delete_dataset(name: str) -> Call[None]:
    """Refused while a job that has not ended uses it."""
    return Call(
        method="DataService/DeleteDataset",
        request=data_pb2.DeleteDatasetRequest(name=name),
        answer=data_pb2.DeleteDatasetResponse,
        parse=lambda answer: None,
    )


def _itself(answer: Any) -> Any:
    return answer
