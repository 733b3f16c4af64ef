"""Where a long text may be cut so that its pieces' ids, joined, are the whole text's ids.

A tokenizer works word by word once its pre-tokenizer has cut the text into words, so a text may be
cut wherever the pre-tokenizer always cuts. `TextBorders.of` knows that for two families and gives
None for every other tokenizer, whose texts are then encoded whole:

- *words*: byte-level tokenizers whose patterns are known. Between a letter or digit and a space
  or punctuation mark every one of these patterns ends a match, and none of them looks back; the
  only look-ahead, `\\s+(?!\\S)`, is about white space, which never stands before a border. NFC
  changes nothing across it, because what follows starts a character and joins with none before.
- *marks*: sentencepiece-style BPE over the whole text, spaces written as U+2581. Merges are local:
  where no token of the vocabulary has the two neighbours in a row, no merge ever crosses.

Tokens that are found in the text before all else (special and added ones) must not cross a border
either; borders that could lie inside of one are passed over. Pure; used by tokenizer.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import models

from sglang.srt.tokenizer.pre_tokenizers import cutting_patterns

SPACE_MARK = "▁"

# Letters of scripts that have been complete since Unicode's first versions: no two libraries
# disagree on them, whatever tables they come with.
_LETTERS = "A-Za-zÀ-ÖØ-öø-ɏΑ-ΡΣ-Ωα-ωА-яא-תء-غف-ي" + "ก-ะぁ-ゖァ-ヺ一-龥가-힣"
# White space and punctuation that neither continues a word (as an apostrophe can) nor joins the
# character before it.
_ENDS = ' \n\r\t,.;:!?()\\[\\]{}"' + "，。、；：！？（）「」《》"
_WORD_BORDER = re.compile(rf"[{_LETTERS}0-9](?=[{_ENDS}])")
_MARK_BORDER = re.compile(rf"[{_LETTERS}0-9,.;:!?](?= [{_LETTERS}0-9])")
# Where a border is looked for: before the wanted end, then beyond it, in hops of this length.
_LOOK_BACK_CHARS = 1 << 12
_HOP_CHARS = 1 << 18


@dataclass(frozen=True)
class Piece:
    """text[start:end]; the next piece starts at `next_start` (a dropped space lies between)."""

    start: int
    end: int
    next_start: int


@dataclass(frozen=True)
class TextBorders:
    """The safe borders of one tokenizer.

    `border` finds the character before a border. `pairs` are two characters inside an added
    token, `not_before` characters that no border may have on its left. Where spaces are marked
    (`looks_beyond`), a border is before a space, and no added token may begin with it.
    `drops_space`: that space is left out, because the tokenizer puts a mark before every text it
    is given; then no added token may begin behind it either (`not_beyond`).
    """

    border: re.Pattern[str]
    pairs: frozenset[str]
    not_before: frozenset[str]
    looks_beyond: bool = False
    drops_space: bool = False
    not_beyond: frozenset[str] = frozenset()

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> TextBorders | None:
        """The borders of `backend`; None when no rule is known for it."""
        added = [*backend.get_added_tokens_decoder().values()]
        if any(token.single_word for token in added):
            return None
        model = backend.model  # not its state, which holds the whole vocabulary
        if isinstance(model, models.BPE) and model.dropout:
            return None
        contents = {token.content for token in added if token.content}
        contents |= {content.replace(SPACE_MARK, " ") for content in contents}
        pairs = frozenset(pair for content in contents for pair in _pairs(content))
        normalizers = _steps(backend.normalizer, "normalizers")
        steps = _steps(backend.pre_tokenizer, "pretokenizers")
        ends_open = frozenset(token.content[-1] for token in added if token.rstrip)
        if _cuts_words(steps) and all(step == {"type": "NFC"} for step in normalizers):
            return cls(_WORD_BORDER, pairs, ends_open)
        adds_mark = _marks_spaces(normalizers, steps)
        if adds_mark is None or not _merges_locally(model):
            return None
        crossing = _before_marks(backend.get_vocab(with_added_tokens=False))
        if crossing is None or " " in contents:
            return None
        if not adds_mark:
            return cls(_MARK_BORDER, pairs, crossing | ends_open, looks_beyond=True)
        first, last = (frozenset(content[at] for content in contents) for at in (0, -1))
        return cls(_MARK_BORDER, pairs, crossing | last, True, True, first)

    def pieces(self, text: str, size: int) -> Iterator[Piece]:
        """Pieces of about `size` characters, longer where there is no border; they cover `text`."""
        start = 0
        while start < len(text):
            end = self._cut_near(text, start, start + size)
            skipped = self.drops_space and end < len(text)
            yield Piece(start, end, end + skipped)
            start = end + skipped

    def _cut_near(self, text: str, start: int, wanted: int) -> int:
        if wanted >= len(text):
            return len(text)
        low = max(start, wanted - _LOOK_BACK_CHARS)
        last = None
        for cut in self._cuts(text, low, wanted):
            last = cut
        while last is None and wanted < len(text):
            last = next(self._cuts(text, wanted, wanted + _HOP_CHARS), None)
            wanted += _HOP_CHARS
        return len(text) if last is None else last

    def _cuts(self, text: str, low: int, high: int) -> Iterator[int]:
        """The borders after characters [low, high) of the text."""
        if low >= len(text):
            return
        # What the pattern looks ahead at is part of the window.
        for found in self.border.finditer(text, low, min(high + 2, len(text))):
            cut = found.end()
            before, after = text[cut - 1], text[cut]
            if before in self.not_before or before + after in self.pairs:
                continue
            if self.looks_beyond:
                beyond = text[cut + 1]
                if beyond in self.not_beyond or after + beyond in self.pairs:
                    continue
            yield cut


def _state(part: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(part.__getstate__())
    return state


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """What a normalizer or pre-tokenizer does in turn, sequences taken apart."""
    if part is None:
        return []
    todo, steps = [_state(part)], []
    while todo:
        step = todo.pop(0)
        if step["type"] == "Sequence":
            todo = [*step[name], *todo]
        else:
            steps.append(step)
    return steps


def _pairs(text: str) -> list[str]:
    return [text[i : i + 2] for i in range(len(text) - 1)]


def _cuts_words(steps: list[dict[str, Any]]) -> bool:
    """Whether every step works word by word and one of them cuts at each word's end."""
    patterns = cutting_patterns()
    cuts = False
    for step in steps:
        if step["type"] == "Split":
            regex = step["pattern"].get("Regex")
            if regex not in patterns or step["behavior"] != "Isolated" or step["invert"]:
                return False
            cuts = cuts or patterns[regex]
        elif step["type"] == "ByteLevel":
            if step["add_prefix_space"] or step is not steps[-1]:
                return False  # what comes after it would see bytes, not characters
            cuts = cuts or step["use_regex"]
        elif step["type"] != "Digits":
            return False
    return cuts


def _marks_spaces(normalizers: list[dict[str, Any]], steps: list[dict[str, Any]]) -> bool | None:
    """Whether a mark is put before every text; None when this is no such tokenizer."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prepend = {"type": "Prepend", "prepend": SPACE_MARK}
    if not steps or steps == [_split_at_spaces()]:
        if normalizers == [replace]:
            return False
        return True if normalizers == [prepend, replace] else None
    if normalizers or len(steps) != 1 or steps[0]["type"] != "Metaspace":
        return None
    # A piece begins with its space, so a mark is never added to one but the first.
    return False if steps[0]["replacement"] == SPACE_MARK else None


def _split_at_spaces() -> dict[str, Any]:
    """A step without effect where the normalizer has left no space."""
    pattern = {"String": " "}
    return {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}


def _merges_locally(model: models.Model) -> bool:
    if not isinstance(model, models.BPE) or model.ignore_merges:
        return False
    return not model.continuing_subword_prefix and not model.end_of_word_suffix


def _before_marks(vocab: Mapping[str, int]) -> frozenset[str] | None:
    """Characters that stand before a mark inside a token; None without a token for the mark.

    Without one, marks of two pieces could be fused into one unknown token.
    """
    if SPACE_MARK not in vocab:
        return None
    pair = re.compile(rf"(.)(?={SPACE_MARK})", re.DOTALL)
    inside = (token for token in vocab if SPACE_MARK in token[1:])
    return frozenset(found[1] for token in inside for found in pair.finditer(token))
