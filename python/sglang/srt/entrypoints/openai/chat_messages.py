"""Chat messages as clients send them, checked and flattened for the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sglang.srt.entrypoints.http_errors import bad_field

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
# Keys that the server itself passes to the template or that belong to the template's caller.
_RESERVED = frozenset(
    {
        "self",
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "padding",
        "truncation",
        "max_length",
        "tokenizer_kwargs",
    }
)


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with text content only, as every chat template takes them.

    Raises RequestError 400 naming the message for a missing or unknown role and for content that
    is not text.
    """
    return _messages(messages, None)


def messages_with_images(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages as `template_messages` gives them, and what names the images in them, in order.

    The content of a user's message with images is a list of parts. Errors as there.
    """
    sources: list[str] = []
    return _messages(messages, sources), sources


def _messages(
    messages: Sequence[Mapping[str, Any]], sources: list[str] | None
) -> list[dict[str, Any]]:
    if not messages:
        raise bad_field("messages", "it is empty")
    return [_message(f"messages[{i}]", message, sources) for i, message in enumerate(messages)]


def _message(name: str, message: Mapping[str, Any], sources: list[str] | None) -> dict[str, Any]:
    role = message.get("role")
    if role not in _ROLES:
        raise bad_field(f"{name}.role", f"expected one of {', '.join(_ROLES)}")
    result = dict(message)
    content = message.get("content")
    result["content"] = None
    if sources is not None and role == "user" and isinstance(content, list):
        result["content"] = _content_parts(f"{name}.content", content, sources)
    if result["content"] is None:
        result["content"] = text_content(f"{name}.content", content)
    calls = message.get("tool_calls")
    if calls is None:
        result.pop("tool_calls", None)
    elif not isinstance(calls, list):
        raise bad_field(f"{name}.tool_calls", "expected a list")
    else:
        result["tool_calls"] = [_tool_call(f"{name}.tool_calls", call) for call in calls]
        if isinstance(message.get("reasoning_content"), str) and not result["content"]:
            # gpt-oss's template has this name for it, and refuses it beside content.
            result.setdefault("thinking", message["reasoning_content"])
    if message.get("content") is None and not (role == "assistant" and calls):
        raise bad_field(f"{name}.content", "it is missing")
    return result


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image_url"


def _content_parts(
    name: str, content: Sequence[Any], sources: list[str]
) -> list[dict[str, str]] | None:
    """Parts in the form that templates of models with images document; None without images."""
    if not any(map(_is_image, content)):
        return None
    parts = []
    for i, part in enumerate(content):
        if _is_image(part):
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            if not isinstance(url, str):
                raise bad_field(f"{name}[{i}]", "an image_url part needs its url")
            sources.append(url)
            parts.append({"type": "image"})
        else:
            parts.append({"type": "text", "text": text_content(f"{name}[{i}]", [part])})
    return parts


def text_content(name: str, content: Any) -> str:
    """A content's text, its parts on lines of their own; RequestError 400 naming what is none."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_field(name, "expected text or a list of parts")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS:
            raise bad_field(f"{name}[{i}]", f"only text parts are served, got {kind!r}")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise bad_field(f"{name}[{i}]", "a text part needs its text")
        texts.append(text)
    return "\n".join(texts)


def _tool_call(name: str, call: Any) -> dict[str, Any]:
    """A call of the conversation's history; templates take the arguments as an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise bad_field(name, "each call needs its function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments) if arguments else {}
        except (msgspec.DecodeError, RecursionError):
            raise bad_field(name, "arguments are not JSON") from None
    return {**call, "function": {**function, "arguments": arguments}}


def template_kwargs(kwargs: Mapping[str, Any], reasoning_effort: str | None) -> dict[str, Any]:
    """`chat_template_kwargs` and the fields that templates read beside them."""
    for name in kwargs:
        if name in _RESERVED:
            raise bad_field("chat_template_kwargs", f"'{name}' cannot be set here")
    result = dict(kwargs)
    if reasoning_effort is not None:
        result.setdefault("reasoning_effort", reasoning_effort)
    return result
