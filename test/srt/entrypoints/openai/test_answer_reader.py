"""How an answer is cut into blocks, whatever pieces it comes in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.entrypoints.openai.answer_reader import (
    BlockBegin,
    BlockEnd,
    BlockKind,
    BlockReader,
    BlockText,
    settled,
)
from sglang.srt.function_call.core_types import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    merged,
)
from sglang.srt.parser.answer_parser import AnswerForm, ParserNames

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
FORM = AnswerForm(
    ParserNames("hermes", "qwen3"), {"f": {}}, None, prompt="", continued="", separates=True
)


def blocks(*events: Event, is_complete: bool = True) -> list[tuple[str, str, bool]]:
    """Kind (with a call's name), text and completeness of each block."""
    reader = BlockReader()
    found: list[tuple[str, str, bool]] = []
    kind, texts = "", [""]
    for step in [*reader.feed(events), *reader.finish(is_complete)]:
        if isinstance(step, BlockBegin):
            kind, texts = step.kind.value + step.name, []
        elif isinstance(step, BlockText):
            texts.append(step.text)
        else:
            found.append((kind, "".join(texts), step.is_complete))
    return found


def test_white_space_waits_for_text_and_is_dropped_before_calls() -> None:
    assert blocks(Reasoning("A"), Content("\n"), Content(" x"), Content("\n")) == [
        ("reasoning", "A", True),
        ("text", "\n x\n", True),
    ]
    call = (CallStart("f"), CallArguments("{}"), CallEnd())
    assert blocks(Content(" \n"), *call, Content("\n"), *call) == [("callf", "{}", True)] * 2
    assert blocks(Content("x"), *call, Content("\n"), is_complete=False) == [
        ("text", "x", True),
        ("callf", "{}", True),
    ]


def test_a_complete_answer_says_something() -> None:
    assert blocks() == [("text", "", True)]
    assert blocks(Reasoning("A")) == [("reasoning", "A", True), ("text", "", True)]
    assert blocks(Content(" ")) == [("text", " ", True)]
    assert blocks(is_complete=False) == []
    assert blocks(Reasoning("A"), is_complete=False) == [("reasoning", "A", False)]
    assert blocks(Content(" "), is_complete=False) == [("text", " ", False)]


def test_a_call_that_is_none() -> None:
    events = (CallStart("f"), CallArguments('{"a'), CallBroken("raw"), Content("x"))
    assert blocks(*events) == [("callf", '{"a', False), ("text", "x", True)]
    assert settled([Content("y"), *events]) == [Content("yrawx")]
    begun = BlockReader().feed(events[:1])
    assert begun == [BlockBegin(BlockKind.CALL, "f")]
    assert BlockEnd(is_complete=True) not in begun


@given(st.data())
def test_blocks_are_the_same_however_the_text_is_cut(data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.sampled_from(["x", " ", "\n", CALL, "é"]), max_size=6))
    text = data.draw(st.sampled_from(["", "<think>A</think>"])) + "".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    parser = FORM.make_parser()
    whole = FORM.make_parser()
    assert parser is not None
    assert whole is not None
    streamed = [event for piece in pieces for event in parser.feed(piece)]
    together = merged([*whole.feed(text), *whole.finish()])
    assert blocks(*streamed, *parser.finish()) == blocks(*together)
