"""Where the long values of a JSON object are: found by hopping, read in pieces, cut out.

A parser in C holds the interpreter lock from the first byte of a body to the last, and so does
one that decodes a long string. Here the top level of a long body is walked over: token ids go to
token_id_reader.py, long strings are decoded piece by piece, and the short rest, in which each of
them is replaced by null, goes to the parser, which checks all other syntax. Called by
request_body.py; pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.entrypoints.token_id_reader import IdLists, read_id_lists, skip_space

# A shorter string is decoded faster than it is taken apart.
LONG_BYTES = 64 << 10
PIECE_BYTES = 1 << 20
_LONGEST_NAME = 1 << 10
_MARK = re.compile(rb'["\[\]{}]')
_SCALAR = re.compile(rb"[^\s,}\]]*")
# A byte that begins a character, with no escape so near before it that it could be part of one, or
# of the other half of its surrogate pair.
_CUT = re.compile(rb"(?<=[^\\]{6})[^\x80-\xbf]")
_TEXT = msgspec.json.Decoder(str)


@dataclass
class Outline:
    """A body without its long values: those by name, and the rest as JSON text.

    `cuts`: (place in `rest`, bytes that the original has more from there on).
    """

    long_values: dict[str, str | IdLists] = field(default_factory=dict)
    rest: bytes = b""
    cuts: list[tuple[int, int]] = field(default_factory=list)

    def original_position(self, place: int) -> int:
        """The byte of the body that byte `place` of `rest` stands for."""
        return place + sum(more for cut, more in self.cuts if cut <= place)


def take_long_values(
    body: bytes | bytearray, ids_in: frozenset[str], text_in: frozenset[str], most_lists: int
) -> Outline:
    """Read the lists of token ids in the fields `ids_in` and the long texts in `text_in`.

    Where the body is no JSON object the outline simply ends early: the parser says what is wrong
    with the rest. Raises RequestError 400 for ids that are none (see `read_id_lists`) and for
    strings that are none.
    """
    outline = Outline()
    parts: list[bytes | bytearray] = []
    done = length = 0
    for name, start in _values(body):
        opening = body[start : start + 1]
        if opening == b"[" and name in ids_in and _holds_ids(body, start):
            value, end = read_id_lists(name, body, start, most_lists)
            outline.long_values[name] = value
        elif opening == b'"' and name in text_in:
            end = _string_end(body, start + 1)
            if end - start < LONG_BYTES:
                continue
            outline.long_values[name] = decode_text(name, body, start, end)
        else:
            continue
        parts += [body[done:start], b"null"]
        length += start - done + len(b"null")
        outline.cuts.append((length, end - start - len(b"null")))
        done = end
    outline.rest = b"".join([*parts, body[done:]])
    return outline


def _holds_ids(body: bytes | bytearray, start: int) -> bool:
    """False for a list of texts: anything else that is no list of ids is the reader's to refuse."""
    inside = skip_space(body, start + 1)
    return body[inside : inside + 1] != b'"'


def _values(body: bytes | bytearray) -> Iterator[tuple[str, int]]:
    """Name and start of each value of the object, up to where it is no longer one."""
    at = skip_space(body, 0)
    opening = b"{"
    while body[at : at + 1] == opening:
        opening = b","
        quote = skip_space(body, at + 1)
        if body[quote : quote + 1] != b'"':
            return
        end = _string_end(body, quote + 1)
        colon = skip_space(body, end)
        if body[colon : colon + 1] != b":" or end - quote > _LONGEST_NAME:
            return
        try:
            name = _TEXT.decode(body[quote:end])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        start = skip_space(body, colon + 1)
        yield name, start
        at = skip_space(body, _value_end(body, start))


def _value_end(body: bytes | bytearray, start: int) -> int:
    """The end of the value at `start`, by its quotes and brackets alone; the text's end if none."""
    opening = body[start : start + 1]
    if opening == b'"':
        return _string_end(body, start + 1)
    if opening not in (b"[", b"{"):
        scalar = _SCALAR.match(body, start)
        return start if scalar is None else scalar.end()
    depth, at = 0, start
    while at < len(body):
        # In hops: a search holds the interpreter lock.
        mark = _MARK.search(body, at, at + PIECE_BYTES)
        if mark is None:
            at += PIECE_BYTES
            continue
        at = mark.end()
        if mark[0] == b'"':
            at = _string_end(body, at)
            continue
        depth += 1 if mark[0] in b"[{" else -1
        if depth == 0:
            return at
    return len(body)


def _string_end(body: bytes | bytearray, inside: int) -> int:
    """The position after the quote that ends the string; the text's end when there is none."""
    at = inside
    while True:
        quote = body.find(b'"', at)
        if quote < 0:
            return len(body)
        escapes = quote
        while body[escapes - 1] == ord("\\"):
            escapes -= 1
        if (quote - escapes) % 2 == 0:
            return quote + 1
        at = quote + 1


def decode_text(name: str, body: bytes | bytearray, start: int, end: int) -> str:
    """The text of the JSON string body[start:end], quotes included, decoded piece by piece.

    Needs the text's memory twice while the pieces are joined. Raises RequestError 400 naming
    `name` when it is no JSON string.
    """
    pieces: list[str] = []
    at = start + 1
    while True:
        cut = _CUT.search(body, at + PIECE_BYTES, end - 1) if end - at > PIECE_BYTES else None
        stop = end - 1 if cut is None else cut.start()
        try:
            pieces.append(_TEXT.decode(b'"' + body[at:stop] + b'"'))
        except UnicodeDecodeError as error:
            raise bad_field(name, f"it is not UTF-8 ({error.reason})") from None
        except msgspec.DecodeError as error:
            raise bad_field(name, f"it is no JSON string ({error})") from None
        if cut is None:
            return "".join(pieces)
        at = stop
