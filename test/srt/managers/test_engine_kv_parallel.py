"""Ranks that share each request's KV answer as one rank does, and hold more than one rank can.

The ranks are threads of this process with a whole device tower each, so no process is started.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang.srt.errors import BackingError
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.mem_cache.segment_backing.segment_table import SegmentTableBacking
from srt.crossed import crossed
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_ranks import NEW_TOKENS, ORDER, Model, answer_all, of_models
from srt.managers.test_engine_tokens import PROMPTS, DeviceTower, tower
from srt.models.hf_models import VOCAB, make_hf_model, save

GRIDS = [(4, 2), (4, 4), (3, 3)]
# By family: a budget in tokens that is too small for all prompts at once, on two ranks.
FAMILIES = {"llama": 160, "qwen3_moe": 160, "llama4": 96, "gpt_oss": 128}
FLAGS: tuple[dict[str, object], ...] = (
    {"page_size": 1, "kv_segment_size": 64, "chunked_prefill_size": 32},
    {"page_size": 16, "kv_segment_size": 64, "disable_overlap_schedule": True},
    {"kv_backing": "segment_table", "page_size": 16, "kv_segment_size": 64},
    {"kv_backing": "static", "page_size": 16, "kv_segment_size": 64},
    {"max_running_requests": 2, "page_size": 4, "kv_canary": "full"},
    {"attention_backend": "torch_native", "page_size": 8},
)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model directory, what one rank answers, and a tight budget."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    path = save(make_hf_model(request.param), folder)
    with tower(path) as engine:
        return path, answer_all(engine), FAMILIES[request.param]


@pytest.mark.parametrize(
    ("model", "grid"),
    crossed(ORDER, GRIDS),
    indirect=["model"],
    scope="module",
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_ranks_answer_as_one(model: Model, grid: tuple[int, int]) -> None:
    path, expected, _ = model
    size, kv = grid
    with rank_towers(size, path, kv_parallel_size=kv, page_size=16) as ranks:
        assert ranks.run(answer_all) == expected


@pytest.mark.parametrize(
    ("model", "flags"), crossed(ORDER, FLAGS), indirect=["model"], scope="module", ids=str
)
def test_two_ranks_answer_as_one(model: Model, flags: dict[str, object]) -> None:
    path, expected, _ = model
    with rank_towers(2, path, kv_parallel_size=2, **flags) as ranks:
        assert ranks.run(answer_all) == expected


@of_models(1)
def test_a_second_round_hits_the_cache(model: Model) -> None:
    path, expected, _ = model

    def second_round(engine: DeviceTower) -> tuple[list[list[int]], dict[str, int]]:
        engine.channel.outs.clear()
        answers = answer_all(engine)
        return answers, {out.rid: out.cached_tokens for out in engine.channel.outs}

    with rank_towers(4, path, kv_parallel_size=4, page_size=16) as ranks:
        assert ranks.run(answer_all) == expected
        answers, cached = ranks.run(second_round)
        assert answers == expected
        assert cached["r2"] == 128
        assert cached["r5"] >= 80


@of_models(2)
def test_prefixes_that_part_inside_a_page_change_no_token(model: Model) -> None:
    """Alone a rank copies what a cached page begins with; that page may be another rank's here."""
    path, _, _ = model
    common = [(11 * i + 3) % VOCAB for i in range(76)]
    prompts = [[*common, *range(n, n + 9)] for n in range(20, 60, 10)]

    def one_by_one(engine: DeviceTower) -> list[list[int]]:
        for number, prompt in enumerate(prompts):
            engine.send(f"r{number}", prompt, max_new_tokens=NEW_TOKENS)
            engine.run()
        return [engine.output(f"r{number}") for number in range(len(prompts))]

    with tower(path, page_size=16) as engine:
        expected = one_by_one(engine)
    with rank_towers(4, path, kv_parallel_size=4, page_size=16) as ranks:
        assert ranks.run(one_by_one) == expected


@of_models(2)
def test_retraction_changes_no_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected, budget = model
    # Counting almost nothing of the answers overcommits on purpose.
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    flags = {"kv_backing": "segment_table", "page_size": 8, "kv_segment_size": 16}
    with rank_towers(
        2,
        path,
        kv_parallel_size=2,
        chunked_prefill_size=16,
        max_total_tokens=budget,
        **flags,
    ) as ranks:
        assert ranks.run(answer_all) == expected
        assert ranks.run(lambda engine: engine.scheduler.counters.num_retractions) > 0


@of_models(1)
def test_an_abort_gives_back_on_every_rank(model: Model) -> None:
    path, expected, _ = model

    def abort_one(engine: DeviceTower) -> list[int]:
        engine.send("long", PROMPTS[2], max_new_tokens=400)
        engine.send("other", PROMPTS[1], max_new_tokens=NEW_TOKENS)
        for _ in range(4):
            engine.scheduler.turn()
        if engine.rank == 0:
            engine.channel.inbox.append(AbortReq("long"))
        engine.run()
        assert not engine.memory.leases
        return engine.output("other")

    with rank_towers(2, path, kv_parallel_size=2, page_size=16) as ranks:
        assert ranks.run(abort_one) == expected[1]


def test_a_model_of_windows_alone_is_whole_on_each_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(make_hf_model("mistral", sliding_window=50), tmp_path)
    with tower(path, page_size=16) as engine:
        expected = answer_all(engine)
    assert not caplog.messages
    with rank_towers(2, path, kv_parallel_size=2, page_size=16) as ranks:
        assert ranks.run(answer_all) == expected
        merges = [call for call in ranks.ranks.compute.calls[0] if "gather" in call]
    assert not merges
    assert any("--kv-parallel-size spreads nothing" in message for message in caplog.messages)


# ---- capacity ----------------------------------------------------------------------------------

LONG = {"max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(make_hf_model("llama", **LONG), tmp_path_factory.mktemp("long"))


def one_prompt(engine: DeviceTower, num_tokens: int) -> list[int]:
    prompt = [(7 * i * i + 3 * i) % VOCAB for i in range(num_tokens)]
    engine.send("r", prompt, max_new_tokens=8)
    engine.run()
    return engine.output("r")


def test_a_request_larger_than_one_ranks_budget_runs_on_four(long_llama: str) -> None:
    with tower(long_llama, page_size=16, kv_segment_size=256) as engine:
        expected = one_prompt(engine, 2000)
        token_bytes = engine.memory.spec.bytes_per_token
        context = engine.parts.limits.context_length
    assert context == 4096
    budget = 600 * token_bytes
    flags = {"page_size": 16, "kv_segment_size": 256, "kv_memory_budget": budget}
    with tower(long_llama, **flags) as alone:
        assert alone.parts.limits.context_length == 512
    with rank_towers(4, long_llama, kv_parallel_size=4, **flags) as ranks:
        assert ranks.first.parts.limits.context_length == 2304
        assert ranks.run(lambda engine: one_prompt(engine, 2000)) == expected
        mapped = ranks.run(lambda engine: engine.memory.manager.mapped_bytes)
        assert mapped == 2048 * token_bytes // 4
        assert len(ranks.run(lambda engine: one_prompt(engine, 2296))) == 16, "both answers"


def test_maps_refused_on_one_rank_change_no_token(
    long_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Growth is tried again at once: no test shall depend on how long a turn takes.
    for name in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S"):
        monkeypatch.setattr(f"sglang.srt.mem_cache.segment_budget.{name}", 0.0)
    flags = {"page_size": 8, "kv_segment_size": 16, "kv_backing": "segment_table"}
    with tower(long_llama, **flags) as engine:
        expected = answer_all(engine)
    maps: list[int] = []
    real = SegmentTableBacking.map

    with rank_towers(2, long_llama, kv_parallel_size=2, **flags) as ranks:
        second = ranks.towers[1].memory.manager.backing

        def sometimes(self: SegmentTableBacking, group: int, segments: tuple[int, ...]) -> None:
            if self is second:
                maps.append(group)
                if len(maps) in (3, 5, 6):
                    raise BackingError("not now")
            real(self, group, segments)  # type: ignore[arg-type]

        monkeypatch.setattr(SegmentTableBacking, "map", sometimes)
        assert ranks.run(answer_all) == expected
        stats = [engine.memory.manager.stats()[0] for engine in ranks.towers]
        assert stats[0].refused_count == stats[1].refused_count >= 3
