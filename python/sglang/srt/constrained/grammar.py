"""Grammars over a model's vocabulary: which tokens may follow, given those that a request has.

The one place that knows the llguidance library. `GrammarCompiler` calls it from threads of its own,
the samplers ask a request's `TokenMatcher` once a step. Knows no request and no tensor. What is
served and what not: docs/structured_outputs.md.

Legend: V tokens of the model's vocabulary, W = ceil(V / 32) words of a mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from sglang.srt.constrained.structural_tag import NO_SPECIAL_TOKENS, SpecialTokens, lark_of
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import VocabularyReq
from sglang.srt.sampling.sampling_params import FREE_TEXT, Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

Int32Array = npt.NDArray[np.int32]
BitArray = npt.NDArray[np.uint8]
IdArray = npt.NDArray[np.int64]

# Of one grammar: a state takes one or two kilobytes. The other limits are the library's.
_MAX_LEXER_STATES = 50_000
_MESSAGE_CHARS = 400


@dataclass(frozen=True, slots=True)
class JsonStyle:
    """How JSON may be laid out: `compact` without any whitespace outside of strings, else with
    what `whitespace_pattern`, a regular expression, allows (None: any)."""

    compact: bool = False
    whitespace_pattern: str | None = None

    @property
    def options(self) -> dict[str, str | bool]:
        """The same in the library's words."""
        if self.compact:
            return {"whitespace_flexible": False}
        if self.whitespace_pattern is not None:
            return {"whitespace_pattern": self.whitespace_pattern}
        return {}


class _AddedToken(msgspec.Struct, frozen=True):
    id: int
    special: bool = False


class _AddedTokens(msgspec.Struct, frozen=True):
    """What is read of a tokenizer's JSON."""

    added_tokens: list[_AddedToken] = []


class Vocabulary:
    """A tokenizer as the library sees it, for masks of `vocab_size` tokens.

    Made from what the text side sends; takes a second for a hundred thousand tokens. Raises
    RequestError (400) for a tokenizer that the library can't read, or where it isn't installed.
    """

    def __init__(self, message: VocabularyReq, vocab_size: int) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise RequestError(f"Constraints need the llguidance package: {error}") from error
        self.vocab_size = vocab_size
        self.end_ids = frozenset(message.end_ids)
        self._markers: dict[bytes, MarkerTokens] = {}
        try:
            self.tokens: LLTokenizer = LLTokenizer(
                message.tokenizer_json,
                n_vocab=max(vocab_size, message.num_tokens),
                eos_token=list(message.end_ids),
            )
        except ValueError as error:
            raise RequestError(
                f"Constraints cannot be served with this tokenizer: {_shortened(str(error))}"
            ) from error
        # Read now: the text is megabytes, and nobody keeps it.
        added = msgspec.json.decode(message.tokenizer_json, type=_AddedTokens).added_tokens
        self._shown = frozenset(token.id for token in added if not token.special)

    @cached_property
    def special(self) -> SpecialTokens:
        """Tokens that the library does not take for text; looking takes a moment."""
        size = min(self.vocab_size, self.tokens.vocab_size)
        ids = [i for i in range(size) if self.tokens.is_special_token(i)]
        names = {i: self.tokens.decode_bytes([i]).decode(errors="ignore") for i in ids}
        return SpecialTokens(
            {name: i for i, name in names.items() if name}, self._shown.intersection(ids)
        )

    def spelling(self, token_id: int) -> bytes:
        """What a token adds to a text; a special token's is its name."""
        if token_id >= self.tokens.vocab_size:
            return b""
        spelling: bytes = self.tokens.decode_bytes([token_id])
        return spelling

    def beginnings(self, marker: bytes, num_said: int) -> IdArray:
        """Tokens that go on with `marker`, of which `num_said` bytes were said."""
        return self.look_up(marker).beginnings[num_said]

    def overruns(self, marker: bytes, num_said: int) -> IdArray:
        """Tokens that say more than the rest of `marker`, of which `num_said` bytes were said."""
        return self.look_up(marker).overruns[num_said]

    def closings(self, marker: bytes, num_said: int) -> IdArray:
        """Tokens that say the most of the rest of `marker`, and nothing else."""
        return self.look_up(marker).closings[num_said]

    def look_up(self, marker: bytes) -> MarkerTokens:
        """The tokens around a marker; the first time takes 0.1 s for fifty thousand tokens."""
        found = self._markers.get(marker)
        if found is None:
            size = min(self.vocab_size, self.tokens.vocab_size)
            spellings = [self.tokens.decode_bytes([i]) for i in range(size)]
            found = self._markers[marker] = MarkerTokens.of(marker, spellings)
        return found


@dataclass(frozen=True, slots=True)
class MarkerTokens:
    """Tokens int64 [n] around a marker, by how many of its bytes were said: those that go on with
    it, those that say more than the rest of it, and those that say the most of the rest alone."""

    beginnings: tuple[IdArray, ...]
    overruns: tuple[IdArray, ...]
    closings: tuple[IdArray, ...]

    @classmethod
    def of(cls, marker: bytes, spellings: Sequence[bytes]) -> MarkerTokens:
        """Look through a vocabulary."""
        beginnings: list[list[int]] = [[] for _ in marker]
        overruns: list[list[int]] = [[] for _ in marker]
        closings: list[list[int]] = [[] for _ in marker]
        last = marker[-1:]
        for token_id, spelling in enumerate(spellings):
            if not spelling:
                continue
            may_overrun = last in spelling[:-1]
            if not may_overrun and spelling[:1] not in marker:
                continue
            for said in range(len(marker)):
                rest = marker[said:]
                if rest.startswith(spelling) or spelling.startswith(rest):
                    beginnings[said].append(token_id)
                at = (marker[:said] + spelling).find(marker) if may_overrun else -1
                if 0 <= at < said + len(spelling) - len(marker):
                    overruns[said].append(token_id)
        for said, ids in enumerate(beginnings):
            rest = marker[said:]
            parts = [i for i in ids if rest.startswith(spellings[i])]
            most = max((len(spellings[i]) for i in parts), default=0)
            closings[said] = [i for i in parts if len(spellings[i]) == most]
        return cls(_id_arrays(beginnings), _id_arrays(overruns), _id_arrays(closings))


def _id_arrays(lists: Iterable[list[int]]) -> tuple[IdArray, ...]:
    return tuple(np.array(ids, np.int64) for ids in lists)


class Grammar:
    """One compiled constraint; never changed by the requests that start from it.

    `end_ids` are the tokens that end a text. `start` None: any text may follow, and none ends it.
    """

    def __init__(self, start: LLMatcher | None, vocabulary: Vocabulary) -> None:
        self._start = start
        self.vocabulary = vocabulary
        self.end_ids = frozenset[int]() if start is None else vocabulary.end_ids

    def matcher(self) -> TokenMatcher:
        """A new matcher, at the beginning of a text; takes microseconds."""
        return TokenMatcher(self.fresh(), self.vocabulary)

    def fresh(self) -> LLMatcher | None:
        """The library's own state at the beginning of a text; None: any text may follow."""
        return None if self._start is None else self._start.deep_copy()


class TokenMatcher:
    """How far one request's text has come; used from one thread.

    `error` says why it can't go on: a limit of the library, or a token that the grammar does not
    allow. Then, and after an end-of-text token, it allows everything and takes no token any more.
    """

    def __init__(self, matcher: LLMatcher | None, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._end_ids = vocabulary.end_ids
        self._vocab_size = vocabulary.vocab_size
        self._words = np.empty((vocabulary.tokens.vocab_size + 31) // 32, np.int32)
        self._is_over = False
        self.error: str | None = None

    def hidden(self, stops: Sequence[int] | None = None) -> BitArray | None:
        """A 1 for each token that may not follow, uint8 [V]; None when all may.

        Where `stops` is given (min_new_tokens is not reached), those tokens and the ends of a text
        are hidden as well, unless nothing else is left.
        """
        if self._is_over or self.error is not None:
            return None
        if self._matcher is None:
            return None if stops is None else self._only_hides(stops)
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._matcher.is_error():
            self.error = _shortened(self._matcher.get_error())
            return None
        bits = np.unpackbits((~self._words).view(np.uint8), bitorder="little")
        bits = bits[: self._vocab_size]
        if stops is not None:
            fewer = bits.copy()
            fewer[[*stops, *(i for i in self._end_ids if i < self._vocab_size)]] = 1
            if not fewer.all():
                return fewer
        return bits

    def _only_hides(self, ids: Iterable[int]) -> BitArray:
        """The bits that hide `ids` and the ends of a text."""
        bits = np.zeros(self._vocab_size, np.uint8)
        bits[[i for i in (*ids, *self._end_ids) if i < self._vocab_size]] = 1
        return bits

    def accept(self, token_id: int) -> None:
        """Go on with a sampled token."""
        if self._is_over or self.error is not None or self._matcher is None:
            return
        if not self._matcher.consume_token(token_id):
            self.error = _shortened(self._matcher.get_error()) or f"token {token_id} is not allowed"
        self._is_over = token_id in self._end_ids

    def replay(self, token_ids: Iterable[int]) -> None:
        """Go on with tokens that were sampled before, as after a retraction."""
        for token_id in token_ids:
            self.accept(int(token_id))


def compile_grammar(constraint: Constraint, vocabulary: Vocabulary, style: JsonStyle) -> Grammar:
    """Compile; takes a millisecond, or many seconds for a huge schema, without the interpreter.

    A schema whose references form a long chain needs a large stack: see `GrammarCompiler`.

    Raises RequestError (400) saying what is wrong with the constraint or not supported of it.
    """
    if constraint == FREE_TEXT:
        return Grammar(None, vocabulary)
    from llguidance import LLMatcher

    special = vocabulary.special if constraint.kind == "structural_tag" else NO_SPECIAL_TOKENS
    text = _library_grammar(constraint, style, special)
    start = LLMatcher(vocabulary.tokens, text, log_level=0, limits=_limits())
    if not start.is_error():
        start.compute_bitmask()  # finds a language without a text; and what it makes is kept
    if start.is_error():
        raise _refusal(constraint.kind, start.get_error())
    return Grammar(start, vocabulary)


def check_style(style: JsonStyle) -> None:
    """Raise ValueError with one line for a whitespace pattern that the library can't read."""
    if style.whitespace_pattern is None:
        return
    from llguidance import LLMatcher

    text = _library_grammar(Constraint("json_schema", '{"type": "object"}'), style)
    problem = LLMatcher.validate_grammar(text, limits=_limits())
    if problem:
        raise ValueError(f"--constrained-json-whitespace-pattern: {_shortened(problem)}")


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)


def _library_grammar(
    constraint: Constraint, style: JsonStyle, special: SpecialTokens = NO_SPECIAL_TOKENS
) -> str:
    from llguidance import LLMatcher, grammar_from

    kind, text = constraint.kind, constraint.text
    if kind == "regex":
        return str(LLMatcher.grammar_from_regex(text))
    try:
        if kind == "json_schema":
            return str(LLMatcher.grammar_from_json_schema(text, overrides=style.options))
        if kind == "structural_tag":
            return lark_of(text, special, style.options)
        return str(grammar_from("ebnf", text))
    except ValueError as error:
        raise _refusal(kind, str(error)) from error


def _refusal(kind: str, reason: str) -> RequestError:
    return RequestError(f"{kind} cannot be served: {_shortened(reason)}")


def _shortened(text: str) -> str:
    """A library's message for a client: on one line, of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= _MESSAGE_CHARS else line[: _MESSAGE_CHARS - 3] + "..."
