"""Which parsers `auto` stands for: what the model's chat template shows that it writes."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from sglang.srt.configs.parser_names import AUTO_PARSER
from sglang.srt.parser.answer_parser import GPT_OSS, ParserNames

logger = logging.getLogger(__name__)

# The first whose marks all stand in the template decides.
_TOOL_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (GPT_OSS, ("<|channel|>", "functions.")),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("glm47", ("{function-name}<arg_key>", "<arg_value>")),
    ("glm45", ("<arg_key>", "<arg_value>")),
    ("minimax-m2", ("<minimax:tool_call>", "<invoke name=")),
    ("kimi_k2", ("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>")),
    ("hermes", ("<tool_call>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("pythonic", ("func_name1(",)),
    ("llama3", ('"parameters": dictionary of argument name',)),
    ("llama3", ("<|python_tag|>",)),
)
_REASONING_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (GPT_OSS, ("<|channel|>analysis",)),
    ("glm45", ("</think>", "<|assistant|>", "[gMASK]")),
    ("minimax", ("</think>", "]~b]")),
    ("kimi_k2", ("</think>", "<|im_middle|>")),
    ("qwen3", ("</think>", "enable_thinking")),
    ("qwen3-thinking", ("</think>", "<|im_start|>")),
    ("deepseek-r1", ("</think>",)),
)


def choose_parsers(
    tool_call: str | None,
    reasoning: str | None,
    chat_template: str | Mapping[str, str] | None,
) -> ParserNames:
    """The names with `auto` resolved; None, with a warning, where the template tells nothing."""
    if isinstance(chat_template, Mapping):
        chat_template = "\n".join(chat_template.values())
    text = chat_template or ""
    return ParserNames(
        _resolve("--tool-call-parser", tool_call, text, _TOOL_MARKS),
        _resolve("--reasoning-parser", reasoning, text, _REASONING_MARKS),
    )


def _resolve(
    flag: str, name: str | None, template: str, marks: tuple[tuple[str, tuple[str, ...]], ...]
) -> str | None:
    if name != AUTO_PARSER:
        return name
    for parser, wanted in marks:
        if all(mark in template for mark in wanted):
            logger.info("%s auto: %s", flag, parser)
            return parser
    logger.warning("%s auto: the chat template shows no format that is served; none is used", flag)
    return None
