"""What is hidden and asked: for the circuit drawn from its vocabulary, for others as told.

A task is a filler, one needle for each depth and where needles may lie; prompts are made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from haystack.circuit import Shape
from haystack.prompts import (
    Haystack,
    Needle,
    Placement,
    Prompt,
    Vocabulary,
    make_prompt,
    make_shared_prompts,
    random_needles,
)


@dataclass(frozen=True)
class Task:
    """`needles[i]` belongs to `depths[i]` (percent)."""

    haystack: Haystack
    needles: tuple[Needle, ...]
    depths: tuple[float, ...]
    placement: Placement
    seed: int

    def prompts(self, length: int) -> list[Prompt]:
        """One prompt for each depth, with one needle each; `length` tokens or slightly fewer."""
        filler = self.haystack.tokens(length, self.seed)
        return [
            make_prompt(filler, self.placement, needle, length, depth)
            for needle, depth in zip(self.needles, self.depths, strict=True)
        ]

    def shared_prompts(self, length: int) -> list[Prompt]:
        """One prompt for each depth, equal but for the question: all needles are in each."""
        filler = self.haystack.tokens(length, self.seed)
        return make_shared_prompts(filler, self.placement, self.needles, length, self.depths)


def placement_of(shape: Shape) -> Placement:
    """Where the circuit's needles may lie (docs/needle.md says why)."""
    return Placement(shape.chunk_size, shape.key_tokens - 1, shape.num_layers > 2)


def circuit_task(shape: Shape, depths: Sequence[float], answer_tokens: int, seed: int) -> Task:
    """Random needles in a random haystack of the circuit's own vocabulary."""
    vocabulary = Vocabulary(shape.vocab_size)
    needles = random_needles(vocabulary, len(depths), shape.key_tokens, answer_tokens, seed)
    filler = Haystack(np.array(vocabulary.haystack_ids, dtype=np.int32), drawn=True)
    return Task(filler, tuple(needles), tuple(depths), placement_of(shape), seed)


def given_task(
    filler: Sequence[int],
    needle: Sequence[int],
    question: Sequence[int],
    answer: Sequence[int],
    depths: Sequence[float],
    chunk: int | None,
) -> Task:
    """The same needle at every depth in `filler`, repeated as often as needed.

    `chunk`: keep the needle within one attention chunk, None to put it anywhere.
    """
    one = Needle(tuple(needle), tuple(question), tuple(answer))
    haystack = Haystack(np.array(filler, dtype=np.int32), drawn=False)
    return Task(haystack, (one,) * len(depths), tuple(depths), Placement(chunk), seed=0)
