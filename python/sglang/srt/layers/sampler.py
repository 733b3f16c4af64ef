"""Chooses the next token of every row: penalties, bias, temperature, filters, one random number.

The worker tells it when a request takes or leaves a KV row and calls `sample` once a step. What a
row gets depends on its own logits, parameters, seed and position only, never on its batch.

Order of work on a row: repetition, frequency and presence penalty, logit_bias, stop tokens hidden
while min_new_tokens is not reached and whatever a grammar does not allow, then argmax (greedy), or
temperature, softmax and filters.
The filters look at the same distribution and all must agree: the `top_k` most likely tokens; the
most likely tokens up to the one that brings their sum to `top_p`; tokens of at least `min_p` times
the highest probability. The most likely token always passes. Equal tokens rank by id.

Legend: B rows to sample, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.constrained.grammar import TokenMatcher
from sglang.srt.errors import InvariantError
from sglang.srt.layers.late_results import LateResults
from sglang.srt.layers.logprobs import Highest, pack_logprobs, reduce_logits, stable_topk
from sglang.srt.layers.sampling_row import SamplingRow
from sglang.srt.managers.io_struct import LogprobArrays
from sglang.srt.model_executor.forward_batch_info import LogprobSpec
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.native import kernels_for

_MASK64 = (1 << 64) - 1
_FIRST_CANDIDATES = 256
_BLOCK_BYTES = 32 << 20
# Fewer logits are drawn from by one thread: waking others takes longer.
_TEAM_LOGITS = 1 << 18


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """`token_ids` int64 [B] and, per row, log probabilities of the one sampled token or None.

    `invalid_rows` are the indices of rows whose logits had NaN or no finite maximum: their token
    is the best of the usable logits (NaN counts as impossible; with none usable, all are equal).
    Where looking would wait, `late` tells both when it has come, and nothing here does. `failures`
    are rows whose grammar can't go on, and why.
    """

    token_ids: torch.Tensor
    logprobs: list[LogprobArrays | None]
    invalid_rows: tuple[int, ...]
    late: LateResults | None = None
    failures: Mapping[int, str] = field(default_factory=dict)


class Sampler:
    """Keeps a `SamplingRow` per admitted KV row; used from one thread."""

    def __init__(self) -> None:
        self._rows: dict[int, SamplingRow] = {}

    def admit(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        prompt_ids: npt.NDArray[np.integer],
        output_ids: npt.NDArray[np.integer],
        matcher: TokenMatcher | None = None,
    ) -> None:
        """A request takes `row`; `output_ids` are those generated before a retraction.

        `matcher` has gone on with them, too; None: the request has no grammar.
        """
        self._rows[row] = SamplingRow(params, seed, prompt_ids, output_ids, matcher)

    def drop(self, row: int) -> None:
        """The request of `row` left; a row that was never admitted is no mistake."""
        self._rows.pop(row, None)

    def remembers(self, row: int) -> bool:
        """Whether what `row` samples next depends on the tokens that it sampled before, beside what
        the logits tell of them: penalties count them, a grammar follows them."""
        state = self.state(row)
        return state.counts_tokens or state.matcher is not None

    def sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        suppress_stop: Sequence[bool],
        logprob_specs: Sequence[LogprobSpec | None],
        highest: Highest | None = None,
    ) -> SampleOutput:
        """Choose a token per row of `logits` float32 [B, V], which is overwritten.

        `positions` are the sampled tokens' absolute positions, `suppress_stop` tells where
        min_new_tokens is not reached. Log probabilities are of the logits after penalties, bias,
        grammar and temperature (1 when greedy), before filters. `highest` of these logits, if it
        is known, is used while no row edits them. Side effect: the rows count their tokens.
        Raises InvariantError for a row that nobody admitted.
        """
        states = [self.state(row) for row in rows]
        if highest is not None and all(state.takes_highest for state in states):
            best, tokens = highest
            asked = any(suppress_stop) or any(logprob_specs)
            if not asked and np.isfinite(best.numpy()).all():
                return SampleOutput(tokens.clone(), [None] * len(states), ())
        for i, state in enumerate(states):
            if state.edits_logits:
                state.edit(logits[i])
                highest = None
            if state.matcher is not None:
                state.hide_by_grammar(logits[i], hide_stops=suppress_stop[i])
                highest = None
            elif suppress_stop[i]:
                state.hide_stop_tokens(logits[i])
                highest = None
        if not states:
            return SampleOutput(torch.empty(0, dtype=torch.int64), [], ())
        if highest is None:
            best, tokens = _highest(logits)
        else:
            best, tokens = highest[0], highest[1].clone()  # the next step writes there
        invalid = _clean(logits, best)
        if invalid:
            best, tokens = _highest(logits)
        draws = [
            Draw.of(i, state, positions[i])
            for i, state in enumerate(states)
            if not state.params.greedy
        ]
        if draws:
            _choose(logits, best, tokens, draws)
        logprobs = [
            _output_logprobs(logits[i : i + 1], best[i], tokens[i : i + 1], state.params, spec)
            for i, (state, spec) in enumerate(zip(states, logprob_specs, strict=True))
        ]
        for state, token in zip(states, tokens.tolist(), strict=True):
            state.add(token)
        return SampleOutput(tokens, logprobs, invalid, failures=failures_of(states))

    def state(self, row: int) -> SamplingRow:
        """What is known of an admitted row. Raises InvariantError for another one."""
        state = self._rows.get(row)
        if state is None:
            raise InvariantError(f"row {row} is sampled but was never admitted")
        return state


def failures_of(states: Sequence[SamplingRow]) -> dict[int, str]:
    """Why the grammars of rows can't go on, by place; empty as a rule."""
    return {
        i: state.matcher.error
        for i, state in enumerate(states)
        if state.matcher is not None and state.matcher.error is not None
    }


@dataclass(frozen=True, slots=True)
class Draw:
    """One random row of a batch: its parameters and the number in [0, 1) that picks its token."""

    row: int
    params: SamplingParams
    u: float

    @classmethod
    def of(cls, row: int, state: SamplingRow, position: int) -> Self:
        """The draw at an absolute position of a request."""
        return cls(row, state.params, uniform(state.seed, position))


def _choose(
    logits: torch.Tensor, best: torch.Tensor, tokens: torch.Tensor, draws: Sequence[Draw]
) -> None:
    """Overwrite the random rows of `tokens`; `best` [B] are the maxima of `logits`."""
    kernels = kernels_for(logits)
    if kernels is None:
        _choose_by_torch(logits, best, tokens, draws)
        return
    params = [draw.params for draw in draws]
    many = len(draws) * logits.shape[1] >= _TEAM_LOGITS
    kernels.sample(
        logits,
        best,
        tokens,
        rows=np.array([draw.row for draw in draws]),
        temperature=np.array([p.temperature for p in params], np.float32),
        u=np.array([draw.u for draw in draws]),
        top_k=np.array([p.top_k for p in params]),
        top_p=np.array([p.top_p for p in params], np.float64),
        min_p=np.array([p.min_p for p in params], np.float32),
        num_threads=torch.get_num_threads() if many else 1,
    )


def _choose_by_torch(
    logits: torch.Tensor, best: torch.Tensor, tokens: torch.Tensor, draws: Sequence[Draw]
) -> None:
    """`_choose` without the native kernels."""
    step = max(1, _BLOCK_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(draws), step):
        block = draws[start : start + step]
        rows = [draw.row for draw in block]
        heat = torch.tensor([draw.params.temperature for draw in block])
        scaled = (logits[rows] - best[rows].unsqueeze(-1)) / heat.unsqueeze(-1)
        # A kernel per row: a row's probabilities do not depend on the other rows.
        for draw, probs in zip(block, scaled.softmax(-1), strict=True):
            tokens[draw.row] = choose_token(probs, draw.params, draw.u)


def choose_token(probs: torch.Tensor, params: SamplingParams, u: float) -> int:
    """The token that u in [0, 1) picks from float32 `probs` [V] after the filters."""
    filtered = params.top_p < 1.0 or 0 < params.top_k < len(probs)
    if filtered:
        ids, weights = _most_likely(probs, params.top_k, params.top_p)
    else:
        ids, weights = None, probs.numpy()
    if params.min_p > 0.0:
        # In float32, so that p equal to min_p * max passes as it does in the definition.
        weights = np.where(weights >= np.float32(params.min_p) * weights.max(), weights, 0.0)
    bounds = np.cumsum(weights, dtype=np.float64)
    # u is at most 1 - 2^-53: the product rounds below the last bound. A weight of 0 spans nothing.
    place = int(np.searchsorted(bounds, u * bounds[-1], side="right"))
    return place if ids is None else int(ids[place])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a pure function of (seed, position).

    Element number `position` of the SplitMix64 sequence that starts at the mixed seed (Steele,
    Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014; constants of S.
    Vigna's public-domain version). Any 64-bit seed, negative ones by two's complement.
    """
    golden = 0x9E3779B97F4A7C15
    start = _mix64((seed + golden) & _MASK64)
    return (_mix64((start + (position + 1) * golden) & _MASK64) >> 11) * 2.0**-53


def _mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _most_likely(
    probs: torch.Tensor, top_k: int, top_p: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Ids and probabilities that pass top_k and top_p, most likely first.

    Selects a few candidates and takes more until they reach the mass, instead of sorting all.
    """
    limit = min(top_k, len(probs)) if top_k > 0 else len(probs)
    count = min(limit, _FIRST_CANDIDATES if top_p < 1.0 else limit)
    while True:
        values, ids = stable_topk(probs.unsqueeze(0), count)
        weights = values[0].numpy()
        reached = np.cumsum(weights, dtype=np.float64)
        # A token passes when those before it have not reached the mass; the first always does.
        # Without top_p all pass, also where rounding brings the sum to 1 too early.
        passing = 1 + int(np.searchsorted(reached, top_p)) if top_p < 1.0 else count
        if passing <= count or count == limit:
            passing = min(passing, count)
            return ids[0, :passing].numpy(), weights[:passing]
        count = min(limit, 8 * count)


def _highest(logits: torch.Tensor) -> Highest:
    kernels = kernels_for(logits)
    if kernels is None:
        best, tokens = logits.max(-1)
        return best, tokens
    # One thread: waking others takes longer, and PyTorch's would spin into the next step.
    found: Highest = kernels.highest(logits)
    return found


def _clean(logits: torch.Tensor, best: torch.Tensor) -> tuple[int, ...]:
    """Make every row's maximum finite, in place; the indices of the rows that needed it.

    `best` [B] are the maxima before.
    """
    invalid = [i for i, value in enumerate(best.tolist()) if not math.isfinite(value)]
    for i in invalid:
        row = logits[i]
        largest = torch.finfo(row.dtype).max
        row.nan_to_num_(nan=-math.inf, posinf=largest, neginf=-math.inf)
        if not torch.isfinite(row.amax()):
            row.zero_()
    return tuple(invalid)


def _output_logprobs(
    logits: torch.Tensor,
    best: torch.Tensor,
    tokens: torch.Tensor,
    params: SamplingParams,
    spec: LogprobSpec | None,
) -> LogprobArrays | None:
    """Log probabilities of one sampled row [1, V], which is overwritten, and its token [1]."""
    if spec is None or not spec.output:
        return None
    logits -= best
    if not params.greedy:
        logits /= params.temperature
    picked = torch.from_numpy(spec.picked_ids.astype(np.int64))
    block = reduce_logits(logits, tokens, spec.top_num, picked)
    return pack_logprobs(tokens.numpy().astype(np.int32), [block], spec.picked_ids)
