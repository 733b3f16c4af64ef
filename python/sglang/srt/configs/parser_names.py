"""SGLang's names of the parsers that are served here: values of flags and of request fields.

The parsers themselves belong to the text side: function_call/ and parser/. So do the templates of
completions: entrypoints/openai/fill_in_middle.py.
"""

from __future__ import annotations

# qwen and qwen25 are one format, as is hermes: SGLang has all three names. So has glm45 two.
TOOL_CALL_PARSERS = (
    "qwen",
    "qwen25",
    "hermes",
    "llama3",
    "mistral",
    "pythonic",
    "gpt-oss",
    "qwen3_coder",
    "glm45",
    "glm47",
    "minimax-m2",
    "kimi_k2",
)
REASONING_PARSERS = (
    "deepseek-r1",
    "qwen3",
    "qwen3-thinking",
    "gpt-oss",
    "glm45",
    "minimax",
    "kimi_k2",
)
AUTO_PARSER = "auto"
COMPLETION_TEMPLATES = ("deepseek_coder", "star_coder", "qwen_coder")
