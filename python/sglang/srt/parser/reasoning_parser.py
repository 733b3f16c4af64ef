"""Takes an answer apart into what the model thought and what it says.

For models that write <think>...</think> before they answer. gpt-oss has channels instead
(harmony_parser.py).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from sglang.srt.function_call.core_types import (
    WHITESPACE,
    Content,
    Event,
    HeldSpace,
    Reasoning,
    held_length,
    merged,
)
from sglang.srt.sampling.sampling_params import ReasoningFirst

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class ReasoningFormat:
    """`begins_inside`: an answer is reasoning from its first character where no prompt says."""

    begins_inside: bool


REASONING_FORMATS: dict[str, ReasoningFormat] = {
    "deepseek-r1": ReasoningFormat(begins_inside=True),
    "qwen3": ReasoningFormat(begins_inside=False),
    "qwen3-thinking": ReasoningFormat(begins_inside=True),
    "glm45": ReasoningFormat(begins_inside=False),
    "minimax": ReasoningFormat(begins_inside=True),
    "kimi_k2": ReasoningFormat(begins_inside=False),
}


def begins_inside(form: ReasoningFormat, prompt: str, continued: str) -> bool:
    """Whether the answer to `prompt` begins as reasoning.

    Chat templates end some prompts with <think>, or, when thinking is off, with <think></think>.
    `continued` is the text of the assistant's message that the answer goes on with ("": none).
    """
    if continued:
        return THINK in continued and continued.rfind(THINK) > continued.rfind(END_THINK)
    end = prompt[-32:].rstrip(WHITESPACE)
    if end.endswith(THINK):
        return True
    return form.begins_inside and not end.endswith(END_THINK)


def reasoning_first(name: str | None, prompt: str, continued: str) -> ReasoningFirst | None:
    """The reasoning before an answer that is held to a constraint; None: there is none.

    `name` is the parser's. An answer whose prompt leaves it open may begin with <think>. None for
    gpt-oss, too: its answers are held from their first character.
    """
    form = REASONING_FORMATS.get(name or "")
    if form is None or prompt[-32:].rstrip(WHITESPACE).endswith(END_THINK):
        return None
    inside = begins_inside(form, prompt, continued)
    if continued and not inside:
        return None
    return ReasoningFirst(THINK, END_THINK, inside)


class _State(enum.Enum):
    START = enum.auto()  # only white space so far; not known whether it begins with <think>
    INSIDE_START = enum.auto()  # the same, but reasoning in any case
    INSIDE_SPACE = enum.auto()  # white space behind <think>
    INSIDE = enum.auto()
    OUTSIDE_START = enum.auto()  # white space behind </think>
    OUTSIDE = enum.auto()


class ReasoningParser:
    """One answer: `Reasoning` up to </think>, then `Content`.

    White space beside the markers is dropped with them; `verbatim` keeps both, as reasoning.
    Without <think> at its beginning an answer that does not begin inside is content, unchanged.
    `held`: what follows </think> is held to a constraint, so that white space there is content.
    """

    def __init__(self, *, inside: bool, verbatim: bool = False, held: bool = False) -> None:
        self._state = _State.INSIDE_START if inside else _State.START
        self._verbatim = verbatim
        self._behind_state = _State.OUTSIDE if held else _State.OUTSIDE_START
        self._buffer = ""
        self._space = HeldSpace()

    @property
    def is_reasoning(self) -> bool:
        """True while what comes is reasoning."""
        return self._state in (_State.INSIDE_START, _State.INSIDE_SPACE, _State.INSIDE)

    @property
    def is_open(self) -> bool:
        """True while what came may be the beginning of reasoning or not."""
        return self._state is _State.START and bool(self._buffer)

    def feed(self, text: str) -> list[Event]:
        """See `TextParser`."""
        if self._space.takes(self._buffer, text):
            return []
        self._buffer += self._space.released() + text
        out: list[Event] = []
        steps = {
            _State.START: self._at_start,
            _State.INSIDE_START: self._at_start,
            _State.INSIDE_SPACE: self._inside_space,
            _State.INSIDE: self._inside,
            _State.OUTSIDE_START: self._behind,
            _State.OUTSIDE: self._outside,
        }
        while self._buffer and steps[self._state](out):
            pass
        return merged(out)

    def finish(self) -> list[Event]:
        """See `TextParser`."""
        text, self._buffer = self._buffer + self._space.released(), ""
        if self._state is _State.OUTSIDE_START and not self._verbatim:
            return []
        return merged([Reasoning(text) if self.is_reasoning else Content(text)])

    def _at_start(self, out: list[Event]) -> bool:
        begun = self._buffer.lstrip(WHITESPACE)
        if len(begun) < len(THINK) and THINK.startswith(begun):
            return False
        if begun.startswith(THINK):
            at = len(self._buffer) - len(begun) + len(THINK)
            self._drop(at, out)
            self._state = _State.INSIDE_SPACE
        else:
            self._state = _State.INSIDE_SPACE if self.is_reasoning else _State.OUTSIDE
        return True

    def _inside_space(self, out: list[Event]) -> bool:
        self._skip_space(out)
        if self._buffer:
            self._state = _State.INSIDE
        return True

    def _inside(self, out: list[Event]) -> bool:
        at = self._buffer.find(END_THINK)
        if at < 0:
            keep = held_length(self._buffer, (END_THINK,))
            certain = self._buffer[: len(self._buffer) - keep].rstrip(WHITESPACE)
            out.append(Reasoning(certain))
            self._buffer = self._buffer[len(certain) :]
            return False
        thought = self._buffer[:at].rstrip(WHITESPACE)
        out.append(Reasoning(thought))
        self._buffer = self._buffer[len(thought) :]
        self._drop(at - len(thought) + len(END_THINK), out)
        self._state = self._behind_state
        return True

    def _behind(self, out: list[Event]) -> bool:
        self._skip_space(out)
        if self._buffer:
            self._state = _State.OUTSIDE
        return True

    def _outside(self, out: list[Event]) -> bool:
        out.append(Content(self._buffer))
        self._buffer = ""
        return False

    def _skip_space(self, out: list[Event]) -> None:
        self._drop(len(self._buffer) - len(self._buffer.lstrip(WHITESPACE)), out)

    def _drop(self, count: int, out: list[Event]) -> None:
        if self._verbatim:
            out.append(Reasoning(self._buffer[:count]))
        self._buffer = self._buffer[count:]
