"""The items of a response's input and output, as messages of a chat.

An answer is several items here, reasoning, text and calls, and one message in a chat: neighbours
are put together. The messages are those of chat requests, so they can be kept and sent again:
users' may have images, all others hold text only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.entrypoints.openai.chat_messages import text_content

Message = dict[str, Any]
_ROLES = ("user", "assistant", "system", "developer")


def messages_of(name: str, items: str | Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages that a text or items are; `name` is the field's, for errors.

    Reasoning goes to the template as the `reasoning_content` of the answer behind it; encrypted
    reasoning, reasoning without an answer, and calls that were cut off are passed over. Raises
    RequestError 400 naming the first item that isn't served.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    reader = _ItemReader()
    for i, item in enumerate(items):
        reader.take(f"{name}[{i}]", item)
    return reader.messages


class _ItemReader:
    """Messages so far; the last one may be an answer that goes on."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._thoughts: list[str] = []  # of an answer that has not begun

    def take(self, name: str, item: Mapping[str, Any]) -> None:
        """Add one item."""
        kind = item.get("type", "message")
        if kind == "message":
            self._message(name, item)
        elif kind == "function_call":
            self._call(name, item)
        elif kind == "function_call_output":
            self._output(name, item)
        elif kind == "reasoning":
            self._reasoning(name, item)
        else:
            raise bad_field(f"{name}.type", f"{kind!r} is not served")

    def _message(self, name: str, item: Mapping[str, Any]) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise bad_field(f"{name}.role", f"expected one of {', '.join(_ROLES)}")
        if item.get("content") is None:
            raise bad_field(f"{name}.content", "it is missing")
        content: Any = None
        if role == "user" and isinstance(item["content"], list):
            content = _parts_with_images(f"{name}.content", item["content"])
        if content is None:
            content = text_content(f"{name}.content", item["content"])
        if role == "assistant":
            self._begin_answer()["content"] = content
        else:
            self._thoughts.clear()
            self.messages.append({"role": role, "content": content})

    def _call(self, name: str, item: Mapping[str, Any]) -> None:
        for field in ("call_id", "name", "arguments"):
            if not isinstance(item.get(field), str):
                raise bad_field(f"{name}.{field}", "it has to be a text")
        if item.get("status") == "incomplete":
            return
        try:
            msgspec.json.decode(item["arguments"] or "{}")
        except (msgspec.DecodeError, RecursionError):
            raise bad_field(f"{name}.arguments", "they are not JSON") from None
        answer = self.messages[-1] if self.messages else {}
        if answer.get("role") != "assistant" or self._thoughts:
            answer = self._begin_answer()
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        answer.setdefault("tool_calls", []).append(call)

    def _output(self, name: str, item: Mapping[str, Any]) -> None:
        if not isinstance(item.get("call_id"), str):
            raise bad_field(f"{name}.call_id", "it has to be a text")
        if item.get("output") is None:
            raise bad_field(f"{name}.output", "it is missing")
        content = text_content(f"{name}.output", item["output"])
        self._thoughts.clear()
        message = {"role": "tool", "tool_call_id": item["call_id"], "content": content}
        self.messages.append(message)

    def _reasoning(self, name: str, item: Mapping[str, Any]) -> None:
        for field in ("content", "summary"):
            parts = item.get(field) or []
            if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
                raise bad_field(f"{name}.{field}", "expected a list of parts")
            texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
            if texts:  # a summary counts only where the text itself isn't there
                self._thoughts += texts
                return

    def _begin_answer(self) -> Message:
        message: Message = {"role": "assistant", "content": ""}
        if self._thoughts:
            message["reasoning_content"] = "\n".join(self._thoughts)
            self._thoughts.clear()
        self.messages.append(message)
        return message


def content_chars(message: Message) -> int:
    """Characters of a message's texts and images."""
    content = message["content"]
    if isinstance(content, str):
        return len(content)
    return sum(len(part.get("text") or part["image_url"]["url"]) for part in content)


def _parts_with_images(name: str, content: Sequence[Any]) -> list[dict[str, Any]] | None:
    """A content's parts as those of a chat message; None when there is no image among them."""
    kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
    if "input_image" not in kinds:
        return None
    parts: list[dict[str, Any]] = []
    for i, (kind, part) in enumerate(zip(kinds, content, strict=True)):
        if kind != "input_image":
            parts.append({"type": "text", "text": text_content(f"{name}[{i}]", [part])})
            continue
        url = part.get("image_url")
        if not isinstance(url, str) or not url:
            raise bad_field(
                f"{name}[{i}]", "an input_image needs its image_url; files are not kept"
            )
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts
