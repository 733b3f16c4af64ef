"""/v1/chat/completions: messages to a prompt, deltas to OpenAI's objects."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from sglang.srt.entrypoints.event_stream import DONE_EVENT, event, progress_comment
from sglang.srt.entrypoints.generate_request_body import session_of
from sglang.srt.entrypoints.http_errors import ApiShape, bad_field, stream_error
from sglang.srt.entrypoints.logprob_format import chat_content, formatted_bytes
from sglang.srt.entrypoints.openai.chat_choice import (
    Chunk,
    StreamedChoice,
    whole_choice,
)
from sglang.srt.entrypoints.openai.chat_messages import messages_with_images, template_kwargs
from sglang.srt.entrypoints.openai.protocol import CHAT_FIELDS, ChatBody
from sglang.srt.entrypoints.openai.serving_base import (
    MAX_OPENAI_TOP_LOGPROBS,
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
from sglang.srt.entrypoints.openai.tool_fields import ToolUse, read_tool_use
from sglang.srt.entrypoints.request_body import RawFields, off_loop
from sglang.srt.entrypoints.sequences import Call, SequenceOutput
from sglang.srt.entrypoints.thinking import check_budget
from sglang.srt.errors import RequestError
from sglang.srt.function_call.strict_calls import strict_tag
from sglang.srt.managers.generate_request import GenerateDelta, GenerateRequest, IdArray
from sglang.srt.managers.io_struct import LogprobArrays
from sglang.srt.parser.answer_parser import (
    GPT_OSS,
    PARSE_BYTES_PER_CHAR,
    AnswerForm,
    ReasoningCount,
)
from sglang.srt.sampling.sampling_params import SamplingParams

_OPENING = Chunk({"role": "assistant", "content": ""}, None, finish_fields(None))


@dataclass(frozen=True)
class ChatCall:
    """A request that is ready to run, and how its answers are read.

    `prompt_ids` None: they are not shown.
    """

    head: ReplyHead
    call: Call
    body: ChatBody
    form: AnswerForm
    prompt_ids: IdArray | None = None


def read_chat(fields: RawFields) -> ChatBody:
    """Read the fields; RequestError 400 naming the first that cannot be served."""
    return CHAT_FIELDS.read(fields)


class ChatServing(OpenAIServing):
    """Serves read chat requests."""

    async def prepare(self, body: ChatBody) -> ChatCall:
        """Render the conversation and build the call; RequestError 400 when it cannot be."""
        messages, sources = messages_with_images(body.messages)
        tools = read_tool_use(body.tools, body.tool_choice, body.parallel_tool_calls)
        given = {**self.options.template_defaults, **body.chat_template_kwargs}
        kwargs = template_kwargs(given, body.reasoning_effort)
        if body.continue_final_message and messages[-1]["role"] != "assistant":
            raise bad_field("continue_final_message", "the last message is not the assistant's")
        params = self._params(body, tools)
        check_budget(params, self.options.parsers)
        images = await self.service.images.load(sources) if sources else ()
        text = await self.service.render_chat(
            messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            **tools.template_kwargs,
            **kwargs,
        )
        is_tagged = self._is_tagged(params)
        form = AnswerForm(
            names=self.options.parsers,
            tools=tools.schemas,
            max_calls=tools.max_calls,
            prompt=text,
            continued=messages[-1]["content"] if body.continue_final_message else "",
            separates=body.separate_reasoning,
            is_held=params.constraint is not None and not is_tagged,
            is_forced=tools.forced_schema is not None,
            is_tagged=is_tagged,
            is_bounded=params.max_thinking_tokens is not None,
        )
        params = msgspec.structs.replace(params, reasoning=form.free_reasoning)
        head, rid, extra_key = call_ids(body)
        request = GenerateRequest(
            rid=rid,
            text=text,
            input_ids=None,
            sampling_params=params,
            stream=body.stream,
            return_logprob=body.logprobs,
            top_logprobs_num=body.top_logprobs,
            extra_key=extra_key,
            lora_path=self.service.adapters.name_in(body.model) or body.lora_path,
            priority=body.priority,
            add_special_tokens=False,
            kept_special_tokens=form.kept_tokens,
            include_progress=body.stream and bool(body.stream_options.include_progress),
            session=session_of(body.session_params),
            routed_dp_rank=body.replica,
            images=images,
        )
        if body.shows_prompt_ids:
            request = await self.with_ids(request)
        shown = request.input_ids  # the request will let go of them
        return ChatCall(head, Call(rid, (request,)), body, form, shown)

    def _params(self, body: ChatBody, tools: ToolUse) -> SamplingParams:
        """The sampling parameters, forced calls included; RequestError 400 naming a bad field."""
        if not 0 <= body.top_logprobs <= MAX_OPENAI_TOP_LOGPROBS:
            raise bad_field(
                "top_logprobs",
                f"it must be in [0, {MAX_OPENAI_TOP_LOGPROBS}], got {body.top_logprobs}",
            )
        if body.top_logprobs and not body.logprobs:
            raise bad_field("top_logprobs", "it needs logprobs to be true")
        check_max_tokens("max_tokens", body.max_tokens)
        check_max_tokens("max_completion_tokens", body.max_completion_tokens)
        max_new = body.max_completion_tokens
        if max_new is None:
            max_new = body.max_tokens
        params = sampling_params(body, max_new, self.options.sampling_defaults)
        if tools.forced_schema is None:
            return self._strict_calls(params, tools)
        if params.constraint is not None:
            raise bad_field("tool_choice", f"{params.constraint.kind} is given as well")
        return msgspec.structs.replace(params, json_schema=tools.forced_schema)

    def _strict_calls(self, params: SamplingParams, tools: ToolUse) -> SamplingParams:
        """Calls of strict functions held to their schemas, where nothing else is asked for."""
        if params.constraint is not None or not tools.strict or self.service.constraint_refusal:
            return params
        parser = self.options.parsers.tool_call
        tag = strict_tag(parser, tools.schemas, tools.strict, tools.max_calls)
        return msgspec.structs.replace(params, structural_tag=tag)

    def _is_tagged(self, params: SamplingParams) -> bool:
        """Whether only parts of the text are held to a grammar.

        Those of gpt-oss count as held from their first character: free text has none of its marks.
        """
        constraint = params.constraint
        names = (self.options.parsers.reasoning, self.options.parsers.tool_call)
        return (
            constraint is not None and constraint.kind == "structural_tag" and GPT_OSS not in names
        )

    async def reply(self, chat: ChatCall) -> dict[str, Any]:
        """The whole answer. Raises RequestError."""
        outputs = await self.runner.collect(chat.call)
        usage = self._usage(chat)
        choices = []
        for index, output in enumerate(outputs):
            last = last_of(output)
            size = formatted_bytes(output.output_logprobs)
            if not chat.form.is_plain:
                size += PARSE_BYTES_PER_CHAR * len(output.text)
            choice, reasoning = await off_loop(size, self._choice, chat, index, output, last)
            usage.note(index, last, reasoning)
            choices.append(choice)
        return {
            **chat.head.fields("chat.completion"),
            "choices": choices,
            "usage": usage.usage(),
            "metadata": {"weight_version": self.options.weight_version},
        }

    def _usage(self, chat: ChatCall) -> UsageCounter:
        return UsageCounter(
            chat.call.prompt_indices,
            self.options.cache_report,
            shows_reasoning=self.options.parsers.reasoning is not None,
        )

    def _choice(
        self, chat: ChatCall, index: int, output: SequenceOutput, last: GenerateDelta
    ) -> tuple[dict[str, Any], int]:
        """A choice and its number of reasoning tokens."""
        arrays = output.output_logprobs
        choice = whole_choice(chat.form, output.text, last.finish_reason)
        reasoning = ReasoningCount(chat.form, self.token_text).add(output.output_ids)
        logprobs = self._logprobs(arrays) if chat.body.logprobs else None
        ids = id_fields(chat.body, chat.prompt_ids, output.output_ids)
        return {"index": index, **choice, "logprobs": logprobs, **ids}, reasoning

    def _logprobs(self, arrays: LogprobArrays | None) -> dict[str, Any]:
        return {"content": chat_content(arrays, self.token_bytes)}

    async def events(self, chat: ChatCall) -> AsyncGenerator[bytes, None]:
        """Encoded chunks, `[DONE]` last. Raises RequestError only before the first one."""
        options = chat.body.stream_options
        usage = self._usage(chat)
        begun: dict[int, tuple[StreamedChoice, ReasoningCount]] = {}
        has_sent = False
        try:
            async with aclosing(self.runner.answers(chat.call)) as deltas:
                async for index, delta in deltas:
                    if delta.progress is not None:
                        has_sent = True
                        yield progress_comment(index, delta.progress)
                        continue
                    opening = () if index in begun else (_OPENING,)
                    if opening:
                        begun[index] = self._begin_choice(chat)
                    choice, count = begun[index]
                    usage.note(index, delta, count.add(delta.output_ids))
                    now = usage.usage() if options.continuous_usage_stats else None
                    for chunk in opening:
                        ids = id_fields(chat.body, chat.prompt_ids, None)
                        yield event(self._chunk(chat, index, chunk, now, ids))
                    for chunk, output_ids in choice.chunks_with_ids(delta):
                        ids = id_fields(chat.body, None, output_ids)
                        yield event(self._chunk(chat, index, chunk, now, ids))
        except RequestError as error:
            if not (begun or has_sent):
                raise
            yield event(stream_error(ApiShape.OPENAI, error))
            yield DONE_EVENT
            return
        if self.includes_usage(options):
            yield event(
                {
                    **chat.head.fields("chat.completion.chunk"),
                    "choices": [],
                    "usage": usage.usage(),
                }
            )
        yield DONE_EVENT

    def _begin_choice(self, chat: ChatCall) -> tuple[StreamedChoice, ReasoningCount]:
        choice = StreamedChoice(chat.form, chat.body.stream_reasoning)
        return choice, ReasoningCount(chat.form, self.token_text)

    def _chunk(
        self,
        chat: ChatCall,
        index: int,
        chunk: Chunk,
        usage: dict[str, Any] | None,
        ids: dict[str, IdArray],
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": chunk.delta,
            "logprobs": self._logprobs(chunk.logprobs) if chunk.logprobs is not None else None,
            **chunk.end,
            **ids,
        }
        return {**chat.head.fields("chat.completion.chunk"), "choices": [choice], "usage": usage}
