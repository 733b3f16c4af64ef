"""Log probabilities as the APIs show them: SGLang's entries and OpenAI's two shapes.

Works on the packed arrays that the engine sends; each function formats only what it is given, so
a stream formats every token once. Token texts come from a function, because /generate shows them
only on request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang.srt.managers.io_struct import LogprobArrays

# [logprob or None, token id, text or None]
Entry = list[Any]
TextOf = Callable[[int], str]
BytesOf = Callable[[int], bytes]

# What OpenAI reports for a token that cannot be sampled; JSON has no minus infinity.
OPENAI_FLOOR = -9999.0


def formatted_bytes(*parts: LogprobArrays | None) -> int:
    """About how many bytes the entries of `parts` take; decides where to format them."""
    entries = 0
    for arrays in parts:
        if arrays is not None:
            entries += arrays.num_rows * (1 + arrays.top_num + len(arrays.picked_ids) // 4)
    return 64 * entries


def token_entries(arrays: LogprobArrays | None, text_of: TextOf | None) -> list[Entry]:
    """One entry per row: the token itself. The very first prompt token has no log probability."""
    if arrays is None or arrays.num_rows == 0:
        return []
    return _entries(_ints(arrays.token_ids), _floats(arrays.logprobs), text_of)


def top_entries(arrays: LogprobArrays | None, text_of: TextOf | None) -> list[list[Entry] | None]:
    """Per row the most likely tokens, None where there are none (the very first prompt token)."""
    if arrays is None or arrays.num_rows == 0:
        return []
    shape = (arrays.num_rows, arrays.top_num)
    ids = _ints(arrays.top_ids).reshape(shape)
    logprobs = _floats(arrays.top_logprobs).reshape(shape)
    return _rows(ids, logprobs, text_of)


def picked_entries(
    arrays: LogprobArrays | None, text_of: TextOf | None
) -> list[list[Entry] | None]:
    """Per row the tokens of `token_ids_logprob`, in the client's order."""
    if arrays is None or arrays.num_rows == 0:
        return []
    ids = _ints(arrays.picked_ids)
    logprobs = _floats(arrays.picked_logprobs).reshape(arrays.num_rows, ids.size)
    return _rows(np.broadcast_to(ids, logprobs.shape), logprobs, text_of)


def _rows(
    ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32], text_of: TextOf | None
) -> list[list[Entry] | None]:
    empty = np.atleast_1d(np.isnan(logprobs).all(axis=1))
    return [
        None if empty[row] else _entries(ids[row], logprobs[row], text_of)
        for row in range(len(ids))
    ]


def _entries(
    ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32], text_of: TextOf | None
) -> list[Entry]:
    values = logprobs.tolist()
    return [
        [None if value != value else value, token_id, text_of(token_id) if text_of else None]
        for value, token_id in zip(values, ids.tolist(), strict=True)
    ]


def _ints(packed: bytes) -> npt.NDArray[np.int32]:
    return np.frombuffer(packed, "<i4")


def _floats(packed: bytes) -> npt.NDArray[np.float32]:
    return np.frombuffer(packed, "<f4")


# ---- OpenAI -----------------------------------------------------------------------------------


def chat_content(arrays: LogprobArrays | None, bytes_of: BytesOf) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat choice: one object per output token."""
    tops = top_entries(arrays, None) if arrays is not None and arrays.top_num else []
    content = []
    for row, (logprob, token_id, _) in enumerate(token_entries(arrays, None)):
        item = _chat_token(logprob, token_id, bytes_of)
        top = tops[row] if tops else None
        item["top_logprobs"] = [_chat_token(value, i, bytes_of) for value, i, _ in top or []]
        content.append(item)
    return content


def _chat_token(logprob: float | None, token_id: int, bytes_of: BytesOf) -> dict[str, Any]:
    raw = bytes_of(token_id)
    return {
        "token": raw.decode(errors="replace"),
        "bytes": list(raw),
        "logprob": _finite(logprob),
    }


def _finite(logprob: float | None) -> float:
    return OPENAI_FLOOR if logprob is None or logprob < OPENAI_FLOOR else logprob


class CompletionLogprobs:
    """`logprobs` of completion choices, with text offsets that run on over a stream's chunks.

    An offset is where the token's own text starts in the joined texts of all tokens shown so far.
    """

    def __init__(self, text_of: TextOf) -> None:
        self._text_of = text_of
        self._offset = 0

    def add(self, *parts: LogprobArrays | None) -> dict[str, Any]:
        """The object for the next tokens (those of a prompt first, when it is echoed)."""
        tokens: list[str] = []
        logprobs: list[float | None] = []
        offsets: list[int] = []
        tops: list[dict[str, float] | None] = []
        wants_top = any(part is not None and part.top_num for part in parts)
        for part in parts:
            for logprob, _, text in token_entries(part, self._text_of):
                tokens.append(text)
                logprobs.append(None if logprob is None else _finite(logprob))
                offsets.append(self._offset)
                self._offset += len(text)
            if part is not None and part.top_num:
                tops.extend(_by_text(row) for row in top_entries(part, self._text_of))
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "text_offset": offsets,
            "top_logprobs": tops if wants_top else None,
        }


def _by_text(row: list[Entry] | None) -> dict[str, float] | None:
    if row is None:
        return None
    result: dict[str, float] = {}
    for logprob, _, text in row:
        result.setdefault(text, _finite(logprob))  # ids with one text: the likeliest counts
    return result
