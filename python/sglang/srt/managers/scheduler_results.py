"""What a computed step means for its requests: the only place where a request moves on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from sglang.srt.managers.draft_policy import num_taken
from sglang.srt.managers.generation_result import GenerationBatchResult
from sglang.srt.managers.io_struct import FinishReason
from sglang.srt.managers.schedule_batch import Req, ReqState, ScheduleBatch, ScheduledReq
from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

logger = logging.getLogger(__name__)


class StepCounts(NamedTuple):
    """Tokens that a step gave its requests, drafts that it verified, their tokens, and how many of
    these were taken."""

    num_tokens: int
    num_verified: int
    num_proposed: int
    num_correct: int


def finish_reason_of(req: Req, token_id: int, context_length: int) -> FinishReason | None:
    """Why `req` ends with the token just appended, or None when it goes on.

    A grammar's text is complete with an end-of-text token, whatever else was asked for.
    """
    if req.grammar is not None and token_id in req.grammar.end_ids:
        return FinishReason("stop", matched=token_id)
    if token_id in req.stop_token_ids and req.num_output >= req.params.min_new_tokens:
        return FinishReason("stop", matched=token_id)
    if req.num_output >= req.max_new_tokens or req.known >= context_length:
        return FinishReason("length", length=req.num_output)
    return None


def process_result(
    batch: ScheduleBatch,
    info: SamplingBatchInfo,
    result: GenerationBatchResult,
    memory: KVMemory,
    context_length: int,
) -> StepCounts:
    """Apply a step to its requests: tokens appended, prefixes cached, ends found.

    Of a draft its request takes what was sampled as well, and the token after that; the slots of
    the rest are taken back. A request that was found ending while this step was under way takes
    nothing from it: the token after its end is discarded and never cached. Releases no memory; the
    caller settles requests once no forward names them.
    """
    if result.invalid_rows:
        named = {place: i for i in range(len(batch.items)) for place in info.places_of(i)}
        rids = [batch.items[named[place]].req.rid for place in result.invalid_rows]
        logger.warning("Step %d: the logits of %s are not finite numbers", batch.step, rids)
    expected = info.expected_of(result.drafted)
    num_tokens = num_verified = num_proposed = num_correct = 0
    for position, item in enumerate(batch.items):
        req = item.req
        req.num_inflight -= 1
        places = info.places_of(position)
        if places:
            req.num_pending -= 1
            num_tokens += 1
        if req.is_ending:
            continue
        part = result.input_logprobs[position]
        if part is not None and req.logprob is not None:
            req.logprob.input_parts.append(part)
        if req.pooling is not None and position in result.pooled:
            req.pooling.add(result.pooled[position])
        if req.state is ReqState.PREFILL:
            end = item.start + item.num_tokens - len(item.draft)
            ends_prompt = end >= req.known
            if req.num_followed is not None:
                end = min(end, req.num_followed)
            memory.cache_prefix(item.lease, req.tokens.view(0, end), end, keep_window=ends_prompt)
        failure = next((result.failures[i] for i in places if i in result.failures), None)
        if failure is not None:
            text = f"The constraint cannot be held: {failure}"
            req.finish(FinishReason("abort", message=text, status_code=400))
        elif places:
            ids = result.token_ids[places.start : places.stop]
            count = num_taken(ids, expected[places.start : places.stop])
            if item.draft:
                _settle_draft(item, count)
                num_tokens += count - 1
                num_verified += 1
                num_proposed += len(item.draft)
                num_correct += count - 1
            _take_tokens(req, places[:count], result, context_length)
        elif item.start + item.num_tokens >= req.known and req.max_new_tokens == 0:
            # Of this step, not of one ahead of it: what that one brings is still to come.
            req.finish(FinishReason("length", length=0))
    return StepCounts(num_tokens, num_verified, num_proposed, num_correct)


def _settle_draft(item: ScheduledReq, num_taken: int) -> None:
    """Keep the slots of the tokens that were computed for good: all but the last one taken."""
    req = item.req
    req.num_scheduled = item.start + num_taken
    item.lease.rewind(req.num_scheduled)
    if req.num_followed is not None:
        req.num_followed = min(req.num_followed, req.num_scheduled)
    if req.drafts is not None:
        req.drafts.note(len(item.draft), num_taken - 1)


def _take_tokens(
    req: Req, places: Sequence[int], result: GenerationBatchResult, context_length: int
) -> None:
    """Append what was sampled at `places`, up to the token that ends the request."""
    for place in places:
        token_id = int(result.token_ids[place])
        req.tokens.append(token_id)
        if req.state is ReqState.PREFILL:
            req.move(ReqState.DECODE)
        output = result.output_logprobs[place]
        if output is not None:
            req.output_logprobs.append(output)
        reason = finish_reason_of(req, token_id, context_length)
        if reason is not None:
            req.finish(reason)
            return
