"""The bytes that each token stands for, so that text can be put together token by token.

Two families cover the models served here: byte-level BPE, whose tokens spell bytes in GPT-2's
printable alphabet, and sentencepiece-style vocabularies with byte fallback. For both, a text is
the concatenation of its tokens' bytes, read as UTF-8, which makes decoding local and exact. A
tokenizer of another make has no pieces (`TokenPieces.of` gives None) and is decoded by windows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import tokenizers

_SPACE_MARK = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "�"


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character of each byte, character -> byte.

    The printable bytes of Latin-1 stand for themselves, the others, in order, for the
    characters from U+0100 on. Source: the GPT-2 release's encoder.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in table)
    table.update({chr(0x100 + rank): byte for rank, byte in enumerate(others)})
    return table


def decode_available(data: bytes, *, final: bool, per_byte: bool) -> tuple[str, bytes]:
    """Read `data` as UTF-8 as far as it is known; give the text and the bytes still to wait for.

    An ill-formed sequence becomes one U+FFFD, or one for each of its bytes when `per_byte` (as
    sentencepiece does). At most 3 bytes, the start of a character, are left over; none when
    `final`.
    """
    parts: list[str] = []
    start = 0
    while True:
        try:
            parts.append(data[start:].decode())
        except UnicodeDecodeError as error:
            bad = start + error.start
            end = start + error.end
            parts.append(data[start:bad].decode())
            if end == len(data) and error.reason == "unexpected end of data" and not final:
                return "".join(parts), data[bad:]
            parts.append(_REPLACEMENT * (end - bad if per_byte else 1))
            start = end
        else:
            return "".join(parts), b""


class TokenPieces:
    """Token id -> bytes of one tokenizer.

    `per_byte`: how ill-formed bytes are replaced, see `decode_available`. `strip_first_space`:
    one space at the very beginning of a text belongs to the encoding and is not shown.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, byte_level: bool, strip_first_space: bool
    ) -> None:
        self.per_byte = not byte_level
        self.strip_first_space = strip_first_space
        self.special_ids = special_ids_of(backend)
        self._backend = backend
        self._alphabet = byte_level_alphabet() if byte_level else None
        self._known: dict[int, bytes] = {}

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> TokenPieces | None:
        """The pieces of `backend`, or None when its decoder is of neither known family."""
        steps = _decoder_steps(backend)
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return cls(backend, byte_level=True, strip_first_space=False)
        if kinds[:3] != ["Replace", "ByteFallback", "Fuse"]:
            return None
        if steps[0]["pattern"] != {"String": _SPACE_MARK} or steps[0]["content"] != " ":
            return None
        if len(steps) == 3:
            return cls(backend, byte_level=False, strip_first_space=False)
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        if steps[3:] == [strip]:
            return cls(backend, byte_level=False, strip_first_space=True)
        return None

    def piece(self, token_id: int) -> bytes:
        """The bytes of `token_id`; empty for an id that the tokenizer does not know."""
        piece = self._known.get(token_id)
        if piece is None:
            piece = self._known[token_id] = self._spell(token_id)
        return piece

    def join(self, token_ids: Iterable[int], *, skip_special_tokens: bool) -> bytes:
        """The bytes of `token_ids` in a row, special ones left out when so told."""
        if skip_special_tokens:
            special = self.special_ids
            return b"".join([self.piece(i) for i in token_ids if i not in special])
        return b"".join([self.piece(i) for i in token_ids])

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool) -> str:
        """The whole text of `token_ids`."""
        data = self.join(token_ids, skip_special_tokens=skip_special_tokens)
        text, _ = decode_available(data, final=True, per_byte=self.per_byte)
        return text.removeprefix(" ") if self.strip_first_space else text

    def _spell(self, token_id: int) -> bytes:
        if token_id < 0:
            return b""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet is not None:
            try:
                return bytes([self._alphabet[char] for char in token])
            except KeyError:
                return token.encode()
        byte_token = _BYTE_TOKEN.fullmatch(token)
        if byte_token is not None:
            return bytes([int(byte_token[1], 16)])
        return token.replace(_SPACE_MARK, " ").encode()


def special_ids_of(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """Ids of the tokens that `skip_special_tokens` leaves out."""
    added = backend.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return steps
