"""Token ids from JSON text, digits to int32 arrays: no Python object per id, no long lock.

A list of ten million ids is 65 MB of digits and commas. It is read in blocks of `BLOCK_BYTES`
with numpy, whose operations are short and let go of the interpreter lock, so a thread reads while
the event loop serves others. Called by request_body.py; pure.

How a block is read: runs of digits are found by their edges; the syntax holds when there is one
run more than commas and every comma stands between two runs. The value is the sum over places,
last digit first, each place gathered for all ids at once. A block that is not plain ids is looked
at again in `_complain`, element by element, to say what is wrong and where.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from sglang.srt.entrypoints.http_errors import bad_field, bad_json
from sglang.srt.errors import InvariantError, RequestError
from sglang.srt.managers.generate_request import IdArray

# One block's arrays take about 12 times its size and stay in a core's cache.
BLOCK_BYTES = 1 << 17
MAX_TOKEN_ID = int(np.iinfo(np.int32).max)
WHITESPACE = b" \t\r\n"
_MAX_DIGITS = 10
_EXCERPT_BYTES = 40
_TOKEN_ID = re.compile(rb"0|[1-9][0-9]{0,9}")
_INTEGER = re.compile(rb"-?(0|[1-9][0-9]*)")
_SPACES = re.compile(rb"[ \t\r\n]*")


@dataclass(frozen=True)
class IdLists:
    """Prompts as token ids, each int32 [n] and not empty; `is_batch`: a list of lists was sent."""

    arrays: tuple[IdArray, ...]
    is_batch: bool


def read_id_lists(name: str, text: bytes | bytearray, start: int, most: int) -> tuple[IdLists, int]:
    """The list of ids, or the list of such lists, whose "[" is text[start]; and where it ends.

    The syntax is checked here, to the closing bracket. Raises RequestError 400 naming `name` and
    the element that is no token id, an empty list, or more than `most` lists.
    """
    at = skip_space(text, start + 1)
    if text[at : at + 1] != b"[":
        ids, end = read_id_list(name, text, start)
        return IdLists((ids,), False), end
    arrays: list[IdArray] = []
    while True:
        if text[at : at + 1] != b"[":
            raise bad_field(name, f"element {len(arrays)} is not a list of token ids")
        if len(arrays) == most:
            raise bad_field(name, f"more than {most} prompts in one request, which is the limit")
        ids, at = read_id_list(f"{name}[{len(arrays)}]", text, at)
        arrays.append(ids)
        at = skip_space(text, at)
        mark = text[at : at + 1]
        if mark == b"]":
            return IdLists(tuple(arrays), True), at + 1
        if mark != b",":
            raise bad_json(f"expected a comma or ']' in '{name}' (byte {at})")
        at = skip_space(text, at + 1)


def read_id_list(name: str, text: bytes | bytearray, start: int) -> tuple[IdArray, int]:
    """The token ids of the list whose "[" is text[start], int32 [n], and where it ends.

    Needs an eighth more than the result's memory, and a few MiB. Raises RequestError 400 naming
    the first element that is no token id.
    """
    found = bytearray()  # grows in place; arrays to be joined would need twice as much at the end
    count, at = 0, start + 1
    while True:
        stop = _block_end(text, at)
        is_last = text[stop : stop + 1] != b","
        ids = _parse(np.frombuffer(text, np.uint8, stop - at, at)) if stop > at else None
        if ids is None:
            rest = bytes(text[at:stop]).strip(WHITESPACE)
            if not rest and is_last and not count and stop < len(text):
                raise bad_field(name, "the list of token ids is empty")
            _complain(name, text, at, stop, count)
        if stop == len(text):
            raise _endless(name)
        found += ids.data
        count, at = count + len(ids), stop + 1
        if is_last:
            return np.frombuffer(found, np.int32), at


def _block_end(text: bytes | bytearray, at: int) -> int:
    """Where the block from `at` on ends: the list's "]", else the last comma, else the text.

    Longer than `BLOCK_BYTES` only where there is no comma for so long (white space is legal).
    """
    size = BLOCK_BYTES
    while True:
        close = text.find(b"]", at, at + size)
        if close >= 0:
            return close
        if at + size >= len(text):
            return len(text)
        comma = text.rfind(b",", at, at + size)
        if comma >= 0:
            return comma
        size *= 2


def _endless(name: str) -> RequestError:
    return bad_json(f"the list '{name}' has no end")


def skip_space(text: bytes | bytearray, at: int) -> int:
    """The first position at or after `at` that is not JSON's white space."""
    found = _SPACES.match(text, at)
    return at if found is None else found.end()


def _parse(chars: npt.NDArray[np.uint8]) -> IdArray | None:
    """The ids of a comma-separated run of text; None when it is anything but that."""
    digits = chars - np.uint8(ord("0"))
    is_digit = digits < 10
    commas = np.flatnonzero(chars == ord(","))
    edges = np.flatnonzero(is_digit[1:] != is_digit[:-1]) + 1
    first = [0] if is_digit[0] else []
    last = [len(chars)] if is_digit[-1] else []
    edges = np.concatenate([first, edges, last]).astype(np.intp)
    starts, ends = edges[0::2], edges[1::2]
    if len(starts) != len(commas) + 1:
        return None
    spaces = len(chars) - int(np.count_nonzero(is_digit)) - len(commas)
    if spaces and not _are_spaces(chars, spaces, starts, ends, commas):
        return None
    lengths = ends - starts
    most = int(lengths.max())
    if most > _MAX_DIGITS or bool(((digits[starts] == 0) & (lengths > 1)).any()):
        return None
    wide = most == _MAX_DIGITS
    values: npt.NDArray[np.int64 | np.int32]
    values = digits[ends - 1].astype(np.int64 if wide else np.int32)
    for place in range(1, most):
        # Where an id has no such digit, the gather reads a neighbour (or, at the front, wraps).
        digit = digits[ends - (1 + place)]
        digit[lengths <= place] = 0
        values = values + digit.astype(values.dtype) * values.dtype.type(10**place)
    if wide and int(values.max()) > MAX_TOKEN_ID:
        return None
    return values.astype(np.int32, copy=False)


def _are_spaces(
    chars: npt.NDArray[np.uint8],
    count: int,
    starts: npt.NDArray[np.intp],
    ends: npt.NDArray[np.intp],
    commas: npt.NDArray[np.intp],
) -> bool:
    """Whether the `count` other characters are white space and no two runs lack their comma."""
    found = sum(int(np.count_nonzero(chars == char)) for char in WHITESPACE)
    if found != count:
        return False
    return bool(((commas >= ends[:-1]) & (commas < starts[1:])).all())


def _complain(name: str, text: bytes | bytearray, start: int, stop: int, index: int) -> NoReturn:
    """Raise for the first element of text[start:stop] that is no token id; it has one."""
    while True:
        comma = text.find(b",", start, stop)
        end = stop if comma < 0 else comma
        word = bytes(text[start:end]).strip(WHITESPACE)
        if not word and end == len(text):
            raise _endless(name)
        problem = _problem(word, bytes(text[end : end + 1]))
        if problem is not None:
            raise bad_field(name, f"element {index} {problem}")
        if comma < 0:
            raise InvariantError(f"a block of {stop - start} bytes is refused without a reason")
        start, index = comma + 1, index + 1


def _problem(word: bytes, after: bytes) -> str | None:
    """What is wrong with one element, None when it is a token id."""
    if _TOKEN_ID.fullmatch(word) and int(word) <= MAX_TOKEN_ID:
        return None
    shown = word[:_EXCERPT_BYTES].decode(errors="replace")
    shown += "..." if len(word) > _EXCERPT_BYTES else ""
    if not word:
        return f"is missing before {after.decode(errors='replace')!r}"
    if _INTEGER.fullmatch(word):
        return f"is {shown}: this token id is out of range (0 to {MAX_TOKEN_ID})"
    return f"is {shown}, but token ids must be integers"
