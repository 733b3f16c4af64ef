"""Chat templates rendered as transformers documents it, without importing transformers.

Its "Chat templates" page says what a template may use: a sandboxed jinja environment that trims
blocks, `break`, `continue`, `raise_exception`, `strftime_now`, `tojson` that escapes nothing, the
`generation` block, and the special tokens by name. Called by tokenizer.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Arguments of transformers' function of the same purpose; none of them is the template's.
_NOT_FOR_TEMPLATES = frozenset({"chat_template", "conversation", "messages", "tokenize"})
_MOST_TEMPLATES = 8


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the model said; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class ChatRenderer:
    """Renders with the special tokens of one vocabulary; keeps what it has compiled.

    `special_tokens` by field name ("bos_token": "<s>").
    """

    def __init__(self, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._compile = lru_cache(_MOST_TEMPLATES)(environment.from_string)

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        **arguments: Any,
    ) -> str:
        """The prompt's text. Raises jinja2.TemplateError, or what the template's values raise."""
        for name in _NOT_FOR_TEMPLATES & arguments.keys():
            raise TypeError(f"{name} is no argument of a template")
        return self._compile(template).render(
            {
                **self._special_tokens,
                "documents": None,
                **arguments,
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            }
        )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes what HTML gives a meaning."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format_string: str) -> str:
    return datetime.now().astimezone().strftime(format_string)
