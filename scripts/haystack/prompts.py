"""Prompts with a needle in them: what is asked, where it lies and what must come back.

A needle is a key followed by the answer; the prompt ends with the key. Between them lies the
haystack, which has no token of any needle. For the circuit, whose rotary heads cannot see over the
border of an attention chunk, `Placement` keeps every needle within one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]

SPECIAL_TOKENS = ("<unk>", "<bos>", "<eos>", "<pad>")

_CONSONANTS = "bcdfghjklmnpqrstvwxz"
_VOWELS = "aeiou"


@dataclass(frozen=True)
class Vocabulary:
    """The circuit's tokens: special ones, then half for haystacks, then half for needles."""

    size: int

    @property
    def haystack_ids(self) -> range:
        return range(len(SPECIAL_TOKENS), self.size // 2)

    @property
    def needle_ids(self) -> range:
        return range(self.size // 2, self.size)

    @property
    def words(self) -> list[str]:
        """The tokens' texts, in order: two or three syllables with byte-level BPE's space mark."""
        syllables = [first + second for first in _CONSONANTS for second in _VOWELS]
        count = len(syllables)
        words = []
        for number in range(self.size):
            left, right = divmod(number, count)
            high = syllables[left // count] if left >= count else ""
            words.append(f"Ġ{high}{syllables[left % count]}{syllables[right]}")
        return [*SPECIAL_TOKENS, *words[len(SPECIAL_TOKENS) :]]


@dataclass(frozen=True)
class Needle:
    """Token ids. `text` is hidden in the haystack; a prompt that ends with `question` asks for it.

    `answer` is what must be generated, token by token.
    """

    text: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]

    @classmethod
    def of_key(cls, key: Sequence[int], answer: Sequence[int]) -> Needle:
        """The circuit's: the key and the answer, asked for by the key."""
        return cls((*key, *answer), tuple(key), tuple(answer))


def random_needles(
    vocabulary: Vocabulary, count: int, key_tokens: int, answer_tokens: int, seed: int
) -> list[Needle]:
    """`count` needles that share no token.

    Raises ValueError when the vocabulary has not enough tokens for them.
    """
    each = key_tokens + answer_tokens
    if count * each > len(vocabulary.needle_ids):
        raise ValueError(
            f"{count} needles of {each} tokens: the vocabulary has {len(vocabulary.needle_ids)} "
            "for needles"
        )
    rng = np.random.default_rng([seed, 1])
    drawn = rng.permutation(np.array(vocabulary.needle_ids))[: count * each].reshape(count, each)
    return [Needle.of_key(row[:key_tokens], row[key_tokens:]) for row in drawn.tolist()]


@dataclass(frozen=True)
class Haystack:
    """Endless filler: `ids` over and over, or, when `drawn`, random picks of them."""

    ids: Ids
    drawn: bool

    def tokens(self, count: int, seed: int) -> Ids:
        """The first `count` tokens; equal seeds give equal beginnings."""
        if self.drawn:
            rng = np.random.default_rng([seed, 0])
            return self.ids[rng.integers(0, len(self.ids), count, dtype=np.int16)]
        return np.resize(self.ids, count)


@dataclass(frozen=True)
class Placement:
    """Where needles and prompts may end.

    `chunk`: a needle lies within one attention chunk of so many tokens, None for anywhere.
    `lead`: so many tokens at the start of a chunk are left free. `answer_within_chunk`: question
    and answer too lie within one chunk, so some prompts are shortened a little.
    """

    chunk: int | None = None
    lead: int = 0
    answer_within_chunk: bool = False

    def prompt_length(self, wanted: int, needle: Needle) -> int:
        """The longest allowed length up to `wanted` tokens, the question included."""
        if self.chunk is None or not self.answer_within_chunk:
            return wanted
        # The last generated token is never a row of the model, so one fewer counts.
        span = len(needle.question) + len(needle.answer) - 1
        first = wanted - len(needle.question)
        if first % self.chunk + span > self.chunk:
            first = first // self.chunk * self.chunk + self.chunk - span
        return first + len(needle.question) - (self.chunk if first > wanted else 0)

    def needle_position(self, length: int, depth_percent: float, needle: Needle) -> int:
        """Where the needle begins in a prompt of `length` tokens; depth 100 is just before the end.

        Raises ValueError when the prompt or the chunk is too short for it.
        """
        size = len(needle.text)
        room = length - len(needle.question) - size
        position = round(room * depth_percent / 100)
        if self.chunk is not None:
            if self.lead + size > self.chunk:
                raise ValueError(f"a needle of {size} tokens in attention chunks of {self.chunk}")
            start = position // self.chunk * self.chunk
            position = min(max(position, start + self.lead), start + self.chunk - size)
            if position > room:
                position = start - size
        if not 0 <= position <= room:
            raise ValueError(f"a needle of {size} tokens in a prompt of {length}")
        return position


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids, the answer that it must get and where its needle begins."""

    ids: Ids
    answer: tuple[int, ...]
    needle_at: int


def make_prompt(
    haystack: Ids, placement: Placement, needle: Needle, length: int, depth_percent: float
) -> Prompt:
    """One needle in the first tokens of `haystack`, and the question, up to `length` in all."""
    length = placement.prompt_length(length, needle)
    ids = haystack[:length].copy()
    at = placement.needle_position(length, depth_percent, needle)
    ids[at : at + len(needle.text)] = needle.text
    ids[length - len(needle.question) :] = needle.question
    return Prompt(ids, needle.answer, at)


def make_shared_prompts(
    haystack: Ids,
    placement: Placement,
    needles: Sequence[Needle],
    length: int,
    depths: Sequence[float],
) -> list[Prompt]:
    """One haystack with a needle at every depth; the prompts differ only in their questions.

    Raises ValueError when two needles would overlap.
    """
    first = make_prompt(haystack, placement, needles[0], length, depths[0])
    length, ids = len(first.ids), first.ids
    taken: list[tuple[int, int]] = [(first.needle_at, first.needle_at + len(needles[0].text))]
    for needle, depth in zip(needles[1:], depths[1:], strict=True):
        at = placement.needle_position(length, depth, needle)
        end = at + len(needle.text)
        if any(at < other_end and other < end for other, other_end in taken):
            raise ValueError(f"needles overlap at depth {depth:g} of {length} tokens")
        ids[at:end] = needle.text
        taken.append((at, end))
    prompts = []
    for needle, (at, _) in zip(needles, taken, strict=True):
        asked = ids.copy()
        asked[length - len(needle.question) :] = needle.question
        prompts.append(Prompt(asked, needle.answer, at))
    return prompts
