"""The system prompt and the messages of a Messages request, as messages of a chat.

A message is a row of blocks here: the results of tools are blocks of the user's, and are messages
of their own in a chat. Neighbours of one role are put together, as Anthropic's API does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.entrypoints.openai.chat_messages import text_content
from sglang.srt.errors import RequestError

Message = dict[str, Any]
_ROLES = ("user", "assistant", "system")
# Reasoning that nobody can read here.
_PASSED_OVER = ("redacted_thinking",)


def conversation(
    system: str | Sequence[Mapping[str, Any]] | None, messages: Sequence[Mapping[str, Any]]
) -> list[Message]:
    """The messages of the chat; one of the assistant's at the end is what the answer goes on with.

    Thinking goes to the template as `reasoning_content`; redacted thinking and an empty message at
    the end are passed over. Raises RequestError 400 naming the first block that isn't served.
    """
    reader = _Reader()
    if system:
        text = text_content("system", system)
        if text:
            reader.messages.append({"role": "system", "content": text})
    for i, message in enumerate(messages):
        reader.take(f"messages[{i}]", message)
    last = reader.messages[-1] if reader.messages else {}
    if last.get("role") == "assistant":
        if "tool_calls" in last:
            raise bad_field("messages", "the last one uses tools, whose results have to follow")
        if not last["content"]:
            reader.messages.pop()
    return reader.messages


class _Reader:
    """Messages so far; the next may belong to the last."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def take(self, name: str, message: Mapping[str, Any]) -> None:
        """Add one message."""
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise bad_field(f"{name}.role", f"expected one of {', '.join(_ROLES)}")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise bad_field(f"{name}.content", "expected text or a list of blocks")
        if role == "assistant":
            self._last(role)
        for i, block in enumerate(content):
            place = f"{name}.content[{i}]"
            if not isinstance(block, dict):
                raise bad_field(place, "expected a block")
            self._block(place, role, block)

    def _block(self, name: str, role: str, block: Mapping[str, Any]) -> None:
        kind = block.get("type")
        if kind == "text":
            _append(self._last(role), "content", _text_of(name, block, "text"))
        elif role == "user" and kind == "image":
            _append_image(self._last(role), _image_url(name, block))
        elif role == "user" and kind == "tool_result":
            self._result(name, block)
        elif role == "assistant" and kind == "tool_use":
            self._call(name, block)
        elif role == "assistant" and kind == "thinking":
            _append(self._last(role), "reasoning_content", _text_of(name, block, "thinking"))
        elif role != "assistant" or kind not in _PASSED_OVER:
            raise _no_block(name, role, kind)

    def _last(self, role: str) -> Message:
        """The message of `role` at the end, begun where there is none."""
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": ""})
        return self.messages[-1]

    def _call(self, name: str, block: Mapping[str, Any]) -> None:
        arguments = block.get("input")
        if not isinstance(arguments, dict):
            raise bad_field(f"{name}.input", "expected an object")
        function = {"name": _text_of(name, block, "name"), "arguments": arguments}
        call = {"id": _text_of(name, block, "id"), "type": "function", "function": function}
        self._last("assistant").setdefault("tool_calls", []).append(call)

    def _result(self, name: str, block: Mapping[str, Any]) -> None:
        content = text_content(f"{name}.content", block.get("content"))
        call_id = _text_of(name, block, "tool_use_id")
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})


def _append(message: Message, field: str, text: str) -> None:
    """More text of a message, on lines of its own."""
    before = message.get(field)
    if isinstance(before, list):
        before.append({"type": "text", "text": text})
    else:
        message[field] = f"{before}\n{text}" if before else text


def _append_image(message: Message, url: str) -> None:
    """An image behind what a message has so far; from then on its content is in parts."""
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}] if content else []
        message["content"] = content
    content.append({"type": "image_url", "image_url": {"url": url}})


def _image_url(name: str, block: Mapping[str, Any]) -> str:
    source = block.get("source")
    if not isinstance(source, dict):
        raise bad_field(f"{name}.source", "expected an object")
    kind = source.get("type")
    if kind == "url":
        return _text_of(f"{name}.source", source, "url")
    if kind == "base64":
        media, data = (_text_of(f"{name}.source", source, x) for x in ("media_type", "data"))
        return f"data:{media};base64,{data}"
    raise bad_field(f"{name}.source.type", f"url and base64 are served, not {kind!r}")


def _text_of(name: str, block: Mapping[str, Any], field: str) -> str:
    value = block.get(field)
    if not isinstance(value, str):
        raise bad_field(f"{name}.{field}", "it has to be a text")
    return value


def _no_block(name: str, role: str, kind: Any) -> RequestError:
    if kind == "document":
        return bad_field(name, "documents are not served")
    return bad_field(f"{name}.type", f"{kind!r} is not served in a message of the role {role}")
