"""DeepSeek's families through the whole device tower: transformers' tokens, whatever memory does.

One plane a layer holds latents and rotary keys. Pages, segments, backings, budgets so small that
requests are retracted, tiers and ranks must not change a token.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from sglang.srt.mem_cache.memory_pool import (
    MLATokenToKVPool,
)
from sglang.srt.mem_cache.segment_table_pool import (
    SegmentTableKVPool,
)
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_ranks import answer_all
from srt.managers.test_engine_tokens import PROMPTS, DeviceTower, tower
from srt.models.hf_models import LITE, best_next, make_hf_model, save

ROW_BYTES = 3 * 40 * 4  # layers, numbers of a row, float32
Model = tuple[PreTrainedModel, str]


@pytest.fixture(scope="module", params=["deepseek_v2", "deepseek_v3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    changes = LITE if request.param == "deepseek_v2" else {}
    reference = make_hf_model(request.param, **changes)
    return reference, save(reference, tmp_path_factory.mktemp(request.param))


def check_greedy(model: PreTrainedModel, answers: list[list[int]]) -> None:
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer == best_next(model, prompt, answer)
        assert len(set(answer)) > 4


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"page_size": 1, "kv_segment_size": 64, "chunked_prefill_size": 17},
        {"page_size": 16, "kv_segment_size": 16, "disable_overlap_schedule": True},
        {"page_size": 16, "kv_segment_size": 64, "kv_backing": "segment_table"},
        {"page_size": 16, "kv_segment_size": 64, "kv_backing": "static"},
        {"attention_backend": "torch_native", "kv_canary": "full", "max_running_requests": 2},
    ],
    ids=str,
)
def test_tokens_equal_transformers(model: Model, flags: dict[str, object]) -> None:
    with tower(model[1], **flags) as engine:
        check_greedy(model[0], answer_all(engine))
        table = flags.get("kv_backing") == "segment_table"
        kind = SegmentTableKVPool if table else MLATokenToKVPool
        assert type(engine.memory.kv_pool) is kind
        (group,) = engine.memory.memory_object()["groups"]
        assert group["bytes_per_token"] == ROW_BYTES
        again = answer_all_again(engine)
    check_greedy(model[0], again)


def answer_all_again(engine: DeviceTower) -> list[list[int]]:
    """The same prompts, whose prefixes are cached by now."""
    engine.channel.outs.clear()
    answers = answer_all(engine)
    assert sum(out.cached_tokens for out in engine.channel.outs) > 100
    return answers


def test_a_budget_that_is_too_small_for_all(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are retracted, cached prefixes evicted, and every token is the same."""
    # Counting almost nothing of the answers overcommits on purpose.
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    flags = {"page_size": 16, "kv_segment_size": 64, "chunked_prefill_size": 48}
    with tower(model[1], **flags, max_total_tokens=384, kv_canary="full") as engine:
        for number, prompt in enumerate(PROMPTS):
            engine.send(f"r{number}", prompt)
        engine.run()
        check_greedy(model[0], [engine.output(f"r{number}") for number in range(len(PROMPTS))])
        assert engine.scheduler.counters.num_retractions > 0


def test_segments_move_to_disk_and_back(model: Model, tmp_path: Path) -> None:
    flags = {
        "page_size": 16,
        "kv_segment_size": 16,
        "kv_memory_budget": 200 << 10,
        "kv_disk_path": str(tmp_path),
        "kv_disk_size": 16 << 20,
    }
    with tower(model[1], **flags) as engine:
        check_greedy(model[0], answer_all(engine))
        check_greedy(model[0], answer_all_again(engine))
        (stats,) = engine.memory.manager.stats()
        assert stats.demote_count > 0


@pytest.mark.parametrize("flags", [{}, {"kv_parallel_size": 2, "page_size": 16}], ids=str)
def test_two_ranks_answer_as_one(model: Model, flags: dict[str, object]) -> None:
    """Each rank has half the heads; latents are whole on both, or their pages are dealt out."""
    with rank_towers(2, model[1], **flags) as ranks:
        check_greedy(model[0], ranks.run(answer_all))


def test_rows_of_fp8_stay_close(model: Model) -> None:
    """A quarter of the bytes; the first token is transformers' for most prompts, and runs agree."""
    flags = {"kv_cache_dtype": "fp8_e4m3", "page_size": 16, "kv_segment_size": 64}
    answers = []
    for changes in ({}, {"attention_backend": "torch_native", "kv_backing": "segment_table"}):
        with tower(model[1], **{**flags, **changes}) as engine:
            answers.append(answer_all(engine))
            (group,) = engine.memory.memory_object()["groups"]
            assert group["bytes_per_token"] == ROW_BYTES // 4
    assert answers[0] == answers[1]
    exact = [best_next(model[0], p, a)[0] for p, a in zip(PROMPTS, answers[0], strict=True)]
    assert sum(a[0] == e for a, e in zip(answers[0], exact, strict=True)) >= len(PROMPTS) - 2


def test_types_and_backends_that_latents_do_not_have(model: Model) -> None:
    with pytest.raises(ValueError, match="int8 can't hold latent attention"):
        DeviceTower(model[1], kv_cache_dtype="int8")
