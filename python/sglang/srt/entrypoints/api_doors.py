"""The doors that generate: /generate, the OpenAI endpoints, /tokenize and /detokenize.

Each reads its body under the limit, off the event loop when it is long, and hands it to the
server of its API. A client that leaves ends its work.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang.srt.entrypoints.event_stream import EventStream, while_connected
from sglang.srt.entrypoints.generate_request_body import (
    FIELDS_HEADER,
    GenerateCall,
    parse_binary_generate,
    parse_generate,
    read_id_prompts,
)
from sglang.srt.entrypoints.http_errors import ApiShape, JsonResponse, bad_field
from sglang.srt.entrypoints.openai.chat_messages import template_kwargs, template_messages
from sglang.srt.entrypoints.openai.protocol import ChatBody, CompletionBody
from sglang.srt.entrypoints.openai.responses_fields import ResponsesBody, read_responses
from sglang.srt.entrypoints.openai.serving_chat import read_chat
from sglang.srt.entrypoints.openai.serving_completions import read_completion, read_prompts
from sglang.srt.entrypoints.openai.tool_fields import read_tool_use
from sglang.srt.entrypoints.request_body import (
    FieldValue,
    content_type,
    off_loop,
    read_body,
    read_json_body,
    split_body,
    split_object,
)
from sglang.srt.entrypoints.request_fields import FieldTable
from sglang.srt.entrypoints.sequences import MAX_SEQUENCES
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.entrypoints.token_id_reader import IdLists
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import IdArray
from sglang.srt.managers.request_validation import check_ids


class TokenizeBody(msgspec.Struct, frozen=True):
    """The fields of /tokenize: one of `prompt` and `messages`, to which the last ones belong."""

    prompt: str | list[str] | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: str | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] | None = None
    model: str = ""


class DetokenizeBody(msgspec.Struct, frozen=True):
    """The fields of /detokenize; `tokens` is needed."""

    tokens: msgspec.Raw | IdLists | None = None
    skip_special_tokens: bool = True
    model: str = ""


TOKENIZE_FIELDS = FieldTable(TokenizeBody, accepted=(), refused={}, refuse_unknown=True)
DETOKENIZE_FIELDS = FieldTable(DetokenizeBody, accepted=(), refused={}, refuse_unknown=True)


class ApiDoors:
    """Endpoints that produce tokens or text; raise RequestError and ClientGoneError."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def generate(self, request: Request) -> Response:
        """POST or PUT /generate."""
        call = await self._read_generate(request)
        serving = self._context.generating.generate
        if call.stream:
            return EventStream(ApiShape.NATIVE, serving.events(call))
        return JsonResponse(await while_connected(request.receive, serving.reply(call)))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await self._openai_body(request)
        chat_body: ChatBody = await off_loop(len(body), _parse_chat, body)
        serving = self._context.generating.chat
        call = await while_connected(request.receive, serving.prepare(chat_body))
        if chat_body.stream:
            return EventStream(ApiShape.OPENAI, serving.events(call))
        return JsonResponse(await while_connected(request.receive, serving.reply(call)))

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = await self._openai_body(request)
        parsed: tuple[CompletionBody, list[str | IdArray]] = await off_loop(
            len(body), _parse_completion, body
        )
        serving = self._context.generating.completions
        call = await while_connected(request.receive, serving.prepare(*parsed))
        if call.body.stream:
            return EventStream(ApiShape.OPENAI, serving.events(call))
        return JsonResponse(await while_connected(request.receive, serving.reply(call)))

    async def responses(self, request: Request) -> Response:
        """POST /v1/responses."""
        raw = await self._openai_body(request)
        body: ResponsesBody = await off_loop(len(raw), _parse_responses, raw)
        serving = self._context.generating.responses
        call = await while_connected(request.receive, serving.prepare(body))
        if call.is_stream:
            return EventStream(ApiShape.RESPONSES, serving.events(call))
        return _json(await while_connected(request.receive, serving.reply(call)))

    async def response(self, request: Request) -> Response:
        """GET or DELETE /v1/responses/{id}."""
        serving = self._context.generating.responses
        response_id = request.path_params["response_id"]
        if request.method == "DELETE":
            return JsonResponse(serving.delete(response_id))
        if request.query_params.get("stream", "false") != "false":
            raise bad_field("stream", "a kept response is not streamed")
        return _json(serving.retrieve(response_id))

    async def cancel_response(self, request: Request) -> Response:
        """POST /v1/responses/{id}/cancel."""
        serving = self._context.generating.responses
        return _json(await serving.cancel(request.path_params["response_id"]))

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        fields = await self._fields(request)
        body = TOKENIZE_FIELDS.read(fields)
        service = self._context.serving.service
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("Give exactly one of 'prompt' and 'messages'.")
        tokens: Any
        if body.messages is not None:
            defaults = self._context.server_args.template_defaults()
            text = await service.render_chat(
                template_messages(body.messages),
                add_generation_prompt=body.add_generation_prompt is not False,
                continue_final_message=body.continue_final_message,
                **read_tool_use(body.tools, body.tool_choice).template_kwargs,
                **template_kwargs({**defaults, **body.chat_template_kwargs}, body.reasoning_effort),
            )
            tokens = await service.tokenize(text, False)
            count: int | list[int] = len(tokens)
        elif isinstance(body.prompt, list):
            tokens = [await service.tokenize(text, body.add_special_tokens) for text in body.prompt]
            count = [len(ids) for ids in tokens]
        else:
            tokens = await service.tokenize(body.prompt or "", body.add_special_tokens)
            count = len(tokens)
        reply = {"tokens": tokens, "count": count, "max_model_len": service.context_length}
        return JsonResponse(reply)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        body = DETOKENIZE_FIELDS.read(await self._fields(request))
        if body.tokens is None:
            raise bad_field("tokens", "it is missing")
        lists = read_id_prompts("tokens", body.tokens)
        service = self._context.serving.service
        texts = []
        for number, ids in enumerate(lists.arrays):
            name = f"tokens[{number}]" if lists.is_batch else "tokens"
            await off_loop(ids.nbytes, check_ids, ids, service.model_config.vocab_size, name)
            texts.append(await service.detokenize(ids, body.skip_special_tokens))
        return JsonResponse({"text": texts if lists.is_batch else texts[0]})

    async def _fields(self, request: Request) -> dict[str, FieldValue]:
        body = await read_body(request, self._context.request_byte_limit)
        return await off_loop(len(body), _split_text, body)

    async def _read_generate(self, request: Request) -> GenerateCall:
        """The request in either form; its body is gone when this returns."""
        preferred = self._context.serving.preferred_sampling
        if content_type(request) != "application/octet-stream":
            body = await read_body(request, self._context.request_byte_limit)
            return await off_loop(len(body), parse_generate, body, preferred)
        body = await read_body(request, self._context.binary_byte_limit)
        header = request.headers.get(FIELDS_HEADER, "").encode("latin-1")
        return parse_binary_generate(body, header, preferred)

    async def _openai_body(self, request: Request) -> bytearray:
        """The body of an OpenAI request, which SGLang takes as application/json only."""
        return await read_json_body(request, self._context.request_byte_limit)


def _parse_chat(body: bytearray) -> ChatBody:
    return read_chat(split_object(body))


def _parse_responses(body: bytearray) -> ResponsesBody:
    return read_responses(split_object(body))


def _json(body: bytes) -> Response:
    """A reply that is JSON already."""
    return Response(body, media_type="application/json")


def _parse_completion(body: bytearray) -> tuple[CompletionBody, list[str | IdArray]]:
    fields = split_body(body, ids_in=["prompt"], text_in=["prompt"], most_lists=MAX_SEQUENCES)
    completion = read_completion(fields)
    return completion, read_prompts(completion.prompt)


def _split_text(body: bytearray) -> dict[str, FieldValue]:
    return split_body(body, ids_in=["tokens"], text_in=["prompt"], most_lists=MAX_SEQUENCES)
