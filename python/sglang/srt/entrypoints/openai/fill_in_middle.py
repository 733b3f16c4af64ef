"""`suffix` of /v1/completions: a prompt that asks a code model for what is between two texts.

The marks are those of the models' own cards: DeepSeek-Coder (base), StarCoder, Qwen2.5-Coder.
"""

from __future__ import annotations

from typing import NamedTuple


class MiddleMarks(NamedTuple):
    """What stands before the text in front, between the two texts, and behind the other."""

    begin: str
    hole: str
    end: str

    def prompt(self, prefix: str, suffix: str) -> str:
        """The prompt whose completion belongs between `prefix` and `suffix`."""
        return f"{self.begin}{prefix}{self.hole}{suffix}{self.end}"


MIDDLE_MARKS = {
    "deepseek_coder": MiddleMarks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    "star_coder": MiddleMarks("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    "qwen_coder": MiddleMarks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
}
