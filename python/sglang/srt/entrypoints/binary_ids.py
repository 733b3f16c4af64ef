"""Token ids that come as bytes: little-endian int32, as a whole body or as base64 in JSON.

Four bytes per id instead of about seven characters, and nothing to parse: the array is a view of
the body. That ids are in the vocabulary and fit the context is checked with those of every other
request. Called by generate_request_body.py and the door of /generate; pure.
"""

from __future__ import annotations

import binascii

import numpy as np

from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import IdArray

ID_BYTES = 4
# Characters decoded at once: a multiple of four, short enough to hold the interpreter lock for.
_BASE64_BLOCK = 1 << 20


def ids_of_body(body: bytes | bytearray) -> IdArray:
    """The ids of a binary body, int32 [n], without a copy.

    Raises RequestError 400 for a body that is empty or no whole number of ids.
    """
    if not body or len(body) % ID_BYTES:
        raise RequestError(
            f"A body of type application/octet-stream holds little-endian int32 token ids: "
            f"{len(body)} bytes are not a multiple of {ID_BYTES} above 0.",
            400,
            "BadRequestError",
        )
    return np.frombuffer(body, dtype="<i4")


def ids_of_base64(name: str, text: str) -> IdArray:
    """The ids of base64 text (RFC 4648, standard alphabet, padded), int32 [n].

    Needs the result's memory beside the text's. Raises RequestError 400 naming `name`.
    """
    if not text.isascii() or len(text) % 4:
        raise bad_field(name, f"{len(text)} characters are no base64 text with its padding")
    size = len(text) // 4 * 3 - len(text[-2:]) + len(text[-2:].rstrip("="))
    if size == 0 or size % ID_BYTES:
        raise bad_field(name, f"{size} bytes are not a multiple of {ID_BYTES} above 0")
    data = np.empty(size, np.uint8)
    for start in range(0, len(text), _BASE64_BLOCK):
        block = text[start : start + _BASE64_BLOCK]
        try:
            decoded = binascii.a2b_base64(block, strict_mode=True)
        except binascii.Error as error:
            raise bad_field(
                name, f"no base64 text from character {start} on ({str(error).lower()})"
            ) from None
        first = start // 4 * 3
        if first + len(decoded) != min(size, first + len(block) // 4 * 3):
            raise bad_field(name, "padding stands before the end")
        data[first : first + len(decoded)] = np.frombuffer(decoded, np.uint8)
    return data.view("<i4")
