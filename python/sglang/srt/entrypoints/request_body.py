"""Request bodies: read under a byte limit, taken apart without building large Python objects.

A body is bytes until a field is needed: the top level is split into raw fields and each field is
decoded on its own. The long values of a long body, token ids and texts, are read beforehand in
pieces (body_outline.py), so that a thread does it while the event loop serves others. Called by
every POST door; never logs a body.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from sglang.srt.entrypoints.body_outline import Outline, take_long_values
from sglang.srt.entrypoints.http_errors import bad_field, bad_json
from sglang.srt.entrypoints.token_id_reader import WHITESPACE, IdLists
from sglang.srt.errors import RequestError

RawFields = dict[str, msgspec.Raw]
# A field's JSON text, or what was read already: a long text, token ids.
FieldValue = msgspec.Raw | str | IdLists
Fields = Mapping[str, FieldValue]
T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# Bodies up to here are parsed on the event loop: it takes less than a hop to a thread and back.
INLINE_PARSE_BYTES = 64 << 10
_RAW_FIELDS = msgspec.json.Decoder(RawFields)
_RAW_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_BYTE_NUMBER = re.compile(r"\(byte (\d+)\)")


class ClientGoneError(Exception):
    """The client closed the connection; nobody is left to reply to."""


async def read_body(request: Request, limit: int) -> bytearray:
    """The whole body, at most `limit` bytes.

    Raises RequestError 413 as soon as the limit is known to be passed, by Content-Length before
    a byte is read, or by count while a chunked body comes in; ClientGoneError when the client
    leaves.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return body


async def read_json_body(request: Request, limit: int) -> bytearray:
    """`read_body` for APIs that take application/json only; RequestError 400 for other types."""
    if content_type(request) != "application/json":
        raise bad_json("the content type must be application/json")
    return await read_body(request, limit)


def content_type(request: Request) -> str:
    """The type of a body, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _too_large(limit: int) -> RequestError:
    return RequestError(
        f"The request body is larger than the limit of {limit} bytes (--max-request-bytes).", 413
    )


async def off_loop(size: int, function: Callable[..., T], *args: Any) -> T:
    """Call `function(*args)`, in a thread when `size` bytes are too many for the event loop."""
    if size <= INLINE_PARSE_BYTES:
        return function(*args)
    return await asyncio.to_thread(function, *args)


def split_object(body: bytes | bytearray) -> RawFields:
    """The fields of the JSON object in `body`, syntax checked, values not decoded.

    Raises RequestError 400 for anything that is not one JSON object.
    """
    return _split(body, Outline())


def split_body(
    body: bytes | bytearray, *, ids_in: Iterable[str], text_in: Iterable[str], most_lists: int
) -> dict[str, FieldValue]:
    """`split_object` for a body that may be long: call it off the event loop.

    Of a body above `INLINE_PARSE_BYTES` the token ids in the fields `ids_in` come as `IdLists`
    (`most_lists` at most in one field) and the long texts in `text_in` as text. The peak of
    memory beside the body is its own size or, for text, four times that (a Python string takes 4
    bytes per character as soon as one is above U+FFFF).
    """
    if len(body) <= INLINE_PARSE_BYTES:
        return {**split_object(body)}
    outline = take_long_values(body, frozenset(ids_in), frozenset(text_in), most_lists)
    fields: dict[str, FieldValue] = {**_split(outline.rest, outline)}
    for name, value in outline.long_values.items():
        raw = fields.get(name)
        if isinstance(raw, msgspec.Raw) and bytes(memoryview(raw)[:5]) == b"null":
            fields[name] = value  # else the name comes again, and JSON's last one counts
    return fields


def _split(body: bytes | bytearray, outline: Outline) -> RawFields:
    if not body.strip(WHITESPACE):
        raise bad_json("the body is empty")
    try:
        return _RAW_FIELDS.decode(body)
    except RecursionError:
        raise bad_json("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise bad_json(f"it is not UTF-8 ({error.reason})") from None
    except msgspec.DecodeError as error:

        def original(found: re.Match[str]) -> str:
            return f"(byte {outline.original_position(int(found[1]))})"

        raise bad_json(_BYTE_NUMBER.sub(original, _plain(error))) from None


def decode_field(
    name: str, raw: bytes | bytearray | msgspec.Raw, decoder: msgspec.json.Decoder[T]
) -> T:
    """One field's value; raises RequestError 400 naming the field."""
    try:
        return decoder.decode(raw)
    except RecursionError:
        raise bad_field(name, "it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise bad_field(name, f"it is not UTF-8 ({error.reason})") from None
    except (msgspec.DecodeError, OverflowError) as error:
        raise bad_field(name, _plain(error)) from None


def _plain(error: Exception) -> str:
    text = str(error).removesuffix(".")
    return text if text.startswith("JSON") else text[:1].lower() + text[1:]


def first_char(raw: msgspec.Raw) -> bytes:
    """The first character of a raw value; tells text (") from lists ([) and numbers."""
    return bytes(memoryview(raw)[:1])


def list_kind(raw: msgspec.Raw) -> bytes:
    """The first character of a raw list's first element, b"]" when the list is empty."""
    view = memoryview(raw)
    position = 1
    while bytes(view[position : position + 1]) in (b" ", b"\t", b"\r", b"\n"):
        position += 1
    return bytes(view[position : position + 1])


def split_list(raw: msgspec.Raw) -> list[msgspec.Raw]:
    """The elements of a raw list, not decoded."""
    return _RAW_LIST.decode(raw)
