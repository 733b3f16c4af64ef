"""What the sampler remembers of one KV row: its parameters and the tokens that penalties count.

`Sampler` makes one per admitted request and tells it every sampled token. Memory follows the
distinct tokens seen, never the vocabulary; a step costs what those tokens cost. Knows no batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.constrained.grammar import TokenMatcher
from sglang.srt.sampling.sampling_params import SamplingParams

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]

_MIN_ROOM = 64


class SamplingRow:
    """Parameters, seed and penalty counts of one request.

    Invariants: `_out_ids[:n]` are the n distinct output tokens in order of appearance,
    `_out_counts` how often each came, `_out_fresh` whether the prompt lacks it, `_place` the index
    of each. Nothing is counted when no penalty is asked for (`counts_tokens`). `bias_ids` int64 and
    `bias` float32 [M] are the logit_bias, `stop_ids` int64 the tokens that min_new_tokens hides.
    `matcher` None: no constraint.
    """

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt_ids: npt.NDArray[np.integer],
        output_ids: npt.NDArray[np.integer],
        matcher: TokenMatcher | None = None,
    ) -> None:
        self.matcher = matcher
        self.params = params
        self.seed = seed
        self.counts_tokens = params.has_penalties
        self.edits_logits = self.counts_tokens or bool(params.logit_bias)
        # Nothing but the highest logit decides its token, and nothing has to be remembered of it.
        self.takes_highest = params.greedy and not self.edits_logits and matcher is None
        self._prompt_ids = np.empty(0, np.int64)
        if params.repetition_penalty != 1.0:
            self._prompt_ids = np.unique(prompt_ids).astype(np.int64)
        self._place: dict[int, int] = {}
        self._out_ids = np.empty(0, np.int64)
        self._out_counts = np.empty(0, np.float32)
        self._out_fresh = np.empty(0, np.bool_)
        if self.counts_tokens:
            ids, firsts, counts = np.unique(output_ids, return_index=True, return_counts=True)
            order = np.argsort(firsts)
            for token, count in zip(ids[order].tolist(), counts[order].tolist(), strict=True):
                self._count(token, count)
        self.bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self.bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self.stop_ids = torch.tensor(params.stop_token_ids, dtype=torch.int64)

    def add(self, token: int) -> None:
        """Note a sampled token; amortised O(1), but for a grammar."""
        if self.counts_tokens:
            self._count(token, 1)
        if self.matcher is not None:
            self.matcher.accept(token)

    def edit(self, logits: torch.Tensor) -> None:
        """Apply penalties, then logit_bias, to float32 [V] in place.

        Repetition, over prompt and output: positive logits are divided by it, others multiplied
        (arXiv 1909.05858, section 4.1). Frequency times the count, and presence once, are then
        subtracted from tokens of the output alone (OpenAI API reference).
        """
        params = self.params
        n = len(self._place)
        ids = torch.from_numpy(self._out_ids[:n])
        if params.repetition_penalty != 1.0:
            _scale(logits, torch.from_numpy(self._prompt_ids), params.repetition_penalty)
            fresh = torch.from_numpy(self._out_fresh[:n])
            _scale(logits, ids[fresh], params.repetition_penalty)
        if n and (params.frequency_penalty != 0.0 or params.presence_penalty != 0.0):
            counts = torch.from_numpy(self._out_counts[:n])
            logits[ids] -= params.frequency_penalty * counts + params.presence_penalty
        if len(self.bias_ids):
            logits[self.bias_ids] += self.bias

    def seen(self) -> tuple[Int64Array, Int32Array]:
        """Distinct tokens int64 [n] that penalties count, and twice the count of each in the
        output, plus 1 where the prompt has it; int32 [n]."""
        n = len(self._place)
        ids = self._out_ids[:n]
        twice = 2 * self._out_counts[:n].astype(np.int32) + ~self._out_fresh[:n]
        unsaid = self._prompt_ids[~np.isin(self._prompt_ids, ids)]
        ones = np.ones(len(unsaid), np.int32)
        return np.concatenate((ids, unsaid)), np.concatenate((twice.astype(np.int32), ones))

    def hide_stop_tokens(self, logits: torch.Tensor) -> None:
        """Make the stop tokens impossible in float32 [V], in place (min_new_tokens)."""
        logits[self.stop_ids] = float("-inf")

    def hide_by_grammar(self, logits: torch.Tensor, *, hide_stops: bool) -> None:
        """Make impossible in float32 [V], in place, what the grammar does not allow.

        `hide_stops`: and the stop tokens (min_new_tokens), unless the grammar wants one of them.
        """
        assert self.matcher is not None
        hidden = self.matcher.hidden(self.params.stop_token_ids if hide_stops else None)
        if hidden is not None:
            np.putmask(logits.numpy(), hidden.view(np.bool_), -np.inf)  # faster than masked_fill_

    def _count(self, token: int, count: int) -> None:
        place = self._place.get(token)
        if place is None:
            place = len(self._place)
            if place == len(self._out_ids):
                self._grow(max(_MIN_ROOM, 2 * place))
            self._place[token] = place
            self._out_ids[place] = token
            self._out_counts[place] = 0
            at = int(np.searchsorted(self._prompt_ids, token))
            known = at < len(self._prompt_ids) and int(self._prompt_ids[at]) == token
            self._out_fresh[place] = not known
        self._out_counts[place] += count

    def _grow(self, room: int) -> None:
        self._out_ids = np.resize(self._out_ids, room)
        self._out_counts = np.resize(self._out_counts, room)
        self._out_fresh = np.resize(self._out_fresh, room)

    def __repr__(self) -> str:
        return (
            f"SamplingRow(seed={self.seed}, prompt_tokens={len(self._prompt_ids)}, "
            f"output_tokens={len(self._place)})"
        )


def _scale(logits: torch.Tensor, ids: torch.Tensor, penalty: float) -> None:
    values = logits[ids]
    logits[ids] = torch.where(values > 0, values / penalty, values * penalty)
