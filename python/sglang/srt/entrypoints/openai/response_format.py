"""OpenAI's `response_format`, and the constraints beside it, as fields of the sampling parameters.

For both OpenAI endpoints. What a schema may say is the scheduler's to check, when it compiles it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sglang.srt.entrypoints.generate_request_body import RAW_NULL
from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.entrypoints.request_fields import is_null

ANY_OBJECT = '{"type": "object"}'


class JsonSchemaFormat(msgspec.Struct, frozen=True):
    """`response_format.json_schema`; a schema always holds, `strict` or not.

    `schema` is JSON as the client wrote it; null: none.
    """

    name: str | None = None
    description: str | None = None
    schema: msgspec.Raw = RAW_NULL
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """`response_format`: `type` is "text", "json_object" or "json_schema"."""

    type: str
    json_schema: JsonSchemaFormat | None = None


def constraint_fields(
    response_format: ResponseFormat | None,
    json_schema: str | None,
    regex: str | None,
    ebnf: str | None,
) -> dict[str, Any]:
    """The constraint as `SamplingParams` names it; none where nothing or "" was given.

    Raises RequestError (400) for an unknown type, a schema that is missing, or two constraints.
    """
    given = {"json_schema": json_schema, "regex": regex, "ebnf": ebnf}
    fields = {name: text for name, text in given.items() if text}
    wanted = None if response_format is None else _schema_of(response_format)
    if wanted is None:
        return fields
    if fields:
        raise bad_field("response_format", f"{next(iter(fields))} is given as well")
    return {"json_schema": wanted}


def _schema_of(wanted: ResponseFormat) -> str | None:
    """The schema that a format asks for; None for plain text."""
    if wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.type != "json_schema":
        raise bad_field("response_format.type", f"{wanted.type!r} is not served")
    if wanted.json_schema is None or is_null(wanted.json_schema.schema):
        raise bad_field("response_format.json_schema.schema", "it is missing")
    try:
        return bytes(wanted.json_schema.schema).decode()
    except UnicodeDecodeError as error:
        raise bad_field(
            "response_format.json_schema.schema", f"it is not UTF-8 ({error.reason})"
        ) from None
