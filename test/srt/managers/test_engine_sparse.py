"""Sparse attention through the whole device tower: transformers' tokens, whatever memory does.

Queries see 12 of up to 194 tokens. Index keys lie beside latents in the same slots; pages,
segments, backings, chunks, prefix hits, batch mates, retraction, tiers, drafts and ranks must not
change a token.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from sglang.srt.layers.attention.sparse_cpu_backend import SparseCpuBackend
from sglang.srt.mem_cache.memory_pool import (
    NSATokenToKVPool,
)
from sglang.srt.mem_cache.segment_table_pool import (
    SegmentTableKVPool,
)
from sglang.srt.utils.native import triton_kernels
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_latent import answer_all_again, check_greedy
from srt.managers.test_engine_ranks import answer_all
from srt.managers.test_engine_tokens import PROMPTS, DeviceTower, tower
from srt.models.hf_models import best_next, make_hf_model, save

Model = tuple[PreTrainedModel, str]
LAYERS = {"deepseek_v32": (3, 3), "glm_moe_dsa": (4, 2)}  # all, and those with an indexer


@pytest.fixture(scope="module", params=LAYERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    reference = make_hf_model(request.param)
    return reference, save(reference, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def v32(tmp_path_factory: pytest.TempPathFactory) -> Model:
    reference = make_hf_model("deepseek_v32", num_hidden_layers=2)
    return reference, save(reference, tmp_path_factory.mktemp("v32"))


def test_tokens_equal_transformers_and_index_keys_count(model: Model) -> None:
    with tower(model[1], kv_canary="full") as engine:
        check_greedy(model[0], answer_all(engine))
        assert type(engine.memory.kv_pool) is NSATokenToKVPool
        layers, indexed = LAYERS[model[0].config.model_type]
        (group,) = engine.memory.memory_object()["groups"]
        assert group["bytes_per_token"] == 4 * (layers * 48 + indexed * 16)
        check_greedy(model[0], answer_all_again(engine))


@pytest.mark.parametrize(
    "flags",
    [
        {"page_size": 1, "kv_segment_size": 64, "chunked_prefill_size": 17},
        {"page_size": 16, "kv_segment_size": 64, "kv_backing": "segment_table"},
        {"attention_backend": "torch_native", "page_size": 16, "max_running_requests": 2},
        {"disable_overlap_schedule": True, "page_size": 4, "speculative_algorithm": "NGRAM"},
    ],
    ids=str,
)
def test_tokens_whatever_memory_does(v32: Model, flags: dict[str, object]) -> None:
    with tower(v32[1], **flags) as engine:
        check_greedy(v32[0], answer_all(engine))
        if flags.get("kv_backing") == "segment_table":
            assert type(engine.memory.kv_pool) is SegmentTableKVPool
        check_greedy(v32[0], answer_all_again(engine))


def test_a_budget_that_is_too_small_for_all(v32: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    # Counting almost nothing of the answers overcommits on purpose.
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    flags = {"page_size": 16, "kv_segment_size": 64, "chunked_prefill_size": 48}
    with tower(v32[1], **flags, max_total_tokens=384, kv_canary="full") as engine:
        for number, prompt in enumerate(PROMPTS):
            engine.send(f"r{number}", prompt)
        engine.run()
        check_greedy(v32[0], [engine.output(f"r{number}") for number in range(len(PROMPTS))])
        assert engine.scheduler.counters.num_retractions > 0


def test_segments_move_to_disk_and_back(v32: Model, tmp_path: Path) -> None:
    flags = {
        "page_size": 16,
        "kv_segment_size": 16,
        "kv_memory_budget": 200 << 10,
        "kv_disk_path": str(tmp_path),
        "kv_disk_size": 16 << 20,
    }
    with tower(v32[1], **flags) as engine:
        check_greedy(v32[0], answer_all(engine))
        check_greedy(v32[0], answer_all_again(engine))
        (stats,) = engine.memory.manager.stats()
        assert stats.demote_count > 0


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"kv_parallel_size": 2, "page_size": 4},
        {"kv_parallel_size": 2, "page_size": 16, "attention_backend": "torch_native"},
    ],
    ids=str,
)
def test_two_ranks_choose_the_same_tokens(v32: Model, flags: dict[str, object]) -> None:
    """Each has half the heads, the whole latents and the whole indexer; or all heads and half the
    pages, latents and index keys."""
    with rank_towers(2, v32[1], **flags) as ranks:
        check_greedy(v32[0], ranks.run(answer_all))


def test_a_cache_of_fp8_stays_close(v32: Model) -> None:
    """A quarter of the bytes, index keys too; backends agree, most first tokens are exact."""
    flags = {"kv_cache_dtype": "fp8_e4m3", "page_size": 16, "kv_segment_size": 64}
    answers = []
    for changes in ({}, {"attention_backend": "torch_native", "kv_backing": "segment_table"}):
        with tower(v32[1], **{**flags, **changes}) as engine:
            answers.append(answer_all(engine))
            (group,) = engine.memory.memory_object()["groups"]
            assert group["bytes_per_token"] == 2 * (48 + 16)
    assert answers[0] == answers[1]
    exact = [best_next(v32[0], p, a)[0] for p, a in zip(PROMPTS, answers[0], strict=True)]
    assert sum(a[0] == e for a, e in zip(answers[0], exact, strict=True)) >= len(PROMPTS) - 2


def test_short_requests_score_nothing(v32: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(*_: object, **__: object) -> None:
        raise AssertionError("every request has at most as many tokens as a query sees")

    monkeypatch.setattr(SparseCpuBackend, "choose", choose)
    with tower(v32[1]) as engine:
        engine.send("r", PROMPTS[2][:6], max_new_tokens=7)
        engine.run()
        assert len(engine.output("r")) == 7


@pytest.mark.skipif(triton_kernels() is None, reason="Triton is not installed")
def test_what_a_device_computes_beside_triton(v32: Model) -> None:
    """In Triton's interpreter, which is slow: a prompt in chunks, a decode beside it, a hit."""
    with tower(v32[1], attention_backend="triton", page_size=16, chunked_prefill_size=20) as engine:
        engine.send("a", PROMPTS[1], max_new_tokens=4)
        engine.send("b", PROMPTS[2][:37], max_new_tokens=3)
        engine.run()
        engine.send("c", PROMPTS[1] + [5], max_new_tokens=2)
        engine.run()
        for rid, prompt in (("a", PROMPTS[1]), ("b", PROMPTS[2][:37]), ("c", PROMPTS[1] + [5])):
            answer = engine.output(rid)
            assert answer == best_next(v32[0], prompt, answer)
    flags = {"attention_backend": "triton", "kv_backing": "segment_table"}
    with pytest.raises(ValueError, match="triton needs contiguous KV memory for sparse attention"):
        DeviceTower(v32[1], **flags)
