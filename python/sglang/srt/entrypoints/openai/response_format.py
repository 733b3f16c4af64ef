"""OpenAI's `response_format`, and the constraints beside it, as fields of the sampling parameters.

For both OpenAI endpoints. What a schema may say is the scheduler's to check, when it compiles it.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """`response_format`: `type` is "text", "json_object", "json_schema" or "structural_tag".

    The last has a `format`, or `structures` with `triggers`, as the client wrote them.
    """

    type: str
    json_schema: JsonSchemaFormat | None = None
    format: msgspec.Raw = RAW_NULL
    structures: msgspec.Raw = RAW_NULL
    triggers: msgspec.Raw = RAW_NULL


def constraint_fields(
    response_format: ResponseFormat | None, given: Mapping[str, str | None]
) -> dict[str, Any]:
    """The constraint as `SamplingParams` names it; none where nothing or "" was given.

    `given` are the fields beside the format. Raises RequestError (400) for an unknown type, a
    schema that is missing, or two constraints.
    """
    fields = {name: text for name, text in given.items() if text}
    wanted = {} if response_format is None else _wanted(response_format)
    if wanted and fields:
        raise bad_field("response_format", f"{next(iter(fields))} is given as well")
    return wanted or fields


def _wanted(wanted: ResponseFormat) -> dict[str, Any]:
    """What a format asks for; nothing for plain text."""
    if wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"json_schema": ANY_OBJECT}
    if wanted.type == "structural_tag":
        return {"structural_tag": _tag_of(wanted)}
    if wanted.type != "json_schema":
        raise bad_field("response_format.type", f"{wanted.type!r} is not served")
    if wanted.json_schema is None or is_null(wanted.json_schema.schema):
        raise bad_field("response_format.json_schema.schema", "it is missing")
    return {"json_schema": _decoded("json_schema.schema", wanted.json_schema.schema)}


def _tag_of(wanted: ResponseFormat) -> str:
    """A structural tag as JSON text."""
    parts = {"format": wanted.format, "structures": wanted.structures, "triggers": wanted.triggers}
    given = [f'"{k}": {_decoded(k, raw)}' for k, raw in parts.items() if not is_null(raw)]
    return f"{{{', '.join(given)}}}"


def _decoded(name: str, raw: msgspec.Raw) -> str:
    try:
        return bytes(raw).decode()
    except UnicodeDecodeError as error:
        raise bad_field(f"response_format.{name}", f"it is not UTF-8 ({error.reason})") from None
