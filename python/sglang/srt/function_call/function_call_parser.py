"""The formats of tool calls by SGLang's names, from the models' public chat templates and cards.

gpt-oss is not among them: its calls are messages of a channel (parser/harmony_parser.py).
"""

from __future__ import annotations

import secrets
import string

from sglang.srt.function_call.call_parser import CallFormat
from sglang.srt.function_call.call_readers import (
    NAME_CHARS,
    CallReader,
    JsonCallReader,
    NamedCallReader,
)
from sglang.srt.function_call.core_types import ToolSchemas
from sglang.srt.function_call.glm_call import GlmCallReader
from sglang.srt.function_call.marked_call import BEGIN_ARGUMENTS, BEGIN_CALL, MarkedCallReader
from sglang.srt.function_call.python_call import PythonCallReader
from sglang.srt.function_call.xml_call import MINIMAX_M2, XmlCallReader

_MISTRAL_ID_CHARS = string.ascii_letters + string.digits


def _json_call(char: str, tools: ToolSchemas, _in_list: bool) -> CallReader | None:
    return JsonCallReader(tools) if char == "{" else None


def _mistral_call(char: str, tools: ToolSchemas, in_list: bool) -> CallReader | None:
    if char == "{":
        return JsonCallReader(tools)
    return NamedCallReader(tools) if char in NAME_CHARS and not in_list else None


def _python_call(char: str, tools: ToolSchemas, in_list: bool) -> CallReader | None:
    return PythonCallReader(tools) if char in NAME_CHARS and in_list else None


def _xml_call(char: str, tools: ToolSchemas, _in_list: bool) -> CallReader | None:
    return XmlCallReader(tools) if char == "<" else None


def _invoked_call(char: str, tools: ToolSchemas, _in_list: bool) -> CallReader | None:
    return XmlCallReader(tools, MINIMAX_M2) if char == "<" else None


def _glm_call(char: str, tools: ToolSchemas, _in_list: bool) -> CallReader | None:
    return GlmCallReader(tools) if char in NAME_CHARS else None


def _marked_call(char: str, tools: ToolSchemas, _in_list: bool) -> CallReader | None:
    return MarkedCallReader(tools) if char == "<" else None


# Qwen 2.5 and 3, Hermes 2 Pro and 3; SmolLM2 writes a list between the same tags.
_HERMES = CallFormat(
    openers=("<tool_call>",), closers=("</tool_call>",), may_list=True, make_reader=_json_call
)
# Llama 3.1 to 3.3: the object alone is the answer, or follows <|python_tag|>. The chat template of
# Llama 4 asks for the same object and renders earlier calls between the other two.
_LLAMA_3 = CallFormat(
    openers=("<|python_tag|>", "<|python_start|>"),
    closers=("<|python_end|>",),
    bare="{",
    separators=";,",
    make_reader=_json_call,
    markers=("<|python_tag|>", "<|python_start|>", "<|python_end|>"),
)
# A list of objects up to version 7 of Mistral's tokenizers, names with arguments from 11 on.
_MISTRAL = CallFormat(
    openers=("[TOOL_CALLS]",),
    may_list=True,
    make_reader=_mistral_call,
    markers=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
)
# Llama 3.2 and 4 where the prompt asks for it.
_PYTHONIC = CallFormat(
    openers=("<|python_start|>",),
    closers=("<|python_end|>",),
    bare="[",
    may_list=True,
    make_reader=_python_call,
    markers=("<|python_start|>", "<|python_end|>"),
)
_QWEN_3_CODER = CallFormat(
    openers=("<tool_call>",), closers=("</tool_call>",), make_reader=_xml_call
)

_MINIMAX_M2 = CallFormat(
    openers=("<minimax:tool_call>",),
    closers=("</minimax:tool_call>",),
    another=MINIMAX_M2.function,
    make_reader=_invoked_call,
)
_GLM_4_5 = CallFormat(openers=("<tool_call>",), make_reader=_glm_call)
_KIMI_K2 = CallFormat(
    openers=("<|tool_calls_section_begin|>",),
    closers=("<|tool_call_end|>", "<|tool_calls_section_end|>"),
    another=BEGIN_CALL,
    make_reader=_marked_call,
    markers=(
        "<|tool_calls_section_begin|>",
        BEGIN_CALL,
        BEGIN_ARGUMENTS,
        "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
    ),
)

# What an answer is that was held to be calls, whatever the model would write by itself.
FORCED_CALLS = CallFormat(openers=(), bare="[", may_list=True, make_reader=_json_call)

CALL_FORMATS: dict[str, CallFormat] = {
    "qwen": _HERMES,
    "qwen25": _HERMES,
    "hermes": _HERMES,
    "llama3": _LLAMA_3,
    "mistral": _MISTRAL,
    "pythonic": _PYTHONIC,
    "qwen3_coder": _QWEN_3_CODER,
    "glm45": _GLM_4_5,
    "glm47": _GLM_4_5,
    "minimax-m2": _MINIMAX_M2,
    "kimi_k2": _KIMI_K2,
}


def new_call_id(parser: str, prefix: str = "call_", *, name: str = "", index: int = 0) -> str:
    """An id for a call.

    Mistral's chat templates take nine letters and digits only; Kimi-K2-Thinking's show nothing of
    a call but its id, so that this is the function's name, where it is known, and the call's place
    in the answer, as the model writes them.
    """
    if parser == "kimi_k2" and name:
        return f"functions.{name}:{index}"
    if parser == "mistral":
        return "".join(secrets.choice(_MISTRAL_ID_CHARS) for _ in range(9))
    return f"{prefix}{secrets.token_hex(12)}"
