"""Two ranks answer as one does: the same tokens, the same pages on both.

The ranks are threads of this process with a whole device tower each, so no process is started.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_tokens import PROMPTS, DeviceTower, tower
from srt.models.hf_models import make_hf_model, save

NEW_TOKENS = 24
# By family: a budget in tokens that is too small for all prompts at once.
FAMILIES = {"llama": 160, "qwen3_moe": 160, "llama4": 128, "gpt_oss": 160}

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


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model directory, what one rank answers, and a tight budget."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    path = save(make_hf_model(request.param), folder)
    with tower(path) as engine:
        return path, answer_all(engine), FAMILIES[request.param]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()))
def test_two_ranks_answer_as_one(model: Model, flags: dict[str, object]) -> None:
    path, expected, _ = model
    with rank_towers(2, path, **flags) as ranks:
        assert ranks.run(answer_all) == expected


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
