"""Errors as HTTP replies: one place that knows the API families' shapes and statuses.

Every door turns a `RequestError` into a reply with these functions, before a stream has begun or
inside it. Nothing here decides what an error is.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from sglang.srt.errors import RequestError

_TYPE_OF_STATUS = {
    400: "BadRequest",
    401: "Unauthorized",
    404: "NotFoundError",
    413: "RequestEntityTooLarge",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailable",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_RETRYABLE = frozenset({429, 503})


class ApiShape(enum.Enum):
    """Whose error format a door speaks."""

    NATIVE = "native"
    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"
    OLLAMA = "ollama"


class JsonResponse(Response):
    """A JSON reply; NaN and infinities become null, as JSON has neither."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode with orjson; numpy arrays are allowed."""
        return dump_json(content)


def dump_json(content: Any) -> bytes:
    """Encode as JSON; numpy arrays and non-string keys are allowed."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)


def error_type(error: RequestError) -> str:
    """The error's own type name, or the usual one of its status."""
    return error.err_type or _TYPE_OF_STATUS.get(error.http_status, "BadRequest")


def error_body(shape: ApiShape, error: RequestError) -> dict[str, Any]:
    """The reply's JSON object for an error that comes before any output."""
    if shape is ApiShape.NATIVE:
        return {"error": {"message": error.message}}
    if shape is ApiShape.RESPONSES:
        kind = "invalid_request_error" if error.http_status < 500 else "server_error"
        return {"error": {"message": error.message, "type": kind, "param": None, "code": None}}
    if shape is ApiShape.OLLAMA:
        return {"error": error.message}
    if shape is ApiShape.ANTHROPIC:
        usual = "invalid_request_error" if error.http_status < 500 else "api_error"
        kind = _ANTHROPIC_TYPES.get(error.http_status, usual)
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    return {
        "object": "error",
        "message": error.message,
        "type": error_type(error),
        "param": None,
        "code": error.http_status,
    }


def error_response(
    shape: ApiShape, error: RequestError, headers: Mapping[str, str] | None = None
) -> Response:
    """The whole reply for an error that comes before any output."""
    return JsonResponse(error_body(shape, error), status_code=error.http_status, headers=headers)


def unauthorized(shape: ApiShape) -> Response:
    """The reply to a request without the key."""
    if shape is ApiShape.ANTHROPIC:
        return error_response(shape, RequestError("The API key is missing or wrong.", 401))
    return JsonResponse({"error": "Unauthorized"}, status_code=401)


def stream_error(shape: ApiShape, error: RequestError) -> dict[str, Any]:
    """The object of the one event that ends a stream which had already begun."""
    if shape is ApiShape.OPENAI:
        return {"error": error_body(shape, error)}
    if shape in (ApiShape.ANTHROPIC, ApiShape.OLLAMA):
        return error_body(shape, error)
    return {
        "error": {
            "message": error.message,
            "type": "invalid_request_error" if error.http_status < 500 else error_type(error),
            "code": error.http_status,
            "retryable": error.http_status in _RETRYABLE,
        }
    }


def bad_field(name: str, problem: str) -> RequestError:
    """A 400 that names the field; `problem` is what is wrong with it, without a full stop."""
    return RequestError(f"Invalid value for '{name}': {problem}.", 400, "BadRequestError")


def bad_json(problem: str) -> RequestError:
    """A 400 for a body that is not the JSON object that every door expects."""
    return RequestError(f"Invalid JSON in the request body: {problem}.", 400, "Bad Request")
