"""/v1/completions: prompts as text or ids, singly or in a batch; echo; log probabilities."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from sglang.srt.entrypoints.event_stream import DONE_EVENT, event, progress_comment
from sglang.srt.entrypoints.generate_request_body import (
    adapter_for_each,
    read_id_prompts,
    session_of,
)
from sglang.srt.entrypoints.http_errors import ApiShape, bad_field, stream_error
from sglang.srt.entrypoints.logprob_format import CompletionLogprobs, formatted_bytes
from sglang.srt.entrypoints.openai.protocol import COMPLETION_FIELDS, CompletionBody
from sglang.srt.entrypoints.openai.serving_base import (
    OpenAIServing,
    ReplyHead,
    UsageCounter,
    call_ids,
    check_max_tokens,
    finish_fields,
    id_fields,
    last_of,
    sampling_params,
)
from sglang.srt.entrypoints.request_body import (
    Fields,
    FieldValue,
    decode_field,
    list_kind,
    off_loop,
)
from sglang.srt.entrypoints.sequences import Call, SequenceOutput
from sglang.srt.entrypoints.thinking import with_reasoning
from sglang.srt.entrypoints.token_id_reader import IdLists
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import GenerateDelta, GenerateRequest, IdArray

DEFAULT_MAX_TOKENS = 16  # OpenAI's

_TEXT = msgspec.json.Decoder(str)
_TEXTS = msgspec.json.Decoder(list[str])


@dataclass(frozen=True)
class CompletionCall:
    """A request that is ready to run.

    `echoes` is each prompt's text when it is to be repeated, `prompt_ids` its ids when they are to
    be shown.
    """

    head: ReplyHead
    call: Call
    body: CompletionBody
    echoes: tuple[str, ...]
    prompt_ids: tuple[IdArray | None, ...] = ()

    def ids_of(self, index: int) -> IdArray | None:
        """The prompt's ids of sequence `index`; None when they are not shown."""
        return self.prompt_ids[self.call.prompt_indices[index]] if self.prompt_ids else None


def read_completion(fields: Fields) -> CompletionBody:
    """Read the fields; RequestError 400 naming the first that cannot be served."""
    return COMPLETION_FIELDS.read(fields)


def read_prompts(prompt: FieldValue, name: str = "prompt") -> list[str | IdArray]:
    """The field `name` in its four forms: text, texts, ids, lists of ids."""
    prompts: list[str | IdArray]
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, IdLists):
        return [*prompt.arrays]
    opening = bytes(memoryview(prompt)[:1])
    if opening == b'"':
        prompts = [decode_field(name, prompt, _TEXT)]
    elif opening != b"[":
        raise bad_field(name, "expected text, token ids, or a list of either")
    elif list_kind(prompt) == b'"':
        prompts = [*decode_field(name, prompt, _TEXTS)]
    else:
        prompts = [*read_id_prompts(name, prompt).arrays]
    if any(len(prompt) == 0 for prompt in prompts):
        raise bad_field(name, "a prompt is empty")
    return prompts


class CompletionServing(OpenAIServing):
    """Serves read completion requests."""

    async def prepare(self, body: CompletionBody, prompts: list[str | IdArray]) -> CompletionCall:
        """Build the call; RequestError 400 when it cannot be."""
        check_max_tokens("max_tokens", body.max_tokens)
        if body.logprobs is not None and body.logprobs < 0:
            raise bad_field("logprobs", f"it must be at least 0, got {body.logprobs}")
        if body.suffix and not all(isinstance(prompt, str) for prompt in prompts):
            raise bad_field("suffix", "it goes with prompts that are text")
        if body.echo and session_of(body.session_params) is not None:
            raise bad_field("echo", "a session's earlier text is not repeated")
        max_new = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        params = sampling_params(body, max_new, self.options.sampling_defaults)
        head, rid, extra_key = call_ids(body)
        wanted = self.service.adapters.name_in(body.model) or body.lora_path
        adapters = adapter_for_each(wanted, len(prompts), is_batch=True)
        with_logprobs = body.logprobs is not None
        requests = tuple(
            GenerateRequest(
                rid=rid if len(prompts) == 1 else f"{rid}_{i}",
                text=self._asked(prompt, body.suffix) if isinstance(prompt, str) else None,
                input_ids=None if isinstance(prompt, str) else prompt,
                sampling_params=params,
                stream=body.stream,
                return_logprob=with_logprobs,
                logprob_start_len=0 if with_logprobs and body.echo else -1,
                top_logprobs_num=body.logprobs or 0,
                extra_key=extra_key,
                lora_path=adapters[i],
                priority=body.priority,
                include_progress=body.stream and bool(body.stream_options.include_progress),
                session=session_of(body.session_params),
                routed_dp_rank=body.replica,
            )
            for i, prompt in enumerate(prompts)
        )
        if params.max_thinking_tokens is not None:
            parser = self.options.parsers.reasoning
            requests = tuple(with_reasoning(one, parser, self.token_text)[0] for one in requests)
        echoes = []
        for prompt in prompts if body.echo else ():
            if not isinstance(prompt, str):
                prompt = await self.service.detokenize(prompt)
            echoes.append(prompt)
        shown: tuple[IdArray | None, ...] = ()
        if body.shows_prompt_ids:
            requests = tuple([await self.with_ids(one) for one in requests])
            shown = tuple(one.input_ids for one in requests)
        return CompletionCall(head, Call(rid, requests), body, tuple(echoes), shown)

    def _asked(self, prompt: str, suffix: str | None) -> str:
        """The text that the model goes on with; RequestError 400 where it knows no suffix."""
        if not suffix:
            return prompt
        if self.options.middle is None:
            raise bad_field("suffix", "the server has no --completion-template")
        return self.options.middle.prompt(prompt, suffix)

    async def reply(self, completion: CompletionCall) -> dict[str, Any]:
        """The whole answer. Raises RequestError."""
        outputs = await self.runner.collect(completion.call)
        indices = completion.call.prompt_indices
        usage = UsageCounter(indices, self.options.cache_report)
        choices = []
        for index, output in enumerate(outputs):
            last = last_of(output)
            usage.note(index, last)
            size = formatted_bytes(output.input_logprobs, output.output_logprobs)
            choices.append(await off_loop(size, self._choice, completion, index, output, last))
        return {
            **completion.head.fields("text_completion"),
            "choices": choices,
            "usage": usage.usage(),
            "metadata": {"weight_version": self.options.weight_version},
        }

    def _choice(
        self, completion: CompletionCall, index: int, output: SequenceOutput, last: GenerateDelta
    ) -> dict[str, Any]:
        logprobs = None
        if completion.body.logprobs is not None:
            shown = output.input_logprobs if completion.body.echo else None
            logprobs = CompletionLogprobs(self.token_text).add(shown, output.output_logprobs)
        return {
            "index": index,
            "text": _echo(completion, index) + output.text,
            "logprobs": logprobs,
            **finish_fields(last.finish_reason),
            **id_fields(completion.body, completion.ids_of(index), output.output_ids),
        }

    async def events(self, completion: CompletionCall) -> AsyncGenerator[bytes, None]:
        """Encoded chunks, `[DONE]` last. Raises RequestError only before the first one."""
        options = completion.body.stream_options
        indices = completion.call.prompt_indices
        usage = UsageCounter(indices, self.options.cache_report)
        formats = [CompletionLogprobs(self.token_text) for _ in indices]
        begun: set[int] = set()
        has_sent = False
        try:
            async with aclosing(self.runner.answers(completion.call)) as deltas:
                async for index, delta in deltas:
                    if delta.progress is not None:
                        has_sent = True
                        yield progress_comment(index, delta.progress)
                        continue
                    usage.note(index, delta)
                    is_first = index not in begun
                    begun.add(index)
                    size = formatted_bytes(delta.input_logprobs, delta.output_logprobs)
                    chunk = await off_loop(
                        size, self._chunk, completion, index, delta, is_first, formats[index]
                    )
                    chunk["usage"] = usage.usage() if options.continuous_usage_stats else None
                    yield event(chunk)
        except RequestError as error:
            if not (begun or has_sent):
                raise
            yield event(stream_error(ApiShape.OPENAI, error))
            yield DONE_EVENT
            return
        if self.includes_usage(options):
            yield event(
                {
                    **completion.head.fields("text_completion"),
                    "choices": [],
                    "usage": usage.usage(),
                }
            )
        yield DONE_EVENT

    def _chunk(
        self,
        completion: CompletionCall,
        index: int,
        delta: GenerateDelta,
        is_first: bool,
        logprobs: CompletionLogprobs,
    ) -> dict[str, Any]:
        shown = delta.input_logprobs if completion.body.echo else None
        choice = {
            "index": index,
            "text": (_echo(completion, index) if is_first else "") + delta.text,
            "logprobs": (
                logprobs.add(shown, delta.output_logprobs)
                if completion.body.logprobs is not None
                else None
            ),
            **finish_fields(delta.finish_reason),
            **id_fields(
                completion.body, completion.ids_of(index) if is_first else None, delta.output_ids
            ),
        }
        return {**completion.head.fields("text_completion"), "choices": [choice]}


def _echo(completion: CompletionCall, index: int) -> str:
    if not completion.echoes:
        return ""
    return completion.echoes[completion.call.prompt_indices[index]]
