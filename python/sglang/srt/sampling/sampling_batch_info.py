"""What the sampler has to know of a step, in the order of the batch; plain values, no tensors.

Built by the scheduler's side from requests, read by the worker. The sampler keeps the state of a
row (penalty counts) itself: it is told when a request takes a row and when it leaves, because
under overlap the host does not yet know the token that the forward before sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang.srt.constrained.grammar import TokenMatcher
from sglang.srt.constrained.reasoning_matcher import start_matcher
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import LogprobSpec
from sglang.srt.sampling.sampling_params import SamplingParams

Int32Array = npt.NDArray[np.int32]
_NO_IDS = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class RowAdmission:
    """A request takes KV row `row`: its parameters, seed, and the ids that penalties count.

    `matcher` (None: no constraint) stands behind `output_ids`.
    """

    row: int
    params: SamplingParams
    seed: int
    prompt_ids: Int32Array
    output_ids: Int32Array
    matcher: TokenMatcher | None = None


@dataclass(frozen=True, slots=True)
class SamplingBatchInfo:
    """Sampling of one step.

    A sampled token has a *place*: request b's are `sample_counts[b]` neighbours from
    `sample_index[b]` on (-1: not sampled), more than one where it was drafted. `logit_index` (where
    in `logits_rows` [R]), `rows`, `positions` (absolute, of the token being sampled),
    `suppress_stop` (min_new_tokens not reached) and `expected` (the token drafted for the place, -1
    for none) follow the places. `logprob_specs[b]` is None when nothing is wanted.
    """

    admissions: tuple[RowAdmission, ...]
    drops: tuple[int, ...]
    sample_index: tuple[int, ...]
    logit_index: tuple[int, ...]
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    suppress_stop: tuple[bool, ...]
    logprob_specs: tuple[LogprobSpec | None, ...]
    sample_counts: tuple[int, ...]
    expected: tuple[int, ...]

    def places_of(self, request: int) -> range:
        """The places of a request of the batch; empty when it samples nothing."""
        first = self.sample_index[request]
        return range(first, first + self.sample_counts[request])

    def place_specs(self) -> list[LogprobSpec | None]:
        """What each place wants of log probabilities."""
        pairs = zip(self.logprob_specs, self.sample_counts, strict=True)
        return [spec for spec, count in pairs for _ in range(count)]

    def expected_of(self, drafted: npt.NDArray[np.int64] | None) -> Sequence[int]:
        """`expected`, its tokens those that a draft model said (None: they stand there)."""
        if drafted is None:
            return self.expected
        said = iter(drafted.tolist())
        return [next(said) if wanted >= 0 else wanted for wanted in self.expected]

    @classmethod
    def from_schedule_batch(cls, batch: ScheduleBatch, drops: Sequence[int]) -> SamplingBatchInfo:
        """Collect a step's sampling; marks requests whose row the sampler now knows."""
        admissions: list[RowAdmission] = []
        sample_index: list[int] = []
        logit_index: list[int] = []
        rows: list[int] = []
        positions: list[int] = []
        suppress: list[bool] = []
        specs: list[LogprobSpec | None] = []
        expected: list[int] = []
        q_start = logits_seen = 0
        for item in batch.items:
            req = item.req
            first, count = item.logprob_rows()
            specs.append(
                _logprob_spec(req, q_start + first - item.start, first, count, item.sample)
            )
            logits_seen += count
            if item.sample:
                if not req.sampler_ready:
                    admissions.append(_admission(req, item.lease.row))
                    req.sampler_ready = True
                sample_index.append(len(rows))
                count = item.num_places
                logit_index += range(logits_seen, logits_seen + count)
                logits_seen += count
                rows += [item.lease.row] * count
                end = item.start + item.num_tokens
                positions += range(end - len(item.draft), end + 1)
                ahead = req.params.min_new_tokens - req.num_output - req.num_pending
                suppress += [place < ahead for place in range(count)]
                expected += [*item.draft, -1]
            else:
                sample_index.append(-1)
            q_start += item.num_tokens
        return cls(
            admissions=tuple(admissions),
            drops=tuple(drops),
            sample_index=tuple(sample_index),
            logit_index=tuple(logit_index),
            rows=tuple(rows),
            positions=tuple(positions),
            suppress_stop=tuple(suppress),
            logprob_specs=tuple(specs),
            sample_counts=tuple(item.num_places for item in batch.items),
            expected=tuple(expected),
        )


def _admission(req: Req, row: int) -> RowAdmission:
    matcher = None
    if req.grammar is not None:
        params = req.params
        matcher = start_matcher(req.grammar, params.reasoning, params.max_thinking_tokens)
        matcher.replay(req.tokens.view(req.prompt_len))
    if not req.params.has_penalties:
        return RowAdmission(row, req.params, req.seed, _NO_IDS, _NO_IDS, matcher)
    # Copies: the request's buffer goes on growing while the worker reads these.
    prompt = req.vocabulary_ids(0, req.prompt_len).copy()
    output = req.tokens.view(req.prompt_len).copy()
    return RowAdmission(row, req.params, req.seed, prompt, output, matcher)


def _logprob_spec(
    req: Req, input_row: int, first: int, count: int, sample: bool
) -> LogprobSpec | None:
    if req.logprob is None or (count == 0 and not sample):
        return None
    targets = req.vocabulary_ids(first + 1, first + 1 + count).copy() if count else _NO_IDS
    return LogprobSpec(
        input_row=input_row,
        input_targets=targets,
        output=sample,
        top_num=req.logprob.top_num,
        picked_ids=req.logprob.picked_ids,
    )
