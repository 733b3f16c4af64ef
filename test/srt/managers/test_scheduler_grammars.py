"""Requests that wait for their grammar: who waits, who does not, what is kept, what is given up."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from sglang.srt.constrained import compiler as compiler_module
from sglang.srt.constrained.compiler import GrammarCompiler
from sglang.srt.constrained.grammar import Grammar, JsonStyle, Vocabulary, compile_grammar
from sglang.srt.errors import RequestError
from sglang.srt.managers import scheduler_grammars
from sglang.srt.managers.io_struct import FinishReason, VocabularyReq
from sglang.srt.managers.schedule_batch import ReqState
from sglang.srt.managers.scheduler_grammars import GrammarQueue
from sglang.srt.sampling.sampling_params import Constraint
from sglang.srt.tokenizer.tokenizer import Tokenizer
from srt.constrained.grammar_cases import golden_tokenizer, vocabulary_message
from srt.managers.scheduler_harness import Harness, expected_output, make_memory

WAIT_S = 30
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def message(tmp_path_factory: pytest.TempPathFactory) -> VocabularyReq:
    tokenizer: Tokenizer = golden_tokenizer(tmp_path_factory.mktemp("vocabulary"), "bpe")
    return vocabulary_message(tokenizer)


class Workshop:
    """Compiles for a test: counts, and holds each compilation until it is told to go on."""

    def __init__(self, *, holds: bool = False) -> None:
        self.compiled: list[str] = []
        self.go = threading.Event()
        if not holds:
            self.go.set()

    def __call__(self, constraint: Constraint, vocabulary: Vocabulary, style: JsonStyle) -> Grammar:
        self.compiled.append(constraint.text)
        assert self.go.wait(WAIT_S)
        return compile_grammar(constraint, vocabulary, style)


def harness_of(
    message: VocabularyReq, workshop: Workshop, limit_s: float = 30.0
) -> tuple[Harness, GrammarQueue]:
    harness = Harness(make_memory(page_size=4), page_size=4)
    queue = GrammarQueue(GrammarCompiler(1602, JsonStyle(), workshop), limit_s)
    harness.scheduler._grammars = queue
    harness.channel.inbox.append(message)
    return harness, queue


def let_compile(queue: GrammarQueue, harness: Harness) -> None:
    """Wait until nothing is being compiled any more."""
    harness.turn()
    for entry in list(queue._waiting.values()):
        entry.future.exception(WAIT_S)


def test_others_go_on_while_a_grammar_is_compiled(message: VocabularyReq) -> None:
    workshop = Workshop(holds=True)
    harness, queue = harness_of(message, workshop)
    harness.send("held", PROMPT, max_new=3, params={"regex": "a+"})
    harness.send("free", PROMPT, max_new=6)
    harness.turn(20)
    assert harness.output("free") == expected_output(PROMPT, 6)
    assert [req.rid for req in harness.scheduler.requests()] == ["held"]
    assert harness.scheduler.requests()[0].state is ReqState.WAITING
    assert harness.scheduler.num_waiting == 1
    workshop.go.set()
    let_compile(queue, harness)
    harness.run()
    # The checksum worker knows no grammar: what is shown here is that the request runs.
    assert harness.output("held") == expected_output(PROMPT, 3)


def test_a_grammar_is_compiled_once_and_kept(message: VocabularyReq) -> None:
    workshop = Workshop()
    harness, queue = harness_of(message, workshop)
    for rid in ("a", "b"):  # the second joins the first one's compilation
        harness.send(rid, PROMPT, max_new=2, params={"regex": "a+"})
    let_compile(queue, harness)
    harness.run()
    harness.send("c", PROMPT, max_new=2, params={"regex": "a+"})
    harness.turn()
    assert len(queue) == 0, "what is kept is there at once"
    harness.run()
    assert workshop.compiled == ["a+"]
    assert [harness.final(rid).type for rid in "abc"] == ["length"] * 3


def test_a_grammar_that_is_there_but_not_taken_yet_is_joined(message: VocabularyReq) -> None:
    workshop = Workshop()
    harness, queue = harness_of(message, workshop)
    harness.send("a", PROMPT, max_new=2, params={"regex": "a+"})
    let_compile(queue, harness)  # done, and its verdict is told in a later turn
    assert len(queue) == 1
    harness.send("b", PROMPT, max_new=2, params={"regex": "a+"})
    harness.run()
    assert workshop.compiled == ["a+"]
    assert [harness.final(rid).type for rid in "ab"] == ["length"] * 2


def test_only_the_last_used_are_kept(
    message: VocabularyReq, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_grammars, "MAX_KEPT", 2)
    workshop = Workshop()
    harness, queue = harness_of(message, workshop)
    for number, regex in enumerate(["a", "b", "a", "c", "a", "b"]):
        harness.send(f"r{number}", PROMPT, max_new=1, params={"regex": regex})
        let_compile(queue, harness)
        harness.run()
    assert workshop.compiled == ["a", "b", "c", "b"]


def test_long_grammars_are_kept_while_there_is_room(
    message: VocabularyReq, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_grammars, "MAX_KEPT_CHARS", 10)
    workshop = Workshop()
    harness, queue = harness_of(message, workshop)
    long = ["a" * 6, "b" * 4, "c" * 11]
    for number, regex in enumerate([long[0], long[1], long[0], "d", long[1], long[2], "d"]):
        harness.send(f"r{number}", PROMPT, max_new=1, params={"regex": regex})
        let_compile(queue, harness)
        harness.run()
    assert workshop.compiled == [long[0], long[1], "d", long[1], long[2], "d"]
    assert queue._kept_chars == 1


def test_a_broken_constraint_ends_its_request_alone(message: VocabularyReq) -> None:
    harness, queue = harness_of(message, Workshop())
    harness.send("broken", PROMPT, params={"json_schema": '{"type": "thing"}'})
    harness.send("good", PROMPT, max_new=4)
    let_compile(queue, harness)
    harness.run()
    assert harness.final("broken") == FinishReason(
        "abort", message="json_schema cannot be served: Invalid type: thing", status_code=400
    )
    assert harness.output("good") == expected_output(PROMPT, 4)


def test_a_compilation_that_takes_too_long_is_given_up(message: VocabularyReq) -> None:
    workshop = Workshop(holds=True)
    harness, queue = harness_of(message, workshop, limit_s=0.5)
    harness.send("slow", PROMPT, params={"ebnf": 'root ::= "a"'})
    harness.turn(49)
    assert len(queue) == 1
    harness.turn(5)
    assert harness.final("slow") == FinishReason(
        "abort", message="ebnf was not compiled within 0.5 s.", status_code=400
    )
    harness.send("again", PROMPT, max_new=2, params={"ebnf": 'root ::= "a"'})
    harness.turn()
    assert len(workshop.compiled) <= 1, "the one under way is waited for again"
    workshop.go.set()
    let_compile(queue, harness)
    harness.run()
    assert harness.final("again").type == "length"
    assert workshop.compiled == ['root ::= "a"']


def test_an_abort_finds_a_request_that_waits(message: VocabularyReq) -> None:
    workshop = Workshop(holds=True)
    harness, queue = harness_of(message, workshop)
    harness.send("gone", PROMPT, params={"regex": "a"})
    harness.turn(2)
    harness.abort("gone")
    harness.turn()
    assert harness.final("gone").status_code == 499
    assert len(queue) == 0
    workshop.go.set()
    harness.run()
    assert not harness.scheduler.busy


def test_what_nobody_waits_for_is_not_compiled(message: VocabularyReq) -> None:
    workshop = Workshop(holds=True)
    harness, queue = harness_of(message, workshop)
    for number in range(8):
        harness.send(f"r{number}", PROMPT, max_new=1, params={"regex": f"a{{{number + 1}}}"})
    harness.send("twin", PROMPT, max_new=1, params={"regex": "a{8}"})
    harness.turn(2)
    for number in range(8):
        harness.abort(f"r{number}")
    harness.turn()
    begun = compiler_module.NUM_THREADS
    assert len(queue._compiling) <= begun + 1, "those under way, and the one of the twin"
    workshop.go.set()
    let_compile(queue, harness)
    harness.run()
    assert harness.final("twin").type == "length"
    assert "a{8}" in workshop.compiled
    assert len(workshop.compiled) <= begun + 1
    harness.send("last", PROMPT, max_new=1, params={"regex": "b"})
    let_compile(queue, harness)
    harness.run()
    assert not queue._compiling


def test_a_request_that_ended_takes_no_verdict(message: VocabularyReq) -> None:
    """The abort and the verdict reach the same turn."""
    workshop = Workshop()
    harness, queue = harness_of(message, workshop)
    harness.send("gone", PROMPT, params={"regex": "a"})
    let_compile(queue, harness)
    harness.abort("gone")
    harness.run()
    assert harness.final("gone").status_code == 499


def test_without_a_vocabulary_or_a_compiler_nothing_is_held() -> None:
    harness = Harness(make_memory(page_size=4), page_size=4)
    harness.send("r", PROMPT, params={"regex": "a"})
    harness.run()
    assert harness.final("r").message == "Constraints are not served here."
    harness.scheduler._grammars = GrammarQueue(GrammarCompiler(10, JsonStyle()))
    harness.send("s", PROMPT, params={"regex": "a"})
    harness.run()
    assert harness.final("s").message == "Constraints are not served: no vocabulary came."
    assert harness.final("s").status_code == 400


def test_a_bug_in_a_compilation_ends_the_process(message: VocabularyReq) -> None:
    def breaks(constraint: Constraint, vocabulary: Vocabulary, style: JsonStyle) -> Grammar:
        raise RuntimeError("broken")

    compile_one: Callable[[Constraint, Vocabulary, JsonStyle], Grammar] = breaks
    queue = GrammarQueue(GrammarCompiler(1602, JsonStyle(), compile_one))
    harness = Harness(make_memory(page_size=4), page_size=4)
    harness.scheduler._grammars = queue
    harness.channel.inbox.append(message)
    harness.send("r", PROMPT, params={"regex": "a"})
    let_compile(queue, harness)
    with pytest.raises(RuntimeError, match="broken"):
        harness.turn()


def test_a_vocabulary_that_cannot_be_read_refuses_each_request() -> None:
    compiler = GrammarCompiler(10, JsonStyle())
    compiler.set_vocabulary(VocabularyReq("{}", 10, (2,)))
    for _ in range(2):
        with pytest.raises(RequestError, match="cannot be served with this tokenizer"):
            compiler.start(Constraint("regex", "a")).result(WAIT_S)
    compiler.close()


def test_compilations_share_few_threads(message: VocabularyReq) -> None:
    workshop = Workshop(holds=True)
    compiler = GrammarCompiler(1602, JsonStyle(), workshop)
    compiler.set_vocabulary(message)
    futures = [compiler.start(Constraint("regex", "a" * n)) for n in range(1, 6)]
    assert sum(future.running() for future in futures) <= compiler_module.NUM_THREADS
    workshop.go.set()
    for future in futures:
        future.result(WAIT_S)
    assert sorted(workshop.compiled) == ["a" * n for n in range(1, 6)]
