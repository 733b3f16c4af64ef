"""The sampler of a device that runs behind the host: tokens are chosen there and nothing waits.

Rows are edited (`device_edits`), then chosen by tensor operations, with the same random number for
(seed, position) and the same rule as `Sampler`; tokens and log probabilities go to the host in one
copy (`late_results`). Requests with penalties for which the table of counts has no place are handed
to `Sampler` on the host: a step with such a row waits for the device.

Used by the worker in place of `Sampler`, from the same thread. Not yet run on hardware; the rules
are tested on a CPU, token for token against `Sampler`.

Legend: B rows to sample, V vocabulary, N rows of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.constrained.grammar import TokenMatcher
from sglang.srt.layers.device_edits import (
    CountTable,
    LogitEdits,
    add_bias_and_hide,
    plan_edits,
)
from sglang.srt.layers.device_grammars import DeviceGrammars
from sglang.srt.layers.late_results import Wanted, gather_results
from sglang.srt.layers.logprobs import Highest
from sglang.srt.layers.sampler import SampleOutput, Sampler, failures_of, uniform
from sglang.srt.layers.sampling_row import SamplingRow
from sglang.srt.managers.io_struct import LogprobArrays
from sglang.srt.model_executor.forward_batch_info import LogprobSpec
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.device import DeviceRuntime


class DeviceSampler:
    """`Sampler`'s interface for logits on `runtime`'s device.

    Requests with penalties are counted there, `counted_rows` of them at a time.
    """

    def __init__(
        self, runtime: DeviceRuntime, host: Sampler | None = None, *, counted_rows: int = 256
    ) -> None:
        self._runtime = runtime
        self._host = host or Sampler()
        self._counts = CountTable(counted_rows)
        self._grammars = DeviceGrammars(runtime)

    def admit(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        prompt_ids: npt.NDArray[np.integer],
        output_ids: npt.NDArray[np.integer],
        matcher: TokenMatcher | None = None,
    ) -> None:
        """See `Sampler.admit`."""
        self._host.admit(row, params, seed, prompt_ids, output_ids, matcher)
        self._counts.admit(row, self._host.state(row))

    def drop(self, row: int) -> None:
        """See `Sampler.drop`."""
        self._host.drop(row)
        self._counts.drop(row)

    def remembers(self, row: int) -> bool:
        """See `Sampler.remembers`."""
        return self._host.remembers(row)

    def sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        suppress_stop: Sequence[bool],
        logprob_specs: Sequence[LogprobSpec | None],
        highest: Highest | None = None,
    ) -> SampleOutput:
        """See `Sampler.sample`; `token_ids` stay on the device, the rest comes with `late`."""
        del highest  # no graph finds it
        states = [self._host.state(row) for row in rows]
        places = [self._counts.place(row) for row in rows]
        by_host = [
            i
            for i, (state, place) in enumerate(zip(states, places, strict=True))
            if state.counts_tokens and place is None
        ]
        self._grammars.settle()
        here = [i for i in range(len(rows)) if i not in by_host]
        held = {i: states[i] for i in here if states[i].matcher is not None}
        hiding = [hides and i not in held for i, hides in enumerate(suppress_stop)]
        some = (by_host, rows, positions, suppress_stop, logprob_specs)
        edited, known = self._sample_on_host(logits, *some) if by_host else ([], {})
        edits = self._edit(logits, plan_edits(states, places, hiding, by_host))
        self._grammars.hide(logits, held, {i for i in held if suppress_stop[i]})
        tokens, invalid = _greedy(logits)
        random_rows = [i for i in here if not states[i].params.greedy]
        if random_rows:
            self._choose(logits, tokens, states, positions, random_rows)
        if edits is not None:
            self._counts.add(edits, tokens)
        self._grammars.await_tokens(tokens, held)
        if by_host:
            at, chosen, were_invalid = self._runtime.move(edited)
            tokens.index_copy_(0, at, chosen)
            invalid.index_copy_(0, at, were_invalid)
        wanted = [
            Wanted(i, spec, 1.0 if states[i].params.greedy else states[i].params.temperature)
            for i in here
            if (spec := logprob_specs[i]) is not None and spec.output
        ]
        late = gather_results(self._runtime, logits, tokens, invalid, wanted, known)
        return SampleOutput(tokens, [None] * len(rows), (), late, failures_of(states))

    def _edit(self, logits: torch.Tensor, planned: LogitEdits | None) -> LogitEdits | None:
        """Change `logits` as planned on the host; the plan, on the device."""
        if planned is None:
            return None
        if len(planned.rows):
            self._counts.settle(self._runtime, logits.shape[-1])
        edits = LogitEdits(*self._runtime.move(planned))
        self._counts.penalise(logits, edits)
        add_bias_and_hide(logits, edits)
        return edits

    def _sample_on_host(
        self,
        logits: torch.Tensor,
        by_host: Sequence[int],
        rows: Sequence[int],
        positions: Sequence[int],
        suppress_stop: Sequence[bool],
        logprob_specs: Sequence[LogprobSpec | None],
    ) -> tuple[list[torch.Tensor], dict[int, LogprobArrays]]:
        """Places, tokens and whether they were invalid of the rows `by_host`, all on the host; and
        their log probabilities by row."""
        (index,) = self._runtime.move([torch.tensor(by_host)])
        some = logits.index_select(0, index)
        copied = torch.from_numpy(self._runtime.fetch(some).wait())
        out = self._host.sample(
            copied,
            [rows[i] for i in by_host],
            [positions[i] for i in by_host],
            [suppress_stop[i] for i in by_host],
            [logprob_specs[i] for i in by_host],
        )
        pairs = zip(by_host, out.logprobs, strict=True)
        known = {i: arrays for i, arrays in pairs if arrays is not None}
        invalid = torch.zeros(len(by_host), dtype=torch.bool)
        invalid[list(out.invalid_rows)] = True
        return [torch.tensor(by_host), out.token_ids, invalid], known

    def _choose(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        states: Sequence[SamplingRow],
        positions: Sequence[int],
        chosen: Sequence[int],
    ) -> None:
        """Overwrite the random rows `chosen` of `tokens`, those with top_k or top_p together."""
        vocab = logits.shape[1]
        filtered = [i for i in chosen if _filters(states[i].params, vocab)]
        others = [i for i in chosen if not _filters(states[i].params, vocab)]
        for some, choose in ((others, choose_unfiltered), (filtered, choose_filtered)):
            if not some:
                continue
            params = [states[i].params for i in some]
            index, heat, u, top_k, top_p, min_p = self._runtime.move(
                [
                    torch.tensor(some),
                    torch.tensor([p.temperature for p in params], dtype=torch.float32),
                    torch.tensor(
                        [uniform(states[i].seed, positions[i]) for i in some], dtype=torch.float64
                    ),
                    torch.tensor([p.top_k if 0 < p.top_k < vocab else vocab for p in params]),
                    torch.tensor([p.top_p for p in params], dtype=torch.float64),
                    torch.tensor([p.min_p for p in params], dtype=torch.float32),
                ]
            )
            scaled = logits.index_select(0, index) / heat.unsqueeze(-1)
            probs = scaled.softmax(-1)
            tokens.index_copy_(0, index, choose(probs, u, top_k, top_p, min_p))


def choose_unfiltered(
    probs: torch.Tensor,
    u: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """Tokens int64 [N] that u float64 [N] picks from float32 probs [N, V]; only min_p filters.

    As `sampler.choose_token`: sums run over tokens in the order of their ids.
    """
    del top_k, top_p
    return _pick(_at_least(probs, min_p), u).squeeze(-1)


def choose_filtered(
    probs: torch.Tensor,
    u: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """`choose_unfiltered` after top_k int64 [N] and top_p float64 [N] (1: all pass).

    The most likely tokens come first, equal ones by id; the one that brings their sum to top_p is
    the last that passes, the first always does.
    """
    weights, ids = probs.sort(dim=-1, descending=True, stable=True)
    reached = weights.cumsum(-1, dtype=torch.float64)
    before = torch.nn.functional.pad(reached[:, :-1], (1, 0))
    place = torch.arange(probs.shape[1], device=probs.device)
    # Without top_p all pass, also where rounding brings the sum to 1 too early.
    passes = (before < top_p.unsqueeze(-1)) | (top_p >= 1.0).unsqueeze(-1)
    passes = (passes | (place == 0)) & (place < top_k.unsqueeze(-1))
    weights = _at_least(weights.masked_fill(~passes, 0.0), min_p)
    return ids.gather(-1, _pick(weights, u)).squeeze(-1)


def _at_least(weights: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    bound = min_p.unsqueeze(-1) * weights.amax(-1, keepdim=True)
    return weights.masked_fill(weights < bound, 0.0)


def _pick(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Places int64 [N, 1] where u times each row's sum falls; a weight of 0 spans nothing."""
    bounds = weights.cumsum(-1, dtype=torch.float64)
    at = torch.searchsorted(bounds, (u.unsqueeze(-1) * bounds[:, -1:]), right=True)
    return at.clamp_(max=weights.shape[-1] - 1)


def _filters(params: SamplingParams, vocab: int) -> bool:
    return params.top_p < 1.0 or 0 < params.top_k < vocab


def _greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first best token of each row int64 [B], and whether the row was invalid, bool [B].

    Makes the maximum of every row finite in place, as `Sampler` does.
    """
    invalid = ~torch.isfinite(logits.amax(-1))
    largest = torch.finfo(logits.dtype).max
    low = -float("inf")
    usable = logits.nan_to_num(nan=low, posinf=largest, neginf=low)
    hopeless = torch.isneginf(usable.amax(-1, keepdim=True))
    usable = usable.masked_fill(hopeless, 0.0)
    logits.copy_(torch.where(invalid.unsqueeze(-1), usable, logits))
    return logits.argmax(-1), invalid
