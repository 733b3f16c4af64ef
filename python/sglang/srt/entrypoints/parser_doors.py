"""The doors that parse a text which is there already: /separate_reasoning, /parse_function_call.

Clients that generate with /generate take answers apart with them. Every parser that is served can
be named, whatever the server's own are.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang.srt.configs.parser_names import AUTO_PARSER, REASONING_PARSERS, TOOL_CALL_PARSERS
from sglang.srt.entrypoints.http_errors import JsonResponse, bad_field
from sglang.srt.entrypoints.openai.chat_choice import whole_choice
from sglang.srt.entrypoints.openai.tool_fields import read_tools
from sglang.srt.entrypoints.request_body import off_loop, read_body, split_object
from sglang.srt.entrypoints.request_fields import FieldTable, Refusal
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.function_call.core_types import ToolSchemas
from sglang.srt.parser.answer_parser import PARSE_BYTES_PER_CHAR, AnswerForm, ParserNames


class SeparateReasoningBody(msgspec.Struct, frozen=True):
    """The fields of /separate_reasoning; no parser means the server's own."""

    text: str = ""
    reasoning_parser: str | None = None


class ParseFunctionCallBody(msgspec.Struct, frozen=True):
    """The fields of /parse_function_call; no parser means the server's own."""

    text: str = ""
    tools: list[dict[str, Any]] = []
    tool_call_parser: str | None = None


SEPARATE_REASONING_FIELDS = FieldTable(
    SeparateReasoningBody,
    accepted=("rid",),
    refused={"return_blocks": Refusal("blocks are not returned", (False,))},
    refuse_unknown=True,
)
PARSE_FUNCTION_CALL_FIELDS = FieldTable(
    ParseFunctionCallBody, accepted=("rid",), refused={}, refuse_unknown=True
)


class ParserDoors:
    """Endpoints that generate nothing; raise RequestError and ClientGoneError."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def separate_reasoning(self, request: Request) -> Response:
        """POST /separate_reasoning: `reasoning_text` and `text`."""
        raw = await read_body(request, self._context.request_byte_limit)
        body = SEPARATE_REASONING_FIELDS.read(split_object(raw))
        own = self._context.serving.parsers.reasoning
        name = _chosen("reasoning_parser", body.reasoning_parser, own, REASONING_PARSERS)
        message = await _parsed(ParserNames(reasoning=name), {}, body.text)
        return JsonResponse(
            {"reasoning_text": message["reasoning_content"] or "", "text": message["content"]}
        )

    async def parse_function_call(self, request: Request) -> Response:
        """POST /parse_function_call: `normal_text` and `calls`.

        A call's `tool_index` is the place of its function among `tools`, `parameters` is JSON text.
        """
        raw = await read_body(request, self._context.request_byte_limit)
        body = PARSE_FUNCTION_CALL_FIELDS.read(split_object(raw))
        own = self._context.serving.parsers.tool_call
        name = _chosen("tool_call_parser", body.tool_call_parser, own, TOOL_CALL_PARSERS)
        schemas = read_tools(body.tools)
        message = await _parsed(ParserNames(tool_call=name), schemas, body.text)
        places = {called: place for place, called in enumerate(schemas)}
        calls = [
            {
                "tool_index": places[call["function"]["name"]],
                "name": call["function"]["name"],
                "parameters": call["function"]["arguments"],
            }
            for call in message["tool_calls"] or ()
        ]
        return JsonResponse({"normal_text": message["content"] or "", "calls": calls})


def _chosen(field: str, name: str | None, own: str | None, served: tuple[str, ...]) -> str:
    if name in served:
        return name
    if name is not None and name != AUTO_PARSER:
        raise bad_field(field, f"expected one of {', '.join(served)}")
    if own is None:
        raise bad_field(field, "the server has none of its own; name one")
    return own


async def _parsed(names: ParserNames, tools: ToolSchemas, text: str) -> dict[str, Any]:
    """The message that the text is, in OpenAI's form."""
    form = AnswerForm(names, tools, max_calls=None, prompt="", continued="", separates=True)
    choice = await off_loop(PARSE_BYTES_PER_CHAR * len(text), whole_choice, form, text, None)
    message: dict[str, Any] = choice["message"]
    return message
