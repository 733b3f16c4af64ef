"""What the compiler's threads bear: deep schemas, long ones beside short ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.constrained.compiler import LONG_CONSTRAINT_CHARS, GrammarCompiler
from sglang.srt.constrained.grammar import Grammar, JsonStyle, Vocabulary, compile_grammar
from sglang.srt.errors import RequestError
from sglang.srt.sampling.sampling_params import MAX_CONSTRAINT_CHARS, Constraint, ReasoningFirst
from srt.constrained.grammar_cases import golden_tokenizer, vocabulary_message

WAIT_S = 60


@pytest.fixture
def compiler(tmp_path: Path) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(1602, JsonStyle())
    made.set_vocabulary(vocabulary_message(golden_tokenizer(tmp_path, "bpe")))
    yield made
    made.close()


def chain(length: int, depth: int, inner: str) -> dict[str, Any]:
    """Definitions of `depth` levels, each of which refers to the next one."""
    defs: dict[str, Any] = {f"d{length}": {}}
    for number in range(length):
        one: Any = {"$ref": f"#/$defs/d{number + 1}"}
        for _ in range(depth):
            one = {"properties": {"a": one}} if inner == "properties" else {inner: one}
        defs[f"d{number}"] = one
    return {"$defs": defs, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    ("length", "depth", "inner"),
    [(2000, 1, "properties"), (120, 50, "properties"), (125, 100, "items")],
)
def test_a_long_chain_of_references_does_not_end_the_process(
    compiler: GrammarCompiler, length: int, depth: int, inner: str
) -> None:
    text = json.dumps(chain(length, depth, inner), separators=(",", ":"))
    assert len(text) <= MAX_CONSTRAINT_CHARS["json_schema"]
    error = compiler.start(Constraint("json_schema", text)).exception(WAIT_S)
    assert error is None or (isinstance(error, RequestError) and "cannot be" in error.message)


def test_a_chain_of_rules_does_not_end_the_process(compiler: GrammarCompiler) -> None:
    for letter in "Tr":  # terminals and rules
        links = [f"{letter}{i}: {letter}{i + 1}" for i in range(4500)]
        text = "\n".join([f"start: {letter}0", *links, f'{letter}4500: "a"'])
        compiler.start(Constraint("ebnf", text)).result(WAIT_S).matcher().hidden()


def test_short_constraints_do_not_wait_for_long_ones(tmp_path: Path) -> None:
    go = threading.Event()

    def held(constraint: Constraint, vocabulary: Vocabulary, style: JsonStyle) -> Grammar:
        if len(constraint.text) > LONG_CONSTRAINT_CHARS:
            assert go.wait(WAIT_S)
        return compile_grammar(constraint, vocabulary, style)

    compiler = GrammarCompiler(1602, JsonStyle(), held)
    compiler.set_vocabulary(vocabulary_message(golden_tokenizer(tmp_path, "bpe")))
    long = [
        compiler.start(Constraint("regex", "a" * (LONG_CONSTRAINT_CHARS + n))) for n in range(1, 5)
    ]
    compiler.start(Constraint("regex", "b" * LONG_CONSTRAINT_CHARS)).result(WAIT_S)
    assert not any(future.done() for future in long)
    go.set()
    for future in long:
        future.result(WAIT_S)
    compiler.close()


def test_markers_of_reasoning_are_looked_up_with_the_grammar(compiler: GrammarCompiler) -> None:
    constraint = Constraint("regex", "a")
    plain = compiler.start(constraint).result(WAIT_S)
    assert not plain.vocabulary._markers
    reasoning = ReasoningFirst("<think>", "</think>", inside=True)
    grammar = compiler.start(constraint, reasoning).result(WAIT_S)
    assert set(grammar.vocabulary._markers) == {b"<think>", b"</think>"}


def test_other_threads_keep_their_stacks(compiler: GrammarCompiler) -> None:
    """Also where several schedulers, each on its thread, compile at once."""
    starters = [
        threading.Thread(
            target=lambda: [compiler.start(Constraint("regex", "a")) for _ in "a" * 99]
        )
        for _ in range(4)
    ]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert threading.stack_size() == 0  # the system's own
