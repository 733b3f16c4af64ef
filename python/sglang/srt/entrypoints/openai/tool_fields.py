"""`tools`, `tool_choice` and `parallel_tool_calls` of a chat request, checked.

Also read by /tokenize and /parse_function_call. What the model makes of the tools is the chat
template's business; what it writes is read by function_call/.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.entrypoints.http_errors import bad_field
from sglang.srt.function_call.core_types import ToolSchemas

ToolChoice = str | dict[str, Any]


@dataclass(frozen=True)
class ToolUse:
    """The tools that may be called; all fields are empty when none may.

    `for_template` are the request's own objects, which is the form that chat templates take.
    `max_calls` None: any number. `forced_schema`: the schema of answers that have to be calls, as
    JSON; None where text may be the answer, and then `strict` are the functions whose arguments
    have to follow their schemas.
    """

    for_template: tuple[Mapping[str, Any], ...]
    schemas: ToolSchemas
    max_calls: int | None
    forced_schema: str | None = None
    strict: frozenset[str] = frozenset()

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What the chat template has to be told of them."""
        return {"tools": list(self.for_template)} if self.for_template else {}


def read_tool_use(
    tools: Sequence[Mapping[str, Any]], choice: ToolChoice | None, parallel: bool = True
) -> ToolUse:
    """Check the fields; RequestError 400 naming the one that is wrong or can't be served."""
    schemas = read_tools(tools)
    if choice is None or choice in ("auto", "none"):
        if choice == "none" or not tools:
            return ToolUse((), {}, None)
        return ToolUse(tuple(tools), schemas, None if parallel else 1, strict=_strict_names(tools))
    if not tools:
        raise bad_field("tool_choice", "there are no tools to choose from")
    max_calls = None if parallel else 1
    allowed: ToolSchemas = schemas
    if choice != "required":
        name = _named(choice, schemas)
        allowed, max_calls = {name: schemas[name]}, 1
    return ToolUse(tuple(tools), allowed, max_calls, forced_schema(allowed, max_calls))


def read_tools(
    tools: Sequence[Mapping[str, Any]], inside: str = ".function"
) -> dict[str, Mapping[str, Any]]:
    """Function name -> schema of its arguments. RequestError 400 naming a bad tool.

    `inside` is where the client wrote the function's fields, for that name.
    """
    schemas: dict[str, Mapping[str, Any]] = {}
    for i, tool in enumerate(tools):
        name = f"tools[{i}]"
        if tool.get("type", "function") != "function":
            raise bad_field(f"{name}.type", "only functions are served")
        function = tool.get("function")
        if not isinstance(function, dict):
            raise bad_field(f"{name}{inside}", "it is missing")
        called = function.get("name")
        if not isinstance(called, str) or not called:
            raise bad_field(f"{name}{inside}.name", "it is missing")
        if called in schemas:
            raise bad_field(f"{name}{inside}.name", f"{called!r} comes twice")
        if function.get("strict") not in (None, True, False):
            raise bad_field(f"{name}{inside}.strict", "expected true or false")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise bad_field(f"{name}{inside}.parameters", "expected a JSON schema")
        schemas[called] = parameters or {}
    return schemas


def _strict_names(tools: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """The functions of checked tools that are `strict`."""
    return frozenset(tool["function"]["name"] for tool in tools if tool["function"].get("strict"))


def forced_schema(tools: ToolSchemas, max_calls: int | None) -> str:
    """The JSON schema of a list of calls of `tools`, as JSON text.

    A tool's own schema is a definition of it, so the references in it begin there. Arguments
    are objects, whether it says so or not. Raises
    RequestError 400 for one that is nested too deeply.
    """
    definitions: dict[str, Any] = {}
    calls = []
    for number, (name, schema) in enumerate(tools.items()):
        place = f"#/$defs/{number}"
        definitions[str(number)] = {"type": "object", **_moved(name, schema, place)}
        properties = {"name": {"const": name}, "parameters": {"$ref": place}}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    limit = {} if max_calls is None else {"maxItems": max_calls}
    items = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **limit}
    return json.dumps({**items, "$defs": definitions}, ensure_ascii=False)


def _moved(name: str, schema: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The schema, with references to itself, for where it is at `place` of another."""

    def refer(one: dict[str, Any]) -> dict[str, Any]:
        target = one.get("$ref")
        if isinstance(target, str) and target.startswith("#"):
            one["$ref"] = place + target[1:]
        return one

    try:
        moved: dict[str, Any] = json.loads(json.dumps(schema), object_hook=refer)
    except RecursionError:
        raise bad_field("tools", f"the parameters of {name!r} are nested too deeply") from None
    return moved


def _named(choice: ToolChoice, schemas: ToolSchemas) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or choice.get("type") != "function":
        raise bad_field("tool_choice", "expected none, auto, required or a function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in schemas:
        raise bad_field("tool_choice", f"{name!r} is not among the tools")
    return name
