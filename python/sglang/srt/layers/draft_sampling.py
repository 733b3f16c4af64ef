"""Samples the places of a step where requests may have several: drafts are verified here.

A place is a row of logits and the position that its token will have. The token at a place is what
the request would get there without drafts: by its own logits, parameters, seed and position. So
where it is the drafted one, the next place's logits are right, and its token counts as well; the
first other token counts and ends it. That is speculative sampling (arXiv 2211.17192) for a draft of
certain tokens: a token is taken with the probability that the model gives it, and what comes out is
not only distributed as without drafts but the same, token for token.

Called by the worker in place of the sampler, on the same thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from sglang.srt.layers.logprobs import Highest
from sglang.srt.layers.sampler import SampleOutput
from sglang.srt.managers.io_struct import LogprobArrays
from sglang.srt.model_executor.forward_batch_info import LogprobSpec


class Places(NamedTuple):
    """What is sampled in a step, place by place; those of a request are neighbours.

    `expected` is the token drafted for a place, -1 where none was: always at a request's last.
    """

    rows: Sequence[int]
    positions: Sequence[int]
    suppress_stop: Sequence[bool]
    specs: Sequence[LogprobSpec | None]
    expected: Sequence[int]

    def at(self, chosen: Sequence[int]) -> Places:
        """Some of the places."""
        return Places(
            [self.rows[i] for i in chosen],
            [self.positions[i] for i in chosen],
            [self.suppress_stop[i] for i in chosen],
            [self.specs[i] for i in chosen],
            [self.expected[i] for i in chosen],
        )


class PlaceSampler(Protocol):
    """The part of `Sampler` and `DeviceSampler` that is needed."""

    def remembers(self, row: int) -> bool: ...

    def sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        suppress_stop: Sequence[bool],
        logprob_specs: Sequence[LogprobSpec | None],
        highest: Highest | None = None,
    ) -> SampleOutput: ...


def sample_places(
    sampler: PlaceSampler, logits: torch.Tensor, places: Places, highest: Highest | None
) -> SampleOutput:
    """Choose a token for every place of `logits` float32 [places, V], which is overwritten.

    Rows that remember what they sampled (penalties, grammars) take one place after the other, on
    the host only: what they don't reach has token -1. All others are sampled at once.
    """
    rows, expected = places.rows, places.expected
    bound = {
        row
        for row, wanted in zip(rows, expected, strict=True)
        if wanted >= 0 and sampler.remembers(row)
    }
    if not bound:
        return sampler.sample(
            logits, rows, places.positions, places.suppress_stop, places.specs, highest
        )
    return _sample_in_turn(sampler, logits, places, bound)


def _sample_in_turn(
    sampler: PlaceSampler, logits: torch.Tensor, places: Places, bound: set[int]
) -> SampleOutput:
    rows, expected = places.rows, places.expected
    tokens = torch.full((len(rows),), -1, dtype=torch.int64)
    logprobs: list[LogprobArrays | None] = [None] * len(rows)
    invalid: list[int] = []
    failures: dict[int, str] = {}
    due = [i for i, row in enumerate(rows) if row not in bound or row not in rows[:i]]
    while due:
        some = places.at(due)
        out = sampler.sample(logits[due], some.rows, some.positions, some.suppress_stop, some.specs)
        tokens[due] = out.token_ids
        for i, found in zip(due, out.logprobs, strict=True):
            logprobs[i] = found
        invalid += (due[i] for i in out.invalid_rows)
        failures |= {due[i]: reason for i, reason in out.failures.items()}
        chosen = zip(due, out.token_ids.tolist(), strict=True)
        due = [
            i + 1
            for i, token in chosen
            if rows[i] in bound and token == expected[i] and i not in failures
        ]
    return SampleOutput(tokens, logprobs, tuple(sorted(invalid)), failures=failures)
