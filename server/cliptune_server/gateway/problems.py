"""Exceptions as problem+json answers (RFC 9457).

In: whatever a route raised. Out: a Response whose status and `reason` follow the error table. Used by the
app's exception handlers, by the middleware and by event streams. Nothing of a stack ever reaches a body.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from cliptune.durable import is_disk_full
from cliptune.errors import (
    CliptuneError,
    DiskFullError,
    InternalError,
    InvalidInputError,
    NotFoundError,
    TextError,
)
from cliptune.wire import PROBLEM_MEDIA_TYPE, problem

_MAX_SHOWN: Final = 5
# These protocols have error forms of their own.
_OPEN_INFERENCE_PATH: Final = "/v2"
_OPENAI_PATHS: Final = ("/v1/embeddings", "/v1/models")
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_log = logging.getLogger(__name__)


class Problem(BaseModel):
    """An error, as `application/problem+json` (RFC 9457)."""

    type: str = Field(description="A URN that names the class of the error.")
    title: str
    status: int
    detail: str = Field(description="What was wrong, with the value in it.")
    reason: str = Field(description="The error's class in the SDK.", examples=["ImageDecodeError"])
    metadata: dict[str, str] = Field(description="For a program: `path`, `allowed`, `limit`, ...")
    instance: str = Field(default="", description="The path that was asked for.")
    error: dict[str, str | None] | None = Field(
        default=None, description="The same in OpenAI's form, on the paths that are OpenAI's."
    )


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route that can fail with these statuses."""
    return {status: {"description": _TITLES[status], "model": Problem} for status in statuses}


_TITLES: Final[Mapping[int, str]] = {
    400: "The request is wrong; sending it again will not help.",
    404: "What was named does not exist.",
    403: "A path outside the folders that the daemon may read.",
    409: "The state of things does not allow it.",
    413: "More items or bytes than one request may hold.",
    422: "A field of the spec is unknown or out of range: `metadata.path`, `metadata.allowed`.",
    429: "No room now.",
    507: "It does not fit on the disk or into the quota.",
    503: "The daemon or its engine is away; safe requests may be sent again.",
    504: "Not done in the time of `X-Request-Timeout-S`.",
}


def problem_response(
    error: CliptuneError, path: str, *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """The answer that an error is. `status` overrides the table's, for what only HTTP knows (405)."""
    body = problem(error, path)
    if status is not None:
        body["status"] = status
    if path.startswith(_OPENAI_PATHS):
        body["error"] = openai_error(error, body["status"])
    sent = dict(headers or {})
    if "retry_after_s" in error.metadata:
        # Whole seconds by the standard, and 0 would mean: at once.
        sent["Retry-After"] = str(math.ceil(float(error.metadata["retry_after_s"])))
    if body["status"] == 413:  # the rest of the body may still be on its way, and nobody will read it
        sent["Connection"] = "close"
    code = body["status"]
    if path.startswith(_OPEN_INFERENCE_PATH):
        return Response(
            json.dumps({"error": error.message}), code, headers=sent, media_type="application/json"
        )
    return Response(json.dumps(body, allow_nan=False), code, headers=sent, media_type=PROBLEM_MEDIA_TYPE)


def openai_error(error: CliptuneError, status: int) -> dict[str, str | None]:
    """The error as OpenAI's clients read it."""
    kind = (
        "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    )
    return {
        "message": error.message,
        "type": kind,
        "param": error.metadata.get("path") or ("model" if "model" in error.metadata else None),
        "code": type(error).__name__,
    }


def unexpected(error: BaseException, where: str) -> CliptuneError:
    """What the caller hears of an exception that nobody translated; the log has the rest."""
    if isinstance(error, OSError) and is_disk_full(error):
        return DiskFullError(f"no space left: {error.strerror}")
    _log.error("unexpected exception in %s", where, exc_info=error)
    return InternalError("the daemon failed unexpectedly; its log says more")


def invalid(errors: Sequence[Mapping[str, Any]], hint: str = "") -> InvalidInputError:
    """What a validation found, as one error: the first places in its message, the very first as `path`."""
    told = [f"{_place(error['loc'])}: {error['msg']}" for error in errors[:_MAX_SHOWN]]
    if len(errors) > _MAX_SHOWN:
        told.append(f"and {len(errors) - _MAX_SHOWN} more")
    return InvalidInputError("; ".join(told) + hint, path=_place(errors[0]["loc"]))


async def on_cliptune_error(request: Request, error: Exception) -> Response:
    """Handler of CliptuneError."""
    if not isinstance(error, CliptuneError):
        raise error
    return problem_response(error, request.url.path)


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Handler of what FastAPI or pydantic refused."""
    if not isinstance(error, RequestValidationError | ValidationError):
        raise error
    media_type = request.headers.get("content-type", "").partition(";")[0]
    if error.errors()[0]["type"] == "json_invalid":
        told = error.errors()[0]
        place = told["loc"][-1] if len(told["loc"]) > 1 else "?"
        why = told.get("ctx", {}).get("error", told["msg"])
        refused = InvalidInputError(f"the body is not JSON: {why} (character {place})", path="body")
        return problem_response(refused, request.url.path)
    hint = ""
    if request.method in ("POST", "PUT") and media_type not in ("application/json", "multipart/form-data"):
        hint = f" (the body came as {media_type or 'no type'}; JSON needs Content-Type: application/json)"
    return problem_response(invalid(error.errors(), hint), request.url.path)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Handler of what Starlette raises by itself: unknown routes, wrong methods, unreadable bodies."""
    if not isinstance(error, HTTPException):
        raise error
    path = request.url.path
    if isinstance(error.__cause__, CliptuneError):  # raised while the body was being read
        return problem_response(error.__cause__, path)
    if error.status_code == 404:
        return problem_response(NotFoundError(f"nothing is at {path}; /docs lists what there is"), path)
    if error.status_code == 405:
        allowed = ", ".join(_methods(request))
        refused = InvalidInputError(f"{path} does not take {request.method}, but {allowed}", allowed=allowed)
        return problem_response(refused, path, status=405, headers={"Allow": allowed})
    if error.status_code >= 500:
        return problem_response(unexpected(error, path), path)
    cause = f": {error.__cause__}" if error.__cause__ is not None else ""
    return problem_response(InvalidInputError(f"{error.detail}{cause}"), path)


async def on_unicode_error(request: Request, error: Exception) -> Response:
    """Handler of texts that JSON can write and Unicode does not know: lone surrogates."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    refused = TextError(f"a text in the request is no Unicode text: {error.reason}")
    return problem_response(refused, request.url.path)


def _methods(request: Request) -> list[str]:
    """What the path takes. Starlette's own answer knows the first of its routes alone."""
    found = []
    for method in _METHODS:
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            found.append(method)
    return found


def _place(location: Sequence[Any]) -> str:
    """("body", "input", "<list>", 3) → "input[3]". What stands in <> names a branch of a union."""
    steps = [
        step
        for i, step in enumerate(location)
        if not (i == 0 and step in ("body", "query", "path", "header")) and not str(step).startswith("<")
    ]
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return place.removeprefix(".") or "body"
