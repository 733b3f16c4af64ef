"""Constraints on the text side: why they are refused, when a scheduler hears of the vocabulary."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sglang.srt.errors import RequestError
from sglang.srt.managers.constraint_desk import ConstraintDesk
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, VocabularyReq
from sglang.srt.sampling.sampling_params import ReasoningFirst
from sglang.srt.tokenizer.tokenizer import Tokenizer
from srt.constrained.grammar_cases import golden_tokenizer
from srt.managers.tokenizer_manager_harness import LENGTH, collect, request, rig


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return golden_tokenizer(tmp_path_factory.mktemp("vocabulary"), "spm")


def refusal(tokenizer: Any, ends: tuple[int, ...] = (2,), backend: str = "llguidance") -> str:
    return ConstraintDesk(tokenizer, ends, backend).refusal or ""


def test_reasons_against(tokenizer: Tokenizer) -> None:
    assert refusal(tokenizer) == ""
    assert "--grammar-backend none" in refusal(tokenizer, backend="none")
    assert "--skip-tokenizer-init" in refusal(None)
    assert "no end-of-text token" in refusal(tokenizer, ends=())
    assert "bytes of this tokenizer's tokens" in refusal(SimpleNamespace(pieces=None))


def test_each_replica_hears_once(tokenizer: Tokenizer) -> None:
    desk = ConstraintDesk(tokenizer, (2, 5), "llguidance")
    desk.read_vocabulary()
    news = desk.news_for(1)
    assert isinstance(news, VocabularyReq)
    assert news.end_ids == (2, 5)
    assert news.num_tokens == tokenizer.vocab_size
    assert desk.news_for(1) is None
    assert desk.news_for(0) is news


BOUNDED = {"reasoning": ReasoningFirst("<", ">", True), "max_thinking_tokens": 3}


@pytest.mark.parametrize("first", [{"regex": "a"}, BOUNDED], ids=["constraint", "budget"])
async def test_the_vocabulary_goes_before_the_first_constraint(
    tokenizer: Tokenizer, first: dict[str, Any]
) -> None:
    async with rig(tokenizer) as made:
        for number, fields in enumerate(({}, first, {"regex": "b"})):
            stream = made.manager.generate(request(f"r{number}", **fields))
            running = asyncio.create_task(collect(stream))
            message = await made.sent()
            if number == 1:
                assert isinstance(message, VocabularyReq)
                assert message.end_ids == (2, 7)  # the tokenizer's and the model's
                message = await made.sent()
            assert isinstance(message, TokenizedGenerateReqInput)
            assert message.sampling_params.regex == fields.get("regex")
            made.tell(message.rid, "x", [5], LENGTH)
            await running


async def test_constraints_without_a_tokenizer_are_refused() -> None:
    async with rig(None) as made:
        with pytest.raises(RequestError, match="--skip-tokenizer-init") as caught:
            await collect(made.manager.generate(request(regex="a")))
        assert caught.value.http_status == 400


async def test_a_constraint_must_be_unicode(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as made:
        with pytest.raises(RequestError, match="regex is not valid Unicode"):
            await collect(made.manager.generate(request(regex="a\ud800")))
