"""/generate: SGLang's native API, from a read request to its reply.

The request's reading is in generate_request_body.py, running it in sequences.py. Events of a
stream are built here, one JSON object each.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from sglang.srt.entrypoints.event_stream import DONE_EVENT, event, progress_comment
from sglang.srt.entrypoints.generate_request_body import GenerateCall
from sglang.srt.entrypoints.http_errors import ApiShape, bad_field, stream_error
from sglang.srt.entrypoints.logprob_format import (
    Entry,
    formatted_bytes,
    picked_entries,
    token_entries,
    top_entries,
)
from sglang.srt.entrypoints.request_body import off_loop
from sglang.srt.entrypoints.sequences import (
    CLIENT_CLOSED,
    SequenceOutput,
    SequenceRunner,
    abort_error,
)
from sglang.srt.entrypoints.service import TextService
from sglang.srt.entrypoints.thinking import with_reasoning
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import GenerateDelta, GenerateRequest
from sglang.srt.managers.io_struct import DraftCounts, FinishReason, LogprobArrays
from sglang.srt.parser.answer_parser import PARSE_BYTES_PER_CHAR, AnswerForm, ReasoningCount


def finish_object(reason: FinishReason | None) -> dict[str, Any] | None:
    """SGLang's `finish_reason` object; None while running."""
    if reason is None:
        return None
    if reason.type == "stop":
        return {"type": "stop", "matched": reason.matched}
    if reason.type == "length":
        return {"type": "length", "length": reason.length}
    own_wish = reason.status_code in (0, CLIENT_CLOSED)
    return {
        "type": "abort",
        "message": reason.message,
        "status_code": None if own_wish else reason.status_code,
        "err_type": reason.err_type or None,
    }


def meta_info(
    rid: str, last: GenerateDelta, seconds: float, weight_version: str, reasoning_tokens: int
) -> dict[str, Any]:
    """The part of `meta_info` that every reply has; `seconds` since the request came in."""
    info: dict[str, Any] = {
        "id": rid,
        "finish_reason": finish_object(last.finish_reason),
        "prompt_tokens": last.prompt_tokens,
        "weight_version": weight_version,
        "num_retractions": last.num_retractions,
        "completion_tokens": last.completion_tokens,
        "cached_tokens": last.cached_tokens,
        "reasoning_tokens": reasoning_tokens,
        "dp_rank": last.dp_rank,
    }
    if last.finish_reason is not None:
        info["e2e_latency"] = seconds
    if last.drafts is not None:
        info |= draft_figures(last.drafts)
    return info


def draft_figures(drafts: DraftCounts) -> dict[str, Any]:
    """SGLang's `spec_*` entries; the accept length counts the token after a draft as well."""
    return {
        "spec_accept_rate": drafts.num_correct / drafts.num_proposed,
        "spec_accept_length": 1 + drafts.num_correct / drafts.num_verified,
        "spec_num_correct_drafts": drafts.num_correct,
        "spec_num_proposed_drafts": drafts.num_proposed,
        "spec_verify_ct": drafts.num_verified,
    }


class _Logprobs:
    """One sequence's logprob entries of `meta_info`, formatted once as they come."""

    def __init__(self, request: GenerateRequest, text_of: Callable[[int], str] | None) -> None:
        self._request = request
        self._text_of = text_of
        self._lists: dict[str, list[Any]] = {}

    def add(self, inputs: LogprobArrays | None, outputs: LogprobArrays | None) -> None:
        """Format what is new."""
        for side, arrays in (("input", inputs), ("output", outputs)):
            self._extend(f"{side}_token_logprobs", token_entries(arrays, self._text_of))
            if self._request.top_logprobs_num > 0:
                self._extend(f"{side}_top_logprobs", top_entries(arrays, self._text_of))
            if self._request.token_ids_logprob:
                self._extend(f"{side}_token_ids_logprobs", picked_entries(arrays, self._text_of))

    def _extend(self, name: str, entries: list[Entry] | list[list[Entry] | None]) -> None:
        self._lists.setdefault(name, []).extend(entries)

    def fields(self) -> Mapping[str, Any]:
        """The entries for `meta_info`."""
        return {
            **self._lists,
            "output_token_logprobs_length": len(self._lists["output_token_logprobs"]),
        }


class GenerateServer:
    """Serves read /generate requests; one for the whole server, without state of its own.

    `incremental` makes stream events carry only what is new (--incremental-streaming-output).
    `reasoning_parser` is the one that marks what `require_reasoning` counts.
    """

    def __init__(
        self,
        service: TextService,
        runner: SequenceRunner,
        *,
        incremental: bool,
        weight_version: str = "default",
        reasoning_parser: str | None = None,
    ) -> None:
        self._service = service
        self._runner = runner
        self._incremental = incremental
        self._weight_version = weight_version
        self._reasoning_parser = reasoning_parser

    async def reply(self, request: GenerateCall) -> dict[str, Any] | list[dict[str, Any]]:
        """The whole answer; a list for a batch or n above 1. Raises RequestError."""
        began = time.monotonic()
        request = await self._with_prompt_ids(await self._with_images(request))
        request, counts = self._with_reasoning(request)
        outputs = await self._runner.collect(request.call)
        seconds = time.monotonic() - began
        results = []
        for index, output in enumerate(outputs):
            size = formatted_bytes(output.input_logprobs, output.output_logprobs)
            if request.counts_reasoning:
                size += PARSE_BYTES_PER_CHAR * len(output.text)
            count = counts[index]
            results.append(
                await off_loop(size, self._whole, request, index, output, seconds, count)
            )
        return results if request.replies_with_list else results[0]

    async def events(self, request: GenerateCall) -> AsyncGenerator[bytes, None]:
        """Encoded events, `[DONE]` last. Raises RequestError only before the first one."""
        has_begun = False
        try:
            async with aclosing(self.stream(request)) as objects:
                async for content in objects:
                    has_begun = True
                    yield content if isinstance(content, bytes) else event(content)
        except RequestError as error:
            if not has_begun:
                raise
            yield event(stream_error(ApiShape.NATIVE, error))
        yield DONE_EVENT

    async def stream(self, request: GenerateCall) -> AsyncGenerator[dict[str, Any] | bytes, None]:
        """The objects of a stream, and encoded comments of progress if asked for.

        Raises RequestError, also after the first one.
        """
        began = time.monotonic()
        request = await self._with_prompt_ids(await self._with_images(request))
        request, counts = self._with_reasoning(request)
        prompts = [request.call.prompts[i] for i in request.call.prompt_indices]
        outputs = [SequenceOutput() for _ in prompts]
        logprobs = [_Logprobs(prompt, self._text_of(request)) for prompt in prompts]
        is_first = True
        async with aclosing(self._runner.stream(request.call)) as deltas:
            async for index, delta in deltas:
                if delta.progress is not None:
                    yield progress_comment(index, delta.progress)
                    continue
                refused = abort_error(delta.finish_reason) if is_first else None
                if refused is not None:
                    raise refused
                is_first = False
                yield await off_loop(
                    formatted_bytes(delta.input_logprobs, delta.output_logprobs),
                    self._event,
                    request,
                    index,
                    prompts[index],
                    delta,
                    outputs[index],
                    logprobs[index],
                    time.monotonic() - began,
                    counts[index].add(delta.output_ids),
                )

    # ---- one object ----

    def _whole(
        self,
        request: GenerateCall,
        index: int,
        output: SequenceOutput,
        seconds: float,
        count: ReasoningCount,
    ) -> dict[str, Any]:
        last = output.last
        if last is None:
            raise RequestError("The request ended without an answer.", 500)
        reasoning_tokens = count.add(output.output_ids)
        prompt = request.call.prompts[request.call.prompt_indices[index]]
        rid = request.call.sequence_rids[index]
        info = meta_info(rid, last, seconds, self._weight_version, reasoning_tokens)
        if prompt.return_logprob:
            logprobs = _Logprobs(prompt, self._text_of(request))
            logprobs.add(output.input_logprobs, output.output_logprobs)
            info.update(logprobs.fields())
        return self._object(request, index, output.text, output.output_ids, info)

    def _event(
        self,
        request: GenerateCall,
        index: int,
        prompt: GenerateRequest,
        delta: GenerateDelta,
        output: SequenceOutput,
        logprobs: _Logprobs,
        seconds: float,
        reasoning_tokens: int,
    ) -> dict[str, Any]:
        rid = request.call.sequence_rids[index]
        info = meta_info(rid, delta, seconds, self._weight_version, reasoning_tokens)
        if self._incremental:
            logprobs = _Logprobs(prompt, self._text_of(request))
        if prompt.return_logprob:
            logprobs.add(delta.input_logprobs, delta.output_logprobs)
            info.update(logprobs.fields())
        if self._incremental:
            content = self._object(request, index, delta.text, delta.output_ids, info)
        else:
            # SGLang's format: every event repeats the whole text, ids and log probabilities, so
            # a stream of n events is O(n^2) bytes on the wire whatever a server does. Only what
            # the events show is copied; a slow reader gets fewer of them (deltas are merged).
            output.add(replace(delta, input_logprobs=None, output_logprobs=None))
            content = self._object(request, index, output.text, output.output_ids, info)
        if request.replies_with_list:
            content["index"] = index
        return content

    def _object(
        self, request: GenerateCall, index: int, text: str, ids: Any, info: Any
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text, "output_ids": ids, "meta_info": info}
        if self._service.tokenizer is None:
            del content["text"]
        if request.return_prompt_ids:
            content["prompt_token_ids"] = request.prompt_ids[request.call.prompt_indices[index]]
        return content

    # ---- helpers ----

    async def _with_images(self, request: GenerateCall) -> GenerateCall:
        """The request with the images of its prompts loaded, all of them before anything runs."""
        if not request.images:
            return request
        pairs = zip(request.call.prompts, request.images, strict=True)
        load = self._service.images.load
        prompts = [replace(prompt, images=await load(sources)) for prompt, sources in pairs]
        return replace(request, call=replace(request.call, prompts=tuple(prompts)), images=())

    async def _with_prompt_ids(self, request: GenerateCall) -> GenerateCall:
        """The request with its texts tokenized and all ids kept, when the reply shows them."""
        if not request.return_prompt_ids:
            return request
        prompts = []
        for prompt in request.call.prompts:
            if prompt.text is not None:
                ids = await self._service.tokenize(prompt.text, prompt.add_special_tokens)
                prompt = replace(prompt, text=None, input_ids=ids)
            prompts.append(prompt)
        return replace(
            request,
            call=replace(request.call, prompts=tuple(prompts)),
            prompt_ids=tuple(prompt.input_ids for prompt in prompts),
        )

    def _with_reasoning(self, request: GenerateCall) -> tuple[GenerateCall, list[ReasoningCount]]:
        """The request, its constraints behind reasoning if it says so, and each sequence's count.

        A prompt whose reasoning is bounded has reasoning, too. RequestError 400 when nobody knows
        what is reasoning.
        """
        tokenizer, parser = self._service.tokenizer, self._reasoning_parser
        prompts, forms = list(request.call.prompts), dict[int, AnswerForm]()
        for i, prompt in enumerate(prompts):
            if request.counts_reasoning or prompt.sampling_params.max_thinking_tokens is not None:
                if request.counts_reasoning and (parser is None or tokenizer is None):
                    raise bad_field("require_reasoning", "the server has no --reasoning-parser")
                prompts[i], forms[i] = with_reasoning(prompt, parser, self._token_text)
        if forms:
            request = replace(request, call=replace(request.call, prompts=tuple(prompts)))
        counts = [
            ReasoningCount(forms.get(i), self._token_text) for i in request.call.prompt_indices
        ]
        return request, counts

    def _token_text(self, token_id: int) -> str:
        tokenizer = self._service.tokenizer
        return "" if tokenizer is None else tokenizer.token_text(token_id)

    def _text_of(self, request: GenerateCall) -> Callable[[int], str] | None:
        tokenizer = self._service.tokenizer
        if not request.text_in_logprobs or tokenizer is None:
            return None
        return tokenizer.token_text
