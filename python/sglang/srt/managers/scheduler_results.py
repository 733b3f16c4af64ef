"""What a computed step means for its requests: the only place where a request moves on."""

from __future__ import annotations

import logging

from sglang.srt.managers.generation_result import GenerationBatchResult
from sglang.srt.managers.io_struct import FinishReason
from sglang.srt.managers.schedule_batch import Req, ReqState, ScheduleBatch, ScheduledReq
from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

logger = logging.getLogger(__name__)


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
) -> None:
    """Apply a step to its requests: tokens appended, prefixes cached, ends found.

    A request that was found ending while this step was under way takes nothing from it: the
    token after its end is discarded and never cached. Releases no memory; the caller settles
    requests once no forward names them.
    """
    if result.invalid_rows:
        named = {place: i for i, place in enumerate(info.sample_index) if place >= 0}
        rids = [batch.items[named[place]].req.rid for place in result.invalid_rows]
        logger.warning("Step %d: the logits of %s are not finite numbers", batch.step, rids)
    for position, item in enumerate(batch.items):
        req = item.req
        req.num_inflight -= 1
        index = info.sample_index[position]
        if index >= 0:
            req.num_pending -= 1
        if req.is_ending:
            continue
        part = result.input_logprobs[position]
        if part is not None and req.logprob is not None:
            req.logprob.input_parts.append(part)
        if req.pooling is not None and position in result.pooled:
            req.pooling.add(result.pooled[position])
        if req.state is ReqState.PREFILL:
            end = item.start + item.num_tokens
            ends_prompt = end >= req.known
            memory.cache_prefix(item.lease, req.tokens.view(0, end), end, keep_window=ends_prompt)
        if index in result.failures:
            text = f"The constraint cannot be held: {result.failures[index]}"
            req.finish(FinishReason("abort", message=text, status_code=400))
        elif index >= 0:
            _take_token(item, int(result.token_ids[index]), context_length)
            output = result.output_logprobs[index]
            if output is not None:
                req.output_logprobs.append(output)
        elif item.start + item.num_tokens >= req.known and req.max_new_tokens == 0:
            # Of this step, not of one ahead of it: what that one brings is still to come.
            req.finish(FinishReason("length", length=0))


def _take_token(item: ScheduledReq, token_id: int, context_length: int) -> None:
    req = item.req
    req.tokens.append(token_id)
    if req.state is ReqState.PREFILL:
        req.move(ReqState.DECODE)
    reason = finish_reason_of(req, token_id, context_length)
    if reason is not None:
        req.finish(reason)
