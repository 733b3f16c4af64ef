"""`strict` functions where the model may also just talk: their calls as a structural tag.

For formats whose calls stand between marks of their own. What a call looks like is taken from the
models' public chat templates; the arguments are held to the function's schema.
"""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from sglang.srt.function_call.core_types import ToolSchemas


class _Frame(NamedTuple):
    """What stands around a call's name, and what stands behind its arguments."""

    trigger: str
    before_name: str
    after_name: str
    end: str


_HERMES: Final = _Frame(
    "<tool_call>", '<tool_call>\n{"name": ', ', "arguments": ', "}\n</tool_call>"
)
_FRAMES: Final = {"qwen": _HERMES, "qwen25": _HERMES, "hermes": _HERMES}


def strict_tag(
    parser: str | None, tools: ToolSchemas, strict: frozenset[str], max_calls: int | None
) -> str | None:
    """The structural tag, as JSON, of answers that may call `tools` in the format of `parser`.

    Only names among `tools` can be called then, those in `strict` with arguments by their schema
    and others with any object. `max_calls` 1: the answer ends with its first call. None where
    nothing is strict, or the format's calls can't be told from text at their beginning.
    """
    frame = _FRAMES.get(parser or "")
    if frame is None or not strict.intersection(tools):
        return None
    tags = [
        _tag(frame, name, {"type": "object", **(schema if name in strict else {})})
        for name, schema in tools.items()
    ]
    form = {
        "type": "triggered_tags",
        "triggers": [frame.trigger],
        "tags": tags,
        "stop_after_first": max_calls == 1,
    }
    return json.dumps({"type": "structural_tag", "format": form}, ensure_ascii=False)


def _tag(frame: _Frame, name: str, schema: dict[str, Any]) -> dict[str, Any]:
    written = json.dumps(name, ensure_ascii=False)
    return {
        "type": "tag",
        "begin": f"{frame.before_name}{written}{frame.after_name}",
        "content": {"type": "json_schema", "json_schema": schema},
        "end": frame.end,
    }
