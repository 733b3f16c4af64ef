"""What --chat-template means: a file, the name of a well-known format, or the template itself.

Used by loader.py. The built-in templates are small on purpose: they render system, user and
assistant messages with text content.
"""

from __future__ import annotations

import json
from pathlib import Path

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

_LLAMA_3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

_LLAMA_2 = """\
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- set ns.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' %}
{%- elif message['role'] == 'user' %}
{{- bos_token + '[INST] ' + ns.system + message['content'] | trim + ' [/INST]' }}
{%- set ns.system = '' %}
{%- else %}
{{- ' ' + message['content'] | trim + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""


def built_in_templates() -> dict[str, str]:
    """Name -> Jinja template, for the names that --chat-template takes."""
    return {
        "chatml": _CHATML,
        "llama-2": _LLAMA_2,
        "llama-3-instruct": _LLAMA_3,
    }


def read_chat_template(value: str) -> str:
    """The Jinja text that `value` of --chat-template stands for.

    A JSON file gives its `chat_template` field. Raises ValueError when `value` is neither a file,
    nor a known name, nor a template.
    """
    path = Path(value)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a whole template is no path: too long, or with odd bytes
        is_file = False
    if is_file:
        return _read_file(path)
    built_in = built_in_templates()
    if value in built_in:
        return built_in[value]
    if "{{" in value or "{%" in value:
        return value
    raise ValueError(
        f"--chat-template {value!r} is neither a file nor a Jinja template nor one of "
        f"{', '.join(built_in)}."
    )


def _read_file(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return text
    try:
        template = json.loads(text)["chat_template"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} has no chat_template field.") from None
    if not isinstance(template, str):
        raise ValueError(f"chat_template in {path} is not a text.")
    return template
