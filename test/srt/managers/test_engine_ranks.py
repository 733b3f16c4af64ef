"""Two ranks answer as one does: the same tokens, the same pages on both.

The ranks are threads of this process with a whole device tower each, so no process is started.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sglang.srt.managers.io_struct import (
    LogprobArrays,
    TokenizedGenerateReqInput,
    TokenOut,
    int32_buffer,
)
from sglang.srt.sampling.sampling_params import SamplingParams
from srt.crossed import crossed, mostly_slow
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_tokens import PROMPTS, DeviceTower, tower
from srt.models.hf_models import make_hf_model, save

NEW_TOKENS = 24
# By family: a budget in tokens that is too small for all prompts at once.
FAMILIES = {"llama": 160, "qwen3_moe": 160, "llama4": 128, "gpt_oss": 160}
# Layers with windows and without, experts and sinks; then some of these alone.
ORDER = ["gpt_oss", "llama", "llama4", "qwen3_moe"]

FLAGS: tuple[dict[str, object], ...] = (
    {},
    {"page_size": 1, "kv_segment_size": 64, "chunked_prefill_size": 32},
    {"page_size": 16, "kv_segment_size": 64, "disable_overlap_schedule": True},
    {"kv_backing": "segment_table", "page_size": 16, "kv_segment_size": 64},
    {"schedule_policy": "lpm", "max_running_requests": 2, "kv_canary": "full"},
)


def answer_all(engine: DeviceTower) -> list[list[int]]:
    for number, prompt in enumerate(PROMPTS):
        engine.send(f"r{number}", prompt, max_new_tokens=NEW_TOKENS)
        engine.scheduler.turn()
    engine.run()
    return [engine.output(f"r{number}") for number in range(len(PROMPTS))]


Model = tuple[str, list[list[int]], int]


def of_models(everyday: int) -> pytest.MarkDecorator:
    """The first so many families everyday, the others in the slow run."""
    names = mostly_slow(ORDER[:everyday], ORDER[everyday:])
    return pytest.mark.parametrize("model", names, indirect=True)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model directory, what one rank answers, and a tight budget."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    path = save(make_hf_model(request.param), folder)
    with tower(path) as engine:
        return path, answer_all(engine), FAMILIES[request.param]


@pytest.mark.parametrize(
    ("model", "flags"), crossed(ORDER, FLAGS), indirect=["model"], scope="module", ids=str
)
def test_two_ranks_answer_as_one(model: Model, flags: dict[str, object]) -> None:
    path, expected, _ = model
    with rank_towers(2, path, **flags) as ranks:
        assert ranks.run(answer_all) == expected


@of_models(1)
def test_two_ranks_over_memory_and_disk_answer_as_one(model: Model, tmp_path: Path) -> None:
    """Each has a file of its own; the same segments move on both."""
    path, expected, _ = model
    flags: dict[str, object] = {
        "page_size": 16,
        "kv_segment_size": 16,
        "kv_memory_budget": 64 << 10,
        "kv_disk_path": str(tmp_path),
        "kv_disk_size": 16 << 20,
    }

    def answer(engine: DeviceTower) -> tuple[list[list[int]], int]:
        answers = answer_all(engine)
        return answers, sum(one.demote_count for one in engine.memory.manager.stats())

    with rank_towers(2, path, **flags) as ranks:
        answers, num_moved = ranks.run(answer)
    assert answers == expected
    assert num_moved > 0


@of_models(2)
def test_four_ranks_share_two_kv_heads(model: Model) -> None:
    path, expected, _ = model
    with rank_towers(4, path, page_size=16) as ranks:
        assert ranks.run(answer_all) == expected


@of_models(2)
def test_random_tokens_and_log_probabilities_are_those_of_one_rank(model: Model) -> None:
    path, _, _ = model

    def sample_all(engine: DeviceTower) -> list[TokenOut]:
        if engine.rank == 0:
            for number, prompt in enumerate(PROMPTS):
                request = TokenizedGenerateReqInput(
                    rid=f"r{number}",
                    input_ids=memoryview(int32_buffer(prompt)),
                    sampling_params=SamplingParams(
                        max_new_tokens=8, temperature=0.9, top_p=0.9, frequency_penalty=0.5
                    ),
                    return_logprob=True,
                    logprob_start_len=len(prompt) // 2,
                    top_logprobs_num=2,
                )
                engine.channel.inbox.append(request)
        engine.scheduler.turn()
        engine.run()
        return engine.channel.outs

    with tower(path) as engine:
        alone = sample_all(engine)
    with rank_towers(2, path) as ranks:
        together = ranks.run(sample_all)  # every rank has the very same numbers
    assert [(out.rid, out.output_ids) for out in together] == [
        (out.rid, out.output_ids) for out in alone
    ]
    for one, other in zip(alone, together, strict=True):
        for name in ("input_logprobs", "output_logprobs"):
            assert (getattr(one, name) is None) == (getattr(other, name) is None)
            if getattr(one, name) is not None:
                assert _numbers(getattr(one, name)) == pytest.approx(
                    _numbers(getattr(other, name)), abs=2e-4, nan_ok=True
                )


def _numbers(arrays: LogprobArrays) -> list[float]:
    return np.frombuffer(arrays.logprobs + arrays.top_logprobs, "<f4").tolist()


@of_models(1)
def test_a_second_round_hits_the_cache_on_both_ranks(model: Model) -> None:
    path, expected, _ = model

    def second_round(engine: DeviceTower) -> tuple[list[list[int]], dict[str, int]]:
        engine.channel.outs.clear()
        answers = answer_all(engine)
        return answers, {out.rid: out.cached_tokens for out in engine.channel.outs}

    with rank_towers(2, path, page_size=16) as ranks:
        assert ranks.run(answer_all) == expected
        answers, cached = ranks.run(second_round)
        assert answers == expected
        assert cached["r2"] == 128
        assert cached["r5"] >= 80


@of_models(2)
def test_retraction_under_a_tiny_budget_changes_no_token(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected, budget = model
    # Counting almost nothing of the answers overcommits on purpose.
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    flags = {"kv_backing": "segment_table", "page_size": 16, "kv_segment_size": 16}
    with rank_towers(2, path, **flags, chunked_prefill_size=16, max_total_tokens=budget) as ranks:
        assert ranks.run(answer_all) == expected
        assert ranks.run(lambda engine: engine.scheduler.counters.num_retractions) > 0
