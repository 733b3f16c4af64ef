"""/v1/messages: the fields of a request, and the chat request that they stand for.

Anthropic's Messages API says what a chat request says in other words. Here its fields are read, and
checked as far as chat's own checks would name fields that the client never wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from sglang.srt.entrypoints.anthropic.conversation import Message
from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.entrypoints.openai.protocol import ChatBody, StreamOptions
from sglang.srt.entrypoints.openai.response_format import JsonSchemaFormat, ResponseFormat
from sglang.srt.entrypoints.openai.serving_base import check_max_tokens
from sglang.srt.entrypoints.openai.tool_fields import read_tools
from sglang.srt.entrypoints.request_body import RawFields, decode_field
from sglang.srt.entrypoints.request_fields import FieldTable, Int, Refusal, is_null

_THINKING = ("enabled", "adaptive", "disabled")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_RAW_NULL = msgspec.Raw(b"null")
_TEXT: msgspec.json.Decoder[str | None] = msgspec.json.Decoder(str | None)


class ToolBody(msgspec.Struct, frozen=True):
    """The served fields of one of the `tools`; an absent `type` means custom, which all are."""

    name: str = ""
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool = False


TOOL_FIELDS = FieldTable(
    ToolBody,
    accepted=("cache_control", "eager_input_streaming", "input_examples"),
    refused={
        "defer_loading": Refusal("tools are not searched for", (False,)),
        "allowed_callers": Refusal("code is not run here", (["direct"],)),
    },
    refuse_unknown=True,
)


class ToolChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`tool_choice`: `type` is "auto", "any", "none" or "tool", which has the `name`."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`thinking`: `type` is "enabled", "adaptive" or "disabled".

    `budget_tokens` bounds it where a parser tells it apart; the `display` "omitted" leaves the text
    out.
    """

    type: str
    budget_tokens: Int | None = None
    display: str | None = None


class OutputFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`output_config.format`: `type` is "json_schema"; `schema` is JSON as the client wrote it."""

    type: str
    schema: msgspec.Raw = _RAW_NULL


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`output_config`; `effort` is the template's `reasoning_effort`."""

    effort: str | None = None
    format: OutputFormat | None = None


class PromptBody(msgspec.Struct, frozen=True, kw_only=True):
    """What makes the prompt: the served fields of /v1/messages/count_tokens.

    `thinking` None leaves it to the chat template.
    """

    model: str = "default"
    messages: list[dict[str, Any]] = []
    system: str | list[dict[str, Any]] | None = None
    tools: list[RawFields] = []
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig = OutputConfig()
    chat_template_kwargs: dict[str, Any] = {}


class MessagesBody(PromptBody, frozen=True, kw_only=True):
    """The served fields of /v1/messages; the last four are SGLang's.

    None: the model's default, but for `max_tokens`, which is needed.
    """

    max_tokens: Int | None = None
    stop_sequences: list[str] = []
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    stream: bool = False
    rid: str | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: Int | None = None


# Nothing of these changes an answer here: whose request it is, what it costs, where it is computed.
_ACCEPTED = (
    "cache_control",
    "diagnostics",
    "inference_geo",
    "metadata",
    "service_tier",
    "speed",
    "user_profile_id",
    "workspace_id",
)
_KEEP_THINKING = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
_REFUSED = {
    "container": Refusal("code is not run here"),
    "mcp_servers": Refusal("MCP servers are not called", ([],)),
    "context_management": Refusal("contexts are not edited", ({}, {"edits": []}, _KEEP_THINKING)),
    "output_format": Refusal("use output_config.format"),
    "stop": Refusal("use stop_sequences"),
    "n": Refusal("a message is one answer", (1,)),
}
COUNT_FIELDS = FieldTable(PromptBody, accepted=_ACCEPTED, refused=_REFUSED, refuse_unknown=True)
MESSAGES_FIELDS = FieldTable(
    MessagesBody, accepted=_ACCEPTED, refused=_REFUSED, refuse_unknown=True
)


def read_count(fields: RawFields) -> PromptBody:
    """Read the fields of a prompt to count; RequestError 400 naming the first that is wrong."""
    body = COUNT_FIELDS.read(fields)
    _check_prompt(body)
    return body


def read_messages(fields: RawFields) -> MessagesBody:
    """Read the fields; RequestError 400 naming the first that cannot be served."""
    body = MESSAGES_FIELDS.read(fields)
    if body.max_tokens is None:
        raise bad_field("max_tokens", "it is missing")
    check_max_tokens("max_tokens", body.max_tokens)
    if body.rid == "":
        raise bad_field("rid", "it is empty")
    _check_prompt(body)
    budget = None if body.thinking is None else body.thinking.budget_tokens
    if budget is not None and budget >= body.max_tokens:
        raise bad_field("thinking.budget_tokens", "it must be less than max_tokens")
    return body


def _check_prompt(body: PromptBody) -> None:
    thinking = body.thinking
    if thinking is None:
        return
    if thinking.type not in _THINKING:
        raise bad_field("thinking.type", f"expected one of {', '.join(_THINKING)}")
    if thinking.type == "enabled" and (thinking.budget_tokens or 0) < 1:
        raise bad_field("thinking.budget_tokens", "it is missing or not above 0")
    if thinking.display not in (None, "summarized", "omitted"):
        raise bad_field("thinking.display", "expected summarized or omitted")


def prompt_fields(body: PromptBody, messages: Sequence[Message]) -> dict[str, Any]:
    """What of a chat request says the same as `body`; RequestError 400 naming a bad field.

    An answer goes on with `messages` where the last one is the assistant's.
    """
    kwargs = dict(body.chat_template_kwargs)
    if body.thinking is not None:
        # Templates have either name for it, and take no notice of the other.
        for name in ("enable_thinking", "thinking"):
            kwargs.setdefault(name, body.thinking.type != "disabled")
    choice = body.tool_choice
    return {
        "model": body.model,
        "messages": list(messages),
        "continue_final_message": bool(messages) and messages[-1]["role"] == "assistant",
        "chat_template_kwargs": kwargs,
        "reasoning_effort": body.output_config.effort,
        "response_format": _response_format(body.output_config.format),
        "tools": _chat_tools(body.tools),
        "tool_choice": None if choice is None else _chat_choice(choice),
        "parallel_tool_calls": choice is None or not choice.disable_parallel_tool_use,
    }


def chat_body(body: MessagesBody, rid: str, messages: Sequence[Message]) -> ChatBody:
    """The chat request that asks the same; RequestError 400 naming a field that can't be served."""
    return ChatBody(
        **prompt_fields(body, messages),
        rid=rid,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stream=body.stream,
        stream_options=StreamOptions(include_progress=True),  # shown as pings
        extra_key=body.extra_key,
        cache_salt=body.cache_salt,
        priority=body.priority,
    )


def _chat_tools(tools: Sequence[RawFields]) -> list[dict[str, Any]]:
    """The tools in chat's form."""
    nested: list[dict[str, Any]] = []
    for i, fields in enumerate(tools):
        kind = decode_field(f"tools[{i}].type", fields.get("type", _RAW_NULL), _TEXT)
        if kind not in (None, "custom"):
            raise bad_field(f"tools[{i}].type", f"only custom tools are served, got {kind!r}")
        tool = TOOL_FIELDS.read(fields, f"tools[{i}].")
        if tool.input_schema is None:
            raise bad_field(f"tools[{i}].input_schema", "it is missing")
        function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
        if tool.description is not None:
            function["description"] = tool.description
        if tool.strict:
            function["strict"] = True
        nested.append({"type": "function", "function": function})
    read_tools(nested, inside="")
    return nested


def _chat_choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    if choice.type not in _CHOICES:
        raise bad_field("tool_choice.type", "expected auto, any, tool or none")
    return _CHOICES[choice.type]


def _response_format(wanted: OutputFormat | None) -> ResponseFormat | None:
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        raise bad_field("output_config.format.type", f"{wanted.type!r} is not served")
    if is_null(wanted.schema):
        raise bad_field("output_config.format.schema", "it is missing")
    # A copy, for the original is a view of the request's whole body.
    return ResponseFormat("json_schema", JsonSchemaFormat(schema=msgspec.Raw(bytes(wanted.schema))))
