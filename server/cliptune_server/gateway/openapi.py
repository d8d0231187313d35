"""The OpenAPI page: what FastAPI derives, completed.

FastAPI knows the pydantic bodies; the messages of the contract come from their descriptors (`messages.py`),
and every operation answers errors as problem+json, not in FastAPI's own form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from cliptune.priority import HEADER
from cliptune.wire import PROBLEM_MEDIA_TYPE
from cliptune_server.gateway.forms import ClassifyBody
from cliptune_server.gateway.messages import MESSAGE_KEY, schemas
from cliptune_server.gateway.middleware import TIMEOUT_HEADER

MODEL_KEY: Final = "x-model"
TAGS: Final = [
    {"name": "inference", "description": "Embeddings and what follows from them, batched across callers."},
    {"name": "open inference", "description": "The Open Inference Protocol, version 2."},
    {"name": "jobs", "description": "Fine-tuning jobs: create, watch, control."},
    {"name": "models", "description": "Published models: immutable versions under a name, movable aliases."},
    {"name": "data", "description": "Data sets that lie with the daemon, and uploads of them."},
    {"name": "health", "description": "For machines."},
]
_METHODS: Final = ("get", "put", "post", "delete")
_PROBLEM: Final = {
    "description": "An error; `reason` names its class.",
    "content": {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
_TIMEOUT: Final = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "required": False,
    "description": "Seconds within which the answer must begin; 504 otherwise.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
_PRIORITY: Final = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "description": "`bulk`: whatever is interactive goes first.",
    "schema": {"type": "string", "enum": ["interactive", "bulk"], "default": "interactive"},
}


def openapi_of(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """What to set as `app.openapi`: the page, made once."""

    def page() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(
                get_openapi(
                    title=app.title,
                    version=app.version,
                    summary=app.summary,
                    description=app.description,
                    routes=app.routes,
                    tags=TAGS,
                )
            )
        return app.openapi_schema

    return page


def _complete(page: dict[str, Any]) -> dict[str, Any]:
    components = page["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        components.pop(unused, None)
    classify = ClassifyBody.model_json_schema(ref_template="#/components/schemas/{model}")
    components.update(classify.pop("$defs", {}))
    components["ClassifyBody"] = classify
    components.update(schemas())
    for path, item in page["paths"].items():
        for method in _METHODS:
            if method in item:
                _complete_operation(path, item[method])
    resolved: dict[str, Any] = _resolve(page)
    return resolved


def _complete_operation(path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    validation = responses.get("422", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if str(validation.get("$ref", "")).endswith("HTTPValidationError"):
        del responses["422"]
    for status, response in responses.items():
        if int(status) >= 400:
            response["content"] = _PROBLEM["content"]
    responses["default"] = _PROBLEM
    if path.startswith("/v1/"):
        operation.setdefault("parameters", []).append(_TIMEOUT)
        if "inference" in operation["tags"]:
            operation["parameters"].append(_PRIORITY)


def _resolve(node: Any) -> Any:
    """A copy in which every mark of a message or a body is a reference to its schema."""
    if isinstance(node, list):
        return [_resolve(each) for each in node]
    if not isinstance(node, dict):
        return node
    for key in (MESSAGE_KEY, MODEL_KEY):
        if key in node:
            kept = {name: value for name, value in node.items() if name in ("description", "examples")}
            return {"$ref": f"#/components/schemas/{node[key].rpartition('.')[2]}", **kept}
    return {key: _resolve(value) for key, value in node.items()}
