"""Request bodies: read under a byte limit, taken apart without building large Python objects.

A body is bytes until a field is needed: the top level is split into raw fields, each field is
decoded on its own, and token ids go from JSON text straight into int32 arrays. Called by every
POST door; never logs a body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

import msgspec
import numpy as np
from starlette.requests import Request

from sglang.srt.entrypoints.http_errors import bad_field, bad_json
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import IdArray

RawFields = dict[str, msgspec.Raw]
T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# Bodies up to here are parsed on the event loop: it takes less than a hop to a thread and back.
INLINE_PARSE_BYTES = 64 << 10
_ID_BLOCK_BYTES = 1 << 20
_ID_CHARS = b"0123456789,- \t\r\n"
_WHITESPACE = b" \t\r\n"
_RAW_FIELDS = msgspec.json.Decoder(RawFields)
_RAW_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_INT32 = np.iinfo(np.int32)


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
    if not body.strip(_WHITESPACE):
        raise bad_json("the body is empty")
    try:
        return _RAW_FIELDS.decode(body)
    except RecursionError:
        raise bad_json("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise bad_json(f"it is not UTF-8 ({error.reason})") from None
    except msgspec.DecodeError as error:
        raise bad_json(_plain(error)) from None


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
    return text[:1].lower() + text[1:]


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


def read_token_ids(name: str, raw: msgspec.Raw) -> IdArray:
    """Token ids of a raw JSON list of integers, int32 [n].

    Raises RequestError 400 naming `name` when the list is empty, holds anything but integers, or
    an integer that no vocabulary has. The syntax was checked when the body was split, so inside
    the brackets only the characters have to be looked at.
    """
    view = memoryview(raw)
    if bytes(view[:1]) != b"[":
        raise bad_field(name, "expected a list of token ids")
    inner = bytes(view[1:-1]).strip(_WHITESPACE)
    if not inner:
        raise bad_field(name, "the list of token ids is empty")
    if inner.translate(None, _ID_CHARS):
        raise bad_field(name, "token ids must be integers")
    ids = np.empty(inner.count(b",") + 1, np.int32)
    filled = 0
    start = 0
    # In blocks: parsing holds the interpreter lock, and the event loop wants it in between.
    while start < len(inner):
        end = inner.find(b",", start + _ID_BLOCK_BYTES)
        end = len(inner) if end < 0 else end
        block = np.fromstring(inner[start:end], dtype=np.int64, sep=",")
        wrong = block[(block < 0) | (block > _INT32.max)]
        if wrong.size:
            raise bad_field(name, f"token id {wrong[0]} is out of range")
        ids[filled : filled + block.size] = block
        filled += block.size
        start = end + 1
    return ids
