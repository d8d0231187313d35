"""The OpenAPI page is whole: every reference resolves and every operation tells how it fails."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from cliptune.v1 import job_pb2, spec_pb2
from tests.server.gateway.bare import bare_app, client_of

PAGE: dict[str, Any] = bare_app().openapi()


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in PAGE["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from nodes(value)


def test_every_reference_resolves_and_no_mark_is_left() -> None:
    for node in nodes(PAGE):
        reference = node.get("$ref")
        if isinstance(reference, str):
            assert reference.removeprefix("#/components/schemas/") in PAGE["components"]["schemas"], reference
        assert "x-message" not in node
        assert "x-model" not in node


def test_every_operation_has_a_tag_a_summary_an_id_of_its_own_and_problems() -> None:
    tags = {tag["name"] for tag in PAGE["tags"]}
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(ids) == len(set(ids))
    for path, method, operation in operations():
        assert set(operation["tags"]) <= tags, path
        assert operation["tags"], path
        assert operation["summary"], path
        assert any(status.startswith("2") for status in operation["responses"]), (path, method)
        assert "HTTPValidationError" not in json.dumps(operation)
        for status, response in operation["responses"].items():
            if not status.startswith("2"):
                assert set(response["content"]) == {"application/problem+json"}, (path, status)


def test_every_path_parameter_is_described() -> None:
    for path, _, operation in operations():
        named = {part[1:-1] for part in path.split("/") if part.startswith("{")}
        assert named == {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}


def test_uploads_are_multipart_and_classify_takes_both_forms() -> None:
    upload = PAGE["paths"]["/v1/embed/images"]["post"]["requestBody"]["content"]
    assert set(upload) == {"multipart/form-data"}
    classify = PAGE["paths"]["/v1/classify"]["post"]["requestBody"]["content"]
    assert set(classify) == {"multipart/form-data", "application/json"}
    assert classify["application/json"]["schema"] == {"$ref": "#/components/schemas/ClassifyBody"}


def test_the_messages_of_the_contract_are_described_field_by_field() -> None:
    schemas = PAGE["components"]["schemas"]
    assert set(schemas["Job"]["properties"]) == set(job_pb2.Job.DESCRIPTOR.fields_by_name)
    assert set(schemas["JobSpec"]["properties"]) == set(spec_pb2.JobSpec.DESCRIPTOR.fields_by_name)
    assert "required" not in schemas["TrainSpec"]
    assert schemas["Job"]["properties"]["created"] == {"type": "string", "format": "date-time"}
    assert "JOB_STATE_RUNNING" in schemas["Job"]["properties"]["state"]["enum"]


async def test_the_page_is_served_and_bodies_have_examples() -> None:
    async with client_of(bare_app()) as client:
        served = (await client.get("/openapi.json")).json()
    assert served == json.loads(json.dumps(PAGE))
    for name in ("CreateJob", "EmbeddingsBody", "LearningRate"):
        assert served["components"]["schemas"][name]["examples"]


async def test_the_page_for_people_is_whole_without_a_network() -> None:
    async with client_of(bare_app()) as client:
        answer = await client.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    html = answer.text
    assert "<script" not in html
    assert re.findall(r"(?:src|href)=\"(?![#])([^\"]+)\"", html) == ["openapi.json"]
    ids = re.findall(r"id=\"([^\"]+)\"", html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"href=\"#([^\"]+)\"", html)) <= set(ids)
    for path, method, operation in operations():
        assert f"<b>{method.upper()}</b> <code>{path}</code>" in html
        assert operation["operationId"] in ids
    assert {"Job", "JobSpec", "Problem"} <= set(ids)
