"""One answer's parser, put together from what the server and the request ask for.

Reasoning comes first; what is not reasoning is looked through for calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sglang.srt.function_call.call_parser import CallParser
from sglang.srt.function_call.core_types import (
    Content,
    Event,
    TextParser,
    ToolSchemas,
    merged,
)
from sglang.srt.function_call.function_call_parser import CALL_FORMATS, FORCED_CALLS
from sglang.srt.parser.harmony_parser import HARMONY_MARKERS, HarmonyParser
from sglang.srt.parser.reasoning_parser import (
    END_THINK,
    REASONING_FORMATS,
    THINK,
    ReasoningParser,
    begins_inside,
    reasoning_first,
)
from sglang.srt.sampling.sampling_params import ReasoningFirst

GPT_OSS = "gpt-oss"
# Parsing a character takes about as long as formatting so many bytes of a reply.
PARSE_BYTES_PER_CHAR = 8


@dataclass(frozen=True)
class ParserNames:
    """The server's parsers by SGLang's names; None: answers are not looked at for that."""

    tool_call: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True)
class AnswerForm:
    """What a request's answers have to be read for.

    `tools` empty: calls are not looked for. `max_calls` None: any number. `prompt` is the rendered
    prompt, `continued` the text of the assistant's message that the answer goes on with.
    `separates`: reasoning is shown apart; else it is content, as it was written. `is_held`: the
    text is held to a grammar behind its reasoning: it is calls if it `is_forced` and else content.
    `is_tagged`: only parts of the text are, and it is read as if nothing was. `is_bounded`: its
    reasoning has a limit.
    """

    names: ParserNames
    tools: ToolSchemas
    max_calls: int | None
    prompt: str
    continued: str
    separates: bool
    is_held: bool = False
    is_forced: bool = False
    is_tagged: bool = False
    is_bounded: bool = False

    @property
    def is_plain(self) -> bool:
        """True when the text is the answer and nothing has to be parsed."""
        if self.is_held:
            return not self.is_forced and not (self.held_reasoning and self.separates)
        reads_calls = bool(self.tools) and self.names.tool_call is not None
        return not reads_calls and not (self.names.reasoning and self.separates)

    @property
    def held_reasoning(self) -> ReasoningFirst | None:
        """What comes before a text all of which is held to a grammar; None: nothing does."""
        return self.free_reasoning if self.is_held else None

    @property
    def free_reasoning(self) -> ReasoningFirst | None:
        """What comes before a grammar begins to hold, or is bounded; None: nothing, or neither."""
        if not (self.is_held or self.is_tagged or self.is_bounded):
            return None
        return reasoning_first(self.names.reasoning, self.prompt, self.continued)

    @property
    def kept_tokens(self) -> tuple[str, ...]:
        """Special tokens that have to be in the text because parsers look for them."""
        if self.is_plain:
            return ()
        if self.is_held:
            return (THINK, END_THINK) if self.held_reasoning else ()
        if GPT_OSS in (self.names.reasoning, self.names.tool_call):
            return HARMONY_MARKERS
        form = CALL_FORMATS.get(self.names.tool_call or "") if self.tools else None
        kept = () if form is None else form.markers
        return (*kept, THINK, END_THINK) if self.names.reasoning else kept

    def make_parser(self) -> TextParser | None:
        """A parser for one answer; None when the text is the answer."""
        if self.is_plain:
            return None
        if self.is_held:
            forced: CallParser | None = None
            if self.is_forced:
                forced = CallParser(FORCED_CALLS, self.tools, max_calls=self.max_calls)
            return _Chain(self._held_parser(verbatim=not self.separates), forced)
        if GPT_OSS in (self.names.reasoning, self.names.tool_call):
            tools = self.tools if self.names.tool_call == GPT_OSS else {}
            return HarmonyParser(tools, max_calls=self.max_calls)
        calls: CallParser | None = None
        if self.tools and self.names.tool_call is not None:
            form = CALL_FORMATS[self.names.tool_call]
            calls = CallParser(form, self.tools, max_calls=self.max_calls)
        reasoning: ReasoningParser | None = None
        if self.names.reasoning is not None:
            reasoning = ReasoningParser(inside=self._begins_inside, verbatim=not self.separates)
        return _Chain(reasoning, calls)

    def make_reasoning_reader(self) -> ReasoningParser | HarmonyParser | None:
        """A parser that only knows what is reasoning; None when there is none to know."""
        name = self.names.reasoning
        if self.is_held:
            return self._held_parser()
        if name is None:
            return None
        if name == GPT_OSS:
            return HarmonyParser({})
        return ReasoningParser(inside=self._begins_inside)

    def _held_parser(self, *, verbatim: bool = False) -> ReasoningParser | None:
        reasoning = self.held_reasoning
        if reasoning is None:
            return None
        return ReasoningParser(inside=reasoning.inside, verbatim=verbatim, held=True)

    @property
    def _begins_inside(self) -> bool:
        form = REASONING_FORMATS[self.names.reasoning or ""]
        return begins_inside(form, self.prompt, self.continued)


class _Chain:
    """Reasoning, then calls; either may be missing."""

    def __init__(self, reasoning: ReasoningParser | None, calls: CallParser | None) -> None:
        self._reasoning = reasoning
        self._calls = calls

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = [Content(text)]
        if self._reasoning is not None:
            events = self._reasoning.feed(text)
        return self._read(events)

    def finish(self) -> list[Event]:
        events = [] if self._reasoning is None else self._read(self._reasoning.finish())
        return merged([*events, *([] if self._calls is None else self._calls.finish())])

    def _read(self, events: list[Event]) -> list[Event]:
        if self._calls is None:
            return events
        result: list[Event] = []
        for event in events:
            result += self._calls.feed(event.text) if isinstance(event, Content) else [event]
        return merged(result)


class ReasoningCount:
    """How many tokens of an answer are reasoning, its markers included.

    It reads the tokens' own texts: those that a client gets may be put together from several.
    `form` None, or one without a parser of reasoning: nothing is counted.
    """

    def __init__(self, form: AnswerForm | None, text_of: Callable[[int], str]) -> None:
        self._total = 0
        self._num_open = 0  # tokens that may still turn out to be the begin marker
        self._parser = None if form is None else form.make_reasoning_reader()
        self._text_of = text_of

    def add(self, token_ids: Iterable[int]) -> int:
        """Take more tokens; the number of reasoning tokens so far."""
        if self._parser is None:
            return 0
        for token_id in token_ids:
            was_reasoning = self._parser.is_reasoning
            self._parser.feed(self._text_of(int(token_id)))
            if was_reasoning or self._parser.is_reasoning:
                self._total += 1 + self._num_open
            self._num_open = self._num_open + 1 if self._parser.is_open else 0
        return self._total
