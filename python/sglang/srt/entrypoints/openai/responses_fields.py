"""/v1/responses: the fields of a request, and the chat request that they stand for.

OpenAI's Responses API says what a chat request says in other words. Here its fields are read, and
checked as far as chat's own checks would name fields that the client never wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import orjson

from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.entrypoints.openai.protocol import (
    FUNCTIONS,
    RETURNS,
    SHARED_REFUSALS,
    ChatBody,
    GenerationBody,
)
from sglang.srt.entrypoints.openai.response_format import JsonSchemaFormat, ResponseFormat
from sglang.srt.entrypoints.openai.serving_base import check_max_tokens
from sglang.srt.entrypoints.openai.tool_fields import ToolChoice, read_tools
from sglang.srt.entrypoints.request_body import RawFields, decode_field
from sglang.srt.entrypoints.request_fields import FieldTable, Int, Refusal, is_null
from sglang.srt.errors import RequestError

LOGPROBS = "message.output_text.logprobs"
# What may be asked for besides changes nothing: reasoning comes as text, not encrypted, and the
# rest belongs to tools that are refused.
_INCLUDABLE = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
_NO_TOOLS = msgspec.Raw(b"[]")
_RAW_NULL = msgspec.Raw(b"null")
_TOOLS: msgspec.json.Decoder[list[dict[str, Any]]] = msgspec.json.Decoder(list[dict[str, Any]])
# Fields that a chat request has under the same name.
_SAME_IN_CHAT = (
    *(name for name in GenerationBody.__struct_fields__ if name != "rid"),
    "lora_path",
    "parallel_tool_calls",
    "top_logprobs",
    "chat_template_kwargs",
)


class TextFormat(msgspec.Struct, frozen=True):
    """`text.format`: `type` is "text", "json_object" or "json_schema", which has the rest.

    `schema` is JSON as the client wrote it; null: none. It always holds, `strict` or not.
    """

    type: str = "text"
    name: str | None = None
    description: str | None = None
    schema: msgspec.Raw = _RAW_NULL
    strict: bool | None = None


class TextConfig(msgspec.Struct, frozen=True):
    """`text`; no format means plain text."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(msgspec.Struct, frozen=True):
    """`reasoning`; `effort` is the template's. Summaries are not made: the whole text is shown."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class ResponsesBody(GenerationBody, frozen=True, kw_only=True):
    """The served fields of /v1/responses.

    None: the model's or the API's default. `tools` is JSON as the client wrote it.
    """

    input: str | list[dict[str, Any]] = msgspec.field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = None
    lora_path: str | None = None
    store: bool = True
    max_output_tokens: Int | None = None
    text: TextConfig = TextConfig()
    reasoning: ReasoningConfig = ReasoningConfig()
    tools: msgspec.Raw | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    include: list[str] = msgspec.field(default_factory=list)
    top_logprobs: Int = 0
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)


_CHAT_LIMIT = Refusal("use max_output_tokens")
_CHAT_FORMAT = Refusal("use text.format")

RESPONSES_FIELDS = FieldTable(
    ResponsesBody,
    # max_tool_calls counts calls of built-in tools, which are refused.
    accepted=(
        "max_tool_calls",
        "service_tier",
        "prompt_cache_options",
        "prompt_cache_retention",
    ),
    refused={
        **SHARED_REFUSALS,
        "background": Refusal("responses are not made in the background", (False,)),
        "conversation": Refusal("conversations are not kept; use previous_response_id"),
        "routed_dp_rank": Refusal("send it to /v1/chat/completions or /generate"),
        "data_parallel_rank": Refusal("send it to /v1/chat/completions or /generate"),
        "return_token_ids": Refusal(RETURNS, (False,)),
        "return_prompt_token_ids": Refusal(RETURNS, (False,)),
        "session_params": Refusal("use previous_response_id", ({},)),
        "prompt": Refusal("prompt templates are not kept"),
        "truncation": Refusal("nothing is left out of an input", ("disabled",)),
        "context_management": Refusal("contexts are not compacted", ([],)),
        "moderation": Refusal("moderation is not served"),
        "messages": Refusal("use input"),
        "n": Refusal("a response is one answer", (1,)),
        "max_tokens": _CHAT_LIMIT,
        "max_completion_tokens": _CHAT_LIMIT,
        "response_format": _CHAT_FORMAT,
        "reasoning_effort": Refusal("use reasoning.effort"),
        "logprobs": Refusal(f"include {LOGPROBS}", (False,)),
        "input_ids": Refusal("send ids to /v1/completions or /generate", ([],)),
        "add_generation_prompt": Refusal("a response is a new answer", (True,)),
        "continue_final_message": Refusal("a response is a new answer", (False,)),
        "separate_reasoning": Refusal("reasoning is an item of its own", (True,)),
        "stream_reasoning": Refusal("reasoning is streamed as it comes", (True,)),
        "functions": FUNCTIONS,
        "function_call": Refusal("use tool_choice"),
    },
    refuse_unknown=False,
)


def read_responses(fields: RawFields) -> ResponsesBody:
    """Read the fields; RequestError 400 naming the first that cannot be served."""
    body = RESPONSES_FIELDS.read(fields)
    check_max_tokens("max_output_tokens", body.max_output_tokens)
    if body.rid == "":
        raise bad_field("rid", "it is empty")
    for value in body.include:
        if value not in _INCLUDABLE:
            raise bad_field("include", f"{value!r} is not served")
    if body.text.verbosity not in (None, "medium"):
        raise bad_field("text.verbosity", "verbosity is not served")
    if body.reasoning.context not in (None, "auto"):
        raise bad_field("reasoning.context", "it is the chat template's to choose")
    if body.reasoning.mode not in (None, "standard"):
        raise bad_field("reasoning.mode", f"{body.reasoning.mode!r} is not served")
    return body


def chat_body(body: ResponsesBody, rid: str, messages: list[dict[str, Any]]) -> ChatBody:
    """The chat request that asks the same; RequestError 400 naming a field that can't be served."""
    given = {name: getattr(body, name) for name in _SAME_IN_CHAT}
    return ChatBody(
        **given,
        messages=messages,
        rid=rid,
        max_completion_tokens=body.max_output_tokens,
        logprobs=body.top_logprobs > 0 or LOGPROBS in body.include,
        reasoning_effort=body.reasoning.effort,
        response_format=_response_format(body.text.format),
        tools=_chat_tools(body.tools),
        tool_choice=_chat_choice(body.tool_choice),
    )


def echoed(body: ResponsesBody) -> dict[str, Any]:
    """The fields of a request that its response repeats, tools and schemas letter by letter."""
    wanted = body.text.format or TextFormat()
    shown: dict[str, Any] = {"type": wanted.type}
    if wanted.type == "json_schema":
        shown |= {
            "name": wanted.name,
            "description": wanted.description,
            "schema": orjson.Fragment(bytes(wanted.schema)),
            "strict": wanted.strict,
        }
    summary = body.reasoning.summary or body.reasoning.generate_summary
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata,
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": body.reasoning.effort, "summary": summary},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store,
        "text": {"format": shown, "verbosity": "medium"},
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": orjson.Fragment(bytes(body.tools or _NO_TOOLS)),
        "top_logprobs": body.top_logprobs,
        "truncation": "disabled",
        "user": body.user,
    }


def _response_format(wanted: TextFormat | None) -> ResponseFormat | None:
    if wanted is None:
        return None
    if wanted.type not in ("text", "json_object", "json_schema"):
        raise bad_field("text.format.type", f"{wanted.type!r} is not served")
    if wanted.type != "json_schema":
        return ResponseFormat(wanted.type)
    if is_null(wanted.schema):
        raise bad_field("text.format.schema", "it is missing")
    # A copy, for the original is a view of the request's whole body.
    schema = msgspec.Raw(bytes(wanted.schema))
    return ResponseFormat("json_schema", JsonSchemaFormat(schema=schema))


def _chat_tools(raw: msgspec.Raw | None) -> list[dict[str, Any]]:
    """The tools, which are flat here, in chat's form."""
    tools = decode_field("tools", raw or _NO_TOOLS, _TOOLS)
    nested: list[dict[str, Any]] = []
    for i, tool in enumerate(tools):
        if tool.get("type") != "function":
            raise bad_field(
                f"tools[{i}].type", f"only functions are served, got {tool.get('type')!r}"
            )
        names = ("name", "description", "parameters", "strict")
        function = {name: tool[name] for name in names if tool.get(name) is not None}
        nested.append({"type": "function", "function": function})
    read_tools(nested, inside="")
    return nested


def _chat_choice(choice: ToolChoice | None) -> ToolChoice | None:
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") != "function":
        raise bad_field(
            "tool_choice.type", f"only functions are served, got {choice.get('type')!r}"
        )
    if not choice.keys() <= {"type", "name"}:
        raise bad_field("tool_choice", "a function has a type and a name only")
    return {"type": "function", "function": {"name": choice.get("name")}}


def _no_function(name: str, kind: Any) -> RequestError:
    return bad_field(name, f"only functions are served, got {kind!r}")
