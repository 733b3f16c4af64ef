"""Chat templates give the text that transformers gives, and refuse what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest

from sglang.srt.tokenizer.chat_render import ChatRenderer
from sglang.srt.tokenizer.chat_template import built_in_templates
from sglang.srt.tokenizer.loader import load_tokenizer
from sglang.srt.tokenizer.tokenizer import Tokenizer
from srt.tokenizer.vocabularies import demo_gguf, write_gguf

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": '  Grüße, "you"\n'},
    {"role": "assistant", "content": "Hi 😀", "tool_calls": [{"name": "f", "arguments": "{}"}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": "<é>"}}}]

TEMPLATES = {
    **built_in_templates(),
    "json": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ tools | tojson }}",
    "loops": """
        {%- for m in messages %}
            {%- if loop.first %}{% continue %}{% endif %}
            {{ m.role }}: {{ m['content'] | trim }}
            {%- if m.role == 'assistant' %}{% break %}{% endif %}
        {% endfor %}
    """,
    "generation": (
        "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}{% endgeneration %}"
        "[{{ x is defined }}]{% endfor %}"
    ),
    "tokens": "{{ bos_token }}|{{ eos_token }}|{{ sep_token }}|{{ documents }}|{{ mood }}",
    "prompt": "{% if add_generation_prompt %}go{% else %}stay{% endif %}{{ tools is none }}",
    "time": "{{ strftime_now('%Y') }}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("vocabulary") / "m.gguf"
    return load_tokenizer(str(write_gguf(path, "bpe")))


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_text_is_that_of_transformers(
    name: str, tools: list[Any] | None, add_generation_prompt: bool, tokenizer: Tokenizer
) -> None:
    expected = tokenizer.hf.apply_chat_template(
        CHAT,
        tools=tools,
        chat_template=TEMPLATES[name],
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
        mood="fine",
    )
    renderer = ChatRenderer(tokenizer.hf.special_tokens_map)
    found = renderer.render(
        TEMPLATES[name],
        CHAT,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        mood="fine",
    )
    assert found == expected


def test_the_demo_models_template_is_rendered_without_transformers() -> None:
    tokenizer = load_tokenizer(str(demo_gguf()))
    text = tokenizer.apply_chat_template(CHAT[1:2])
    assert text.endswith("<|im_start|>assistant\n")
    assert "hf" not in vars(tokenizer), "the transformers tokenizer was not made"
    assert text == tokenizer.hf.apply_chat_template(
        CHAT[1:2],
        chat_template=tokenizer.chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )


def test_what_a_template_may_not_do() -> None:
    renderer = ChatRenderer({})

    def render(template: str, **arguments: Any) -> str:
        return renderer.render(template, CHAT, tools=None, add_generation_prompt=True, **arguments)

    with pytest.raises(jinja2.TemplateError, match="no such role"):
        render("{{ raise_exception('no such role') }}")
    with pytest.raises(jinja2.exceptions.SecurityError):
        render("{{ messages.append(1) }}")
    with pytest.raises(jinja2.exceptions.SecurityError):
        render("{{ ''.__class__.__mro__ }}")
    with pytest.raises(TypeError, match="tokenize is no argument"):
        render("", tokenize=True)
