"""Routes of uploaded data sets: `/v1/datasets`. How they get there is in `uploads.py`."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cliptune.errors import NotFoundError
from cliptune.v1 import data_pb2
from cliptune_server.datasets.datasets import DEFAULT_SAMPLES, MAX_SAMPLES
from cliptune_server.gateway.context import context_of
from cliptune_server.gateway.messages import DatasetJson, DatasetListJson, json_form
from cliptune_server.gateway.problems import problems

router = APIRouter(prefix="/v1/datasets", tags=["data"])
Name = Annotated[str, Path(description="The data set's name.", examples=["solar-cells"])]
Samples = Annotated[int, Query(ge=0, le=MAX_SAMPLES, description="Sample rows.")]
# What a data set holds never changes, but another one may get its name later.
_PICTURE_HEADERS: Final = {"Cache-Control": "private, max-age=300", "X-Content-Type-Options": "nosniff"}


class Sample(BaseModel):
    """A row."""

    row: int = Field(description="1 is the first.")
    fields: dict[str, str]
    picture: str | None = Field(
        description="Where a small JPEG of its image is. null: it could not be read, or only the trainer "
        "reads its format.",
        examples=["/v1/datasets/solar-cells/pictures/17?samples=8"],
    )


class Preview(BaseModel):
    """A data set with a look into it."""

    dataset: DatasetJson
    columns: list[str]
    rows: int = Field(description="-1: not counted.")
    samples: list[Sample] = Field(description="Spread evenly over the rows.")


@router.get("", summary="List data sets", response_model=DatasetListJson)
async def list_datasets(request: Request) -> Response:
    """Every finished one, with what all together take and may take."""
    return JSONResponse(json_form(await context_of(request).datasets.list()))


@router.get("/{name}", summary="Look into a data set", response_model=Preview, responses=problems(404))
async def get_dataset(request: Request, name: Name, samples: Samples = DEFAULT_SAMPLES) -> Response:
    """Its columns, how many rows it has, and some of them with small pictures."""
    found = await context_of(request).datasets.get(data_pb2.GetDatasetRequest(name=name, samples=samples))
    rows = [
        {
            "row": sample.row,
            "fields": {name: sample.fields[name] for name in found.columns if name in sample.fields},
            "picture": f"/v1/datasets/{name}/pictures/{sample.row}?samples={samples}"
            if sample.image.encoded
            else None,
        }
        for sample in found.samples
    ]
    return JSONResponse(
        {
            "dataset": json_form(found.dataset),
            "columns": list(found.columns),
            "rows": found.rows,
            "samples": rows,
        }
    )


@router.get(
    "/{name}/pictures/{row}",
    summary="Picture of a sample row",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}, "description": "A JPEG."}, **problems(404)},
)
async def get_picture(
    request: Request,
    name: Name,
    row: Annotated[int, Path(ge=1, description="As a look into the data set names it.")],
    samples: Samples = DEFAULT_SAMPLES,
) -> Response:
    """At most 192 pixels a side. Only of rows that a look with so many samples shows."""
    found = await context_of(request).datasets.get(data_pb2.GetDatasetRequest(name=name, samples=samples))
    for sample in found.samples:
        if sample.row == row and sample.image.encoded:
            return Response(sample.image.encoded, media_type="image/jpeg", headers=_PICTURE_HEADERS)
    raise NotFoundError(f"a look into {name} with {samples} samples has no picture of row {row}", row=row)


@router.delete("/{name}", summary="Delete a data set", status_code=204, responses=problems(404, 409))
async def delete_dataset(request: Request, name: Name) -> Response:
    """Also what was uploaded of one that is not finished. Refused while a job that has not ended uses it."""
    await context_of(request).datasets.delete(name)
    return Response(status_code=204)
