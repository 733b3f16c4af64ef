"""The whole device tower with grammars: texts hold, neighbours do not notice, memory may move.

A small random model over a golden vocabulary; what it says is noise, so that only the grammars give
it shape. In float32, where a row's tokens do not depend on its batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sglang.srt.layers.attention import torch_device_backend
from sglang.srt.managers.io_struct import (
    FinishReason,
    TokenizedGenerateReqInput,
    VocabularyReq,
    int32_buffer,
)
from sglang.srt.sampling.sampling_params import ReasoningFirst, SamplingParams
from sglang.srt.tokenizer.tokenizer import Tokenizer
from srt.constrained.grammar_cases import END, golden_tokenizer, vocabulary_message
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_tokens import DeviceTower, tower
from srt.models.hf_models import make_hf_model, save
from srt.utils.fake_device import LateRuntime

VOCAB = 1700
NEW_TOKENS = 40
# Reasoning that ends with the first "d" of a random text.
THOUGHT = ReasoningFirst("<", "d", inside=True)
LETTER_D = 72
# Reasoning that a random text does not end: it has to be told to.
ENDLESS = ReasoningFirst("<", "</x>", inside=True)
BUDGET = 7
FREE_PROMPTS = [list(range(30, 30 + n)) for n in (1, 17, 130)]
HELD_PROMPTS = [list(range(400, 400 + n)) for n in (3, 60, 90)]
# A text that ends by itself, one that ends when the model likes or tokens are used up, a choice.
REGEXES = [r"[a-z]{3}-[0-9]{4}", r"([a-z]+ )+", r"(Paris|London|Rome), [A-Z]{6}"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return golden_tokenizer(tmp_path_factory.mktemp("vocabulary"), "bpe")


@pytest.fixture(scope="module")
def message(tokenizer: Tokenizer) -> VocabularyReq:
    return vocabulary_message(tokenizer)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("llama")
    return save(make_hf_model("llama", vocab_size=VOCAB), folder)


def run(engine: DeviceTower) -> None:
    """Turn until all is done; compilations are waited for, not polled."""
    for _ in range(4000):
        engine.scheduler.turn()
        for entry in list(engine.parts.grammars._waiting.values()):
            entry.future.exception()
        if not engine.scheduler.busy and not engine.channel.inbox:
            return
    raise AssertionError(f"still busy: {engine.scheduler.requests()}")


def send_free(engine: DeviceTower) -> None:
    for number, prompt in enumerate(FREE_PROMPTS):
        engine.send(f"free{number}", prompt, max_new_tokens=NEW_TOKENS)


def send_held(engine: DeviceTower, message: VocabularyReq, **params: object) -> None:
    if engine.rank == 0:
        engine.channel.inbox.append(message)
    for number, (prompt, regex) in enumerate(zip(HELD_PROMPTS, REGEXES, strict=True)):
        engine.send(f"held{number}", prompt, max_new_tokens=NEW_TOKENS, **stops(), regex=regex)
        if params:
            engine.send(
                f"bounded{number}",
                prompt,
                max_new_tokens=NEW_TOKENS,
                regex=regex if number == 0 else None,
                reasoning=ENDLESS,
                max_thinking_tokens=BUDGET,
                **{**stops(), **params},
            )
            engine.send(
                f"drawn{number}",
                prompt,
                max_new_tokens=NEW_TOKENS,
                regex=regex,
                **{**stops(), **params},
            )
            engine.send(
                f"thought{number}",
                prompt,
                max_new_tokens=2 * NEW_TOKENS,
                regex=regex,
                reasoning=THOUGHT,
                logit_bias={LETTER_D: 4.0},
                **{**stops(), **params},
            )


def stops() -> dict[str, object]:
    return {"stop_token_ids": (END,)}


def ends(engine: DeviceTower) -> dict[str, FinishReason]:
    return {out.rid: out.finish_reason for out in engine.channel.outs if out.finish_reason}


def texts(engine: DeviceTower, tokenizer: Tokenizer, kind: str) -> list[str]:
    """What the requests said; each must hold to its grammar."""
    said = []
    for number, regex in enumerate(REGEXES):
        ids = engine.output(f"{kind}{number}")
        reason = ends(engine)[f"{kind}{number}"]
        text = tokenizer.decode(ids)
        if kind == "thought":
            thought, mark, text = text.partition("d")
            assert mark
            assert not re.fullmatch(regex, thought)
        if reason.type == "stop":
            assert ids[-1] == END
            assert reason.matched == END
            assert re.fullmatch(regex, text), (regex, text)
        else:
            assert reason.type == "length"
            assert number == 1, "only this text may go on for ever"
            assert re.fullmatch(r"[a-z ]*", text)
        said.append(text)
    return said


def check_bounded(engine: DeviceTower, tokenizer: Tokenizer) -> None:
    """The reasoning has its tokens, then its end, and what follows is what it would be."""
    for number, regex in enumerate(REGEXES):
        ids = engine.output(f"bounded{number}")
        assert END not in ids[:BUDGET]
        assert "</x>" not in tokenizer.decode(ids[:BUDGET])
        length = next(n for n in range(1, 5) if tokenizer.decode(ids[BUDGET:][:n]) == "</x>")
        rest = ids[BUDGET + length :]
        assert len(rest) > 1
        if number == 0:
            assert rest[-1] == END
            assert re.fullmatch(regex, tokenizer.decode(rest))


DRAWN = {"temperature": 1.0, "sampling_seed": 11, "top_p": 0.9}


@pytest.fixture(scope="module")
def expected(path: str, tokenizer: Tokenizer, message: VocabularyReq) -> dict[str, list[int]]:
    """What each request says when it is alone."""
    found: dict[str, list[int]] = {}
    with tower(path) as engine:
        send_free(engine)
        run(engine)
        send_held(engine, message, **DRAWN)
        run(engine)
        texts(engine, tokenizer, "held")
        texts(engine, tokenizer, "drawn")
        texts(engine, tokenizer, "thought")
        check_bounded(engine, tokenizer)
        for rid in {out.rid for out in engine.channel.outs}:
            found[rid] = engine.output(rid)
    assert len(found) == 15
    return found


def answers(engine: DeviceTower, message: VocabularyReq) -> dict[str, list[int]]:
    send_held(engine, message, **DRAWN)
    send_free(engine)
    run(engine)
    return {rid: engine.output(rid) for rid in {out.rid for out in engine.channel.outs}}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"disable_overlap_schedule": True},
        {"page_size": 16, "kv_segment_size": 64, "chunked_prefill_size": 32},
        {"max_running_requests": 2, "disable_cuda_graph": True},
    ],
    ids=lambda flags: ",".join(f"{k}={v}" for k, v in flags.items()),
)
def test_neighbours_say_the_same(
    path: str, message: VocabularyReq, expected: dict[str, list[int]], flags: dict[str, object]
) -> None:
    with tower(path, **flags) as engine:
        assert answers(engine, message) == expected
        # And once more, behind cached prefixes and with grammars that are kept.
        engine.channel.outs.clear()
        assert answers(engine, message) == expected


def test_retraction_keeps_the_state(
    path: str,
    message: VocabularyReq,
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    with tower(
        path, page_size=16, kv_segment_size=64, max_total_tokens=320, chunked_prefill_size=48
    ) as engine:
        assert answers(engine, message) == expected
        retracted = {out.rid for out in engine.channel.outs if out.num_retractions}
        assert any(not rid.startswith("free") for rid in retracted), retracted


def test_a_device_behind_the_host_says_the_same(
    path: str,
    message: VocabularyReq,
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The masks wait for the tokens before, the forwards do not; penalties go with grammars."""
    for module in ("utils.native", "mem_cache.memory_pool"):
        monkeypatch.setattr(f"sglang.srt.{module}.native_kernels", lambda: None)
    monkeypatch.setattr(torch_device_backend, "RECORDED_TOKENS", 256)
    flags = {"device": "cuda", "attention_backend": "torch_native", "kv_segment_size": 256}
    with tower(path, runtime=LateRuntime(), **flags) as engine:
        assert answers(engine, message) == expected


def test_ranks_say_the_same(
    path: str, message: VocabularyReq, expected: dict[str, list[int]]
) -> None:
    def program(engine: DeviceTower) -> dict[str, list[int]]:
        send_held(engine, message, **DRAWN)
        send_free(engine)
        engine.run()
        return {rid: engine.output(rid) for rid in sorted({o.rid for o in engine.channel.outs})}

    with rank_towers(2, path) as ranks:
        monkey_turns(ranks.towers)
        assert ranks.run(program) == expected


def monkey_turns(towers: list[DeviceTower]) -> None:
    """Rank 0 waits for its compilations, so that the program needs few turns."""
    first = towers[0]
    decided: Callable[[float], list[object]] = first.parts.grammars.decided  # type: ignore[assignment]

    def patient(now: float) -> list[object]:
        for entry in list(first.parts.grammars._waiting.values()):
            entry.future.exception()
        return decided(now)

    first.parts.grammars.decided = patient  # type: ignore[method-assign, assignment]


def test_ends_and_limits(path: str, tokenizer: Tokenizer, message: VocabularyReq) -> None:
    with tower(path) as engine:
        engine.channel.inbox.append(message)
        prompt = HELD_PROMPTS[0]
        engine.send("eos", prompt, regex="[0-9]{3}", ignore_eos=True)
        engine.send("least", prompt, regex="[0-9]{3}", min_new_tokens=20, **stops())
        engine.send("more", prompt, regex="[0-9]{3,30}", min_new_tokens=12, **stops())
        wants_end = {"ignore_eos": True, "logit_bias": {END: 100.0}}
        engine.send("on", prompt, regex="[0-9]{3,30}", min_new_tokens=12, **wants_end)
        engine.send("short", prompt, regex="[0-9]{30}", max_new_tokens=2, **stops())
        engine.send("broken", prompt, regex="(a", **stops())
        engine.send("none", prompt, max_new_tokens=0, regex="a+", **stops())
        run(engine)
        reasons = ends(engine)
        for rid in ("eos", "least"):  # nothing else can follow, whatever is asked for
            assert re.fullmatch("[0-9]{3}", tokenizer.decode(engine.output(rid)))
            assert reasons[rid] == FinishReason("stop", matched=END)
        assert len(engine.output("more")) > 12
        assert len(engine.output("on")) == 13
        assert reasons["short"] == FinishReason("length", length=2)
        assert reasons["none"] == FinishReason("length", length=0)
        assert reasons["broken"].status_code == 400
        assert "unclosed group" in reasons["broken"].message
        assert engine.output("broken") == []


def test_a_grammar_that_cannot_go_on_ends_one_request(
    path: str, message: VocabularyReq, expected: dict[str, list[int]]
) -> None:
    number = 2100
    rules = "\n".join(f'r{i}: "b" r{i}|"c"' for i in range(number))
    branches = "|".join(f"r{i}" for i in range(number))
    with tower(path) as engine:
        engine.channel.inbox.append(message)
        ebnf = f'%llguidance {{}}\nstart: "aaa" ({branches})\n{rules}'
        engine.send("deep", HELD_PROMPTS[0], ebnf=ebnf, **stops())
        send_free(engine)
        run(engine)
        assert ends(engine)["deep"].type == "abort"
        assert "cannot be held" in ends(engine)["deep"].message
        for rid in ("free0", "free1", "free2"):
            assert engine.output(rid) == expected[rid]


def test_log_probabilities_are_of_what_may_follow(path: str, message: VocabularyReq) -> None:
    with tower(path) as engine:
        engine.channel.inbox.append(message)
        engine.channel.inbox.append(
            TokenizedGenerateReqInput(
                rid="r",
                input_ids=memoryview(int32_buffer(HELD_PROMPTS[0])),
                sampling_params=SamplingParams(
                    max_new_tokens=8, temperature=0.0, regex="[ab]c", stop_token_ids=(END,)
                ),
                return_logprob=True,
                logprob_start_len=len(HELD_PROMPTS[0]),
                top_logprobs_num=3,
            )
        )
        run(engine)
        parts = [o.output_logprobs for o in engine.channel.outs if o.output_logprobs]
        own = np.concatenate([np.frombuffer(part.logprobs, "<f4") for part in parts])
        tops = np.concatenate([np.frombuffer(part.top_logprobs, "<f4") for part in parts])
        tops = tops.reshape(-1, 3)
        assert own[-1] == 0.0  # only the end is left
        assert np.isneginf(tops[-1][1:]).all()
        assert np.exp(tops[0]).sum() <= 1.0 + 1e-5
        assert own[0] == tops[0][0]
