"""Turns what happened to requests into messages for the detokenizer: deltas, one final each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sglang.srt.managers.io_struct import (
    BatchTokenIDOut,
    DraftCounts,
    FinishReason,
    LogprobArrays,
    TokenOut,
    int32_buffer,
)
from sglang.srt.managers.schedule_batch import LogprobState, Req

# A client that does not stream and has no stop strings hears of its tokens this rarely: the
# messages in between would only be put together again on the other side.
QUIET_INTERVAL = 32


def concat_logprobs(parts: Sequence[LogprobArrays]) -> LogprobArrays:
    """Join row-wise; all parts have the same `top_num` and `picked_ids`."""
    return LogprobArrays(
        num_rows=sum(part.num_rows for part in parts),
        token_ids=b"".join(part.token_ids for part in parts),
        logprobs=b"".join(part.logprobs for part in parts),
        top_num=parts[0].top_num,
        top_ids=b"".join(part.top_ids for part in parts),
        top_logprobs=b"".join(part.top_logprobs for part in parts),
        picked_ids=parts[0].picked_ids,
        picked_logprobs=b"".join(part.picked_logprobs for part in parts),
    )


def input_logprobs(state: LogprobState, prompt_ids: np.ndarray) -> LogprobArrays:
    """All prompt log probabilities of a finished prompt; the first entry has none (NaN).

    `prompt_ids` int32: the whole prompt. The first entry stands for the token at `state.start`,
    whose probability nothing computed, as in SGLang.
    """
    num_picked = len(state.picked_ids)
    if state.start >= len(prompt_ids):
        return LogprobArrays(0, b"", b"", state.top_num, picked_ids=int32_buffer(state.picked_ids))
    nan = np.array([math.nan], "<f4")
    first = LogprobArrays(
        num_rows=1,
        token_ids=int32_buffer(prompt_ids[state.start : state.start + 1]),
        logprobs=nan.tobytes(),
        top_num=state.top_num,
        top_ids=int32_buffer(np.full(state.top_num, -1)),
        top_logprobs=np.repeat(nan, state.top_num).tobytes(),
        picked_ids=int32_buffer(state.picked_ids),
        picked_logprobs=np.repeat(nan, num_picked).tobytes(),
    )
    return concat_logprobs([first, *state.input_parts])


def _draft_counts(req: Req) -> DraftCounts | None:
    drafts = req.drafts
    if drafts is None or drafts.num_verified == 0:
        return None
    return DraftCounts(drafts.num_verified, drafts.num_proposed, drafts.num_correct)


def _pooled(req: Req) -> bytes | None:
    """The vector of a request that has ended well; None for all others."""
    reason = req.finish_reason
    if req.pooling is None or reason is None or reason.type == "abort":
        return None
    return req.pooling.vector().tobytes()


class OutputCollector:
    """Gathers the news of one turn; `take` hands them over as one message."""

    def __init__(self, stream_interval: int) -> None:
        self._interval = max(1, stream_interval)
        self._outs: list[TokenOut] = []

    def note(self, req: Req) -> None:
        """Tell of a request's new tokens when they are due, and of its end at once and once."""
        if req.final_sent:
            return
        req.final_sent = req.is_ending
        unsent = req.num_output - req.num_sent
        if not req.is_ending and not self._due(req, unsent):
            return
        start = req.prompt_len + req.num_sent
        ids = req.tokens.view(start, start + unsent)
        logprobs = concat_logprobs(req.output_logprobs) if req.output_logprobs else None
        req.output_logprobs = []
        self._outs.append(
            TokenOut(
                rid=req.rid,
                output_ids=int32_buffer(ids),
                prompt_tokens=req.prompt_len,
                completion_tokens=req.num_output,
                cached_tokens=req.num_cached_tokens or 0,
                num_retractions=req.num_retractions,
                finish_reason=req.finish_reason,
                input_logprobs=self._prompt_logprobs(req),
                output_logprobs=logprobs,
                detok=req.detok,
                drafts=_draft_counts(req),
                pooled=_pooled(req),
            )
        )
        req.detok = None
        req.num_sent = req.num_output

    def refuse(self, rid: str, prompt_tokens: int, reason: FinishReason) -> None:
        """The one final output of a request that never became a `Req`'s running life."""
        self._outs.append(TokenOut(rid, b"", prompt_tokens, 0, finish_reason=reason))

    def take(self) -> BatchTokenIDOut | None:
        """The turn's news, or None when there are none."""
        if not self._outs:
            return None
        outs, self._outs = self._outs, []
        return BatchTokenIDOut(outs)

    def _due(self, req: Req, unsent: int) -> bool:
        if unsent == 0:
            return False
        if req.num_sent == 0 or req.has_stop_strings:
            return True
        return unsent >= (self._interval if req.stream else max(self._interval, QUIET_INTERVAL))

    @staticmethod
    def _prompt_logprobs(req: Req) -> LogprobArrays | None:
        state = req.logprob
        if state is None or state.input_sent or (req.num_output == 0 and not req.is_ending):
            return None
        if req.finish_reason is not None and req.finish_reason.type == "abort":
            return None
        state.input_sent = True
        result = input_logprobs(state, req.vocabulary_ids(0, req.prompt_len))
        state.input_parts = []
        return result
