"""A draft model through the whole device tower: the tokens of the model alone, in fewer steps.

A draft model that is the model itself is always right, as long as its K and V are those of the
same text; so what it is wrong about shows what it did not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sglang.srt.layers.attention import torch_device_backend
from sglang.srt.managers.io_struct import AbortReq, ControlReq
from sglang.srt.managers.scheduler_stats import SchedulerCounters
from sglang.srt.model_executor.draft_model import DraftModel
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.speculative.step_costs import DraftedCosts
from srt.constrained.grammar_cases import golden_tokenizer, vocabulary_message
from srt.managers import test_engine_grammars
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_tokens import NEW_TOKENS, PROMPTS, DeviceTower, answer_all, tower
from srt.models.hf_models import hf_greedy, make_hf_model, save
from srt.utils.fake_device import LateRuntime

STEPS = 3


@pytest.fixture(autouse=True)
def drafts_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request is drafted as far as it may be, whatever this machine does meanwhile."""
    monkeypatch.setattr(DraftedCosts, "seconds", lambda self, num_tokens: 1.0)
    monkeypatch.setattr(DraftedCosts, "ahead_s", lambda self, num_rows: 0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of a model, and of one of other heads that knows nothing of it."""
    own = make_hf_model("llama")
    other = make_hf_model("qwen2", hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
    return {
        "own": save(own, tmp_path_factory.mktemp("own")),
        "other": save(other, tmp_path_factory.mktemp("other")),
    }


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    reference = make_hf_model("llama")
    return [hf_greedy(reference, prompt, NEW_TOKENS) for prompt in PROMPTS]


def drafted(path: str, **flags: Any) -> dict[str, Any]:
    return {
        "speculative_algorithm": "STANDALONE",
        "speculative_draft_model_path": path,
        "speculative_num_steps": STEPS,
        "page_size": 16,
        "kv_segment_size": 64,
        **flags,
    }


def counters(engine: DeviceTower) -> SchedulerCounters:
    return engine.scheduler.counters


def test_one_request_takes_all_that_its_own_model_drafts(
    models: dict[str, str], expected: list[list[int]]
) -> None:
    with tower(models["own"], **drafted(models["own"])) as engine:
        engine.send("r", PROMPTS[1])
        engine.run()
        assert engine.output("r") == expected[1]
        counted = counters(engine)
        # One token of the prompt's step, then 63 in steps of four at most.
        assert counted.num_steps == 1 + 16
        assert (counted.num_verified, counted.num_proposed) == (16, 47)
        assert counted.num_correct == 47
        assert counted.as_dict()["avg_spec_accept_length"] == round(1 + 47 / 16, 4)


FLAGS: tuple[dict[str, Any], ...] = (
    {},
    {"chunked_prefill_size": 32, "page_size": 1},
    {"kv_backing": "segment_table"},
    {"kv_backing": "static"},
    {"attention_backend": "torch_native", "disable_cuda_graph": True},
    {"disable_radix_cache": True, "disable_overlap_schedule": True},
    {"max_total_tokens": 448},
    {"speculative_num_draft_tokens": 2},
)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_a_draft_model_that_is_the_model_is_always_right(
    models: dict[str, str],
    expected: list[list[int]],
    flags: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    with tower(models["own"], **drafted(models["own"], **flags)) as engine:
        for _ in range(2):  # the second time over what is cached
            assert answer_all(engine) == expected
            engine.channel.outs.clear()
        counted = counters(engine)
        assert counted.num_correct == counted.num_proposed > 350
        assert (counted.num_retractions > 0) == ("max_total_tokens" in flags)


def test_what_a_draft_model_has_yet_to_write_moves_to_no_disk(
    models: dict[str, str], expected: list[list[int]], tmp_path: Path
) -> None:
    """Both models' segments go below and come back; what is there is what was written."""
    flags = {"page_size": 16, "kv_segment_size": 16, "kv_memory_budget": 300 << 10}
    flags |= {"kv_disk_path": str(tmp_path), "kv_disk_size": 16 << 20}
    with tower(models["own"], **drafted(models["own"], **flags)) as engine:
        for _ in range(2):
            assert answer_all(engine) == expected
            engine.channel.outs.clear()
        assert counters(engine).num_correct == counters(engine).num_proposed > 350
        assert all(stats.demote_count > 0 for stats in engine.memory.manager.stats())


def test_a_draft_model_that_knows_nothing_changes_no_token(
    models: dict[str, str], expected: list[list[int]]
) -> None:
    with tower(models["own"], **drafted(models["other"])) as engine:
        assert answer_all(engine) == expected
        assert 0 <= counters(engine).num_correct < counters(engine).num_proposed / 4
        groups = engine.memory.spec.groups
        assert [group.heads for group in groups] == [None, (2, 8, 8)]
        assert engine.memory.spec.bytes_per_token == sum(
            engine.memory.spec.bytes_per_slot(g)
            for g in range(2)  # type: ignore[arg-type]
        )


PARAMS = {"temperature": 0.8, "top_p": 0.9, "sampling_seed": 12}
ASKED: tuple[dict[str, Any], ...] = (
    {**PARAMS},
    {**PARAMS, "repetition_penalty": 1.3},
    {**PARAMS, "frequency_penalty": 0.7, "min_new_tokens": 40, "stop_token_ids": (5, 9, 70)},
    {"max_new_tokens": 1},
    {**PARAMS, "max_new_tokens": 2},
    {**PARAMS, "stop_token_ids": tuple(range(0, 160, 20))},
)


def send_asked(engine: DeviceTower) -> list[list[int]]:
    for number, (prompt, asked) in enumerate(zip(PROMPTS, ASKED, strict=True)):
        engine.send(f"r{number}", prompt, **asked)
        engine.scheduler.turn()
    engine.run()
    return [engine.output(f"r{number}") for number in range(len(PROMPTS))]


def test_random_requests_and_those_with_penalties_get_the_same_tokens(
    models: dict[str, str],
) -> None:
    with tower(models["own"], page_size=16) as engine:
        plain = send_asked(engine)
    for draft in ("own", "other"):
        with tower(models["own"], **drafted(models[draft])) as engine:
            assert send_asked(engine) == plain
            assert counters(engine).num_correct > 0


def test_grammars_hold_what_a_model_drafts(tmp_path: Path) -> None:
    message = vocabulary_message(golden_tokenizer(tmp_path, "bpe"))
    path = save(make_hf_model("llama", vocab_size=test_engine_grammars.VOCAB), tmp_path / "model")
    found = []
    for flags in ({}, drafted(path)):
        with tower(path, **flags) as engine:
            test_engine_grammars.send_held(engine, message)
            test_engine_grammars.run(engine)
            prompts = test_engine_grammars.HELD_PROMPTS
            found.append([engine.output(f"held{number}") for number in range(len(prompts))])
    assert found[0] == found[1]
    assert counters(engine).num_correct < counters(engine).num_proposed


def test_two_ranks_draft_alike(models: dict[str, str], expected: list[list[int]]) -> None:
    for draft in ("own", "other"):
        with rank_towers(2, models["own"], **drafted(models[draft])) as towers:
            assert towers.run(answer_all) == expected
            counted = counters(towers.first)
            assert (counted.num_correct == counted.num_proposed) == (draft == "own")
            towers.check()


def test_a_late_device_gets_the_same_tokens(
    models: dict[str, str], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts are said and verified on a device that nobody waits for, in recorded steps."""
    for module in ("utils.native", "mem_cache.memory_pool"):
        monkeypatch.setattr(f"sglang.srt.{module}.native_kernels", lambda: None)
    monkeypatch.setattr(torch_device_backend, "RECORDED_TOKENS", 256)
    flags = drafted(models["own"], device="cuda", attention_backend="torch_native")
    flags |= {"cuda_graph_max_bs": 6, "kv_segment_size": 256}
    with tower(models["own"], runtime=LateRuntime(), **flags) as engine:
        assert answer_all(engine) == expected
        counted = counters(engine)
        assert counted.num_correct == counted.num_proposed > 150


def test_an_answer_without_drafts_is_read_by_and_by(
    models: dict[str, str], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not worth drafting costs a draft model one step in 32, and is shared as far."""
    steps: list[list[int]] = []
    say = DraftModel._say

    def counting(self: DraftModel, batch: ForwardBatch, *args: Any) -> torch.Tensor:
        steps.append(batch.geometry.extend_seq_lens.tolist())
        return say(self, batch, *args)

    monkeypatch.setattr(DraftModel, "_say", counting)
    monkeypatch.setattr(DraftedCosts, "ahead_s", lambda self, num_rows: 9.0)
    with tower(models["own"], **drafted(models["own"], page_size=1)) as engine:
        engine.send("r", PROMPTS[1])
        engine.run()
        assert engine.output("r") == expected[1]
        assert counters(engine).num_proposed == 0
        assert steps == [[17], [32]]
        engine.send("again", [*PROMPTS[1], *expected[1]], max_new_tokens=2)
        engine.run()
        assert engine.channel.outs[-1].cached_tokens == 17 + 32
        monkeypatch.setattr(DraftedCosts, "ahead_s", lambda self, num_rows: 0.0)
        steps.clear()
        engine.send("drafted", PROMPTS[2])
        engine.run()
        assert engine.output("drafted") == expected[2]
        assert steps[:4] == [[130], [1], [1], [1]]
        assert steps[4:7] == [[2], [1], [1]], "the last of a draft is read when it was right"
        assert counters(engine).num_correct == counters(engine).num_proposed == 47


def test_an_abort_and_a_budget_that_is_cut_leave_nothing_behind(
    models: dict[str, str], expected: list[list[int]]
) -> None:
    with tower(models["own"], **drafted(models["own"])) as engine:
        for number, prompt in enumerate(PROMPTS):
            engine.send(f"r{number}", prompt)
            engine.scheduler.turn()
        engine.channel.inbox.append(AbortReq("r1"))
        engine.scheduler.turn()
        smaller = 8 * sum(layout.segment_bytes for layout in engine.memory.manager.layouts)
        cut = {"budget_bytes": smaller, "time_limit_s": 60.0}
        engine.channel.inbox.append(ControlReq(seq=1, op="set_kv_budget", args=cut))
        engine.run()
        assert [reply.success for reply in engine.channel.replies] == [True]
        assert engine.memory.manager.budget_bytes == smaller
        for number in (0, 2, 3, 4, 5):
            assert engine.output(f"r{number}") == expected[number]
        engine.memory.audit()
        assert not engine.memory.leases


def refusal(path: str, **flags: Any) -> str:
    with pytest.raises(ValueError) as error, tower(path, **flags):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_models_that_do_not_go_together_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    small = save(make_hf_model("llama", vocab_size=96), tmp_path / "small")
    window = save(make_hf_model("mistral", sliding_window=50), tmp_path / "window")
    latent = save(make_hf_model("deepseek_v3"), tmp_path / "latent")
    states = save(make_hf_model("qwen3_5"), tmp_path / "states")
    chosen = save(make_hf_model("deepseek_v32"), tmp_path / "chosen")
    own = models["own"]
    assert "has 96 tokens, the model has 160" in refusal(own, **drafted(small))
    assert "forget tokens" in refusal(own, **drafted(window))
    assert "latent attention" in refusal(own, **drafted(latent))
    assert "keeps recurrent states is not served" in refusal(own, **drafted(states))
    assert "keeps index keys is not served" in refusal(latent, **drafted(chosen))


@pytest.mark.parametrize(("target", "draft"), [("deepseek_v32", "deepseek_v3"), ("olmo3", "llama")])
def test_models_that_keep_otherwise_than_their_draft_model(
    target: str, draft: str, tmp_path: Path
) -> None:
    """Index keys, and windows, beside groups that keep every token."""
    own = save(make_hf_model(target), tmp_path / "own")
    small = save(make_hf_model(draft), tmp_path / "small")
    with tower(own, page_size=16, kv_segment_size=64) as engine:
        expected = answer_all(engine)
    with tower(own, **drafted(small)) as engine:
        assert answer_all(engine) == expected
        assert counters(engine).num_proposed > 0
