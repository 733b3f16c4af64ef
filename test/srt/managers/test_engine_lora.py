"""The device tower with LoRA adapters: the tokens of models that have them in their weights."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang.srt.managers.io_struct import (
    ControlReply,
    ControlReq,
    TokenizedGenerateReqInput,
    int32_buffer,
)
from sglang.srt.managers.lora_policy import MAX_LOOKED_AT
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.mem_cache.allocation import KVPlacement
from sglang.srt.model_executor.decode_tapes import DecodeTapes
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.native import native_kernels
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_tokens import PROMPTS, DeviceTower, tower
from srt.models.hf_models import VOCAB, best_next, hf_greedy, make_hf_model, save
from srt.models.lora_adapters import ALL, make_factors, merged, save_adapter

NEW_TOKENS = 16
# Every prompt with another adapter than its neighbours; 0 is the base model.
PLAN = (0, 1, 2, 1, 0, 2)


class Adapters:
    """A base model, two adapters of different ranks and targets, and what each answers."""

    def __init__(self, folder: Path, family: str = "llama", **changes: Any) -> None:
        base = make_hf_model(family, **changes)
        self.path = save(base, folder / "base")
        large = make_factors(base, ALL, rank=4, seed=1)
        small = make_factors(base, ("q_proj", "v_proj"), rank=3, seed=2)
        self.refs = [
            f"large={save_adapter(folder / 'large', large)}",
            f"small={save_adapter(folder / 'small', small, rank=3, alpha=6.0)}",
        ]
        self.models = [base, merged(base, large), merged(base, small, alpha=6.0)]
        self.expected = [
            hf_greedy(self.models[adapter], prompt, NEW_TOKENS)
            for adapter, prompt in zip(PLAN, PROMPTS, strict=True)
        ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("llama"))


def send(
    engine: DeviceTower,
    rid: str,
    prompt: list[int],
    adapter: int,
    new: int = NEW_TOKENS,
    **fields: Any,
) -> None:
    if engine.rank:
        return
    engine.channel.inbox.append(
        TokenizedGenerateReqInput(
            rid=rid,
            input_ids=memoryview(int32_buffer(prompt)),
            sampling_params=SamplingParams(max_new_tokens=new, temperature=0.0),
            lora_id=adapter or None,
            **fields,
        )
    )


def answer_all(engine: DeviceTower) -> list[list[int]]:
    for number, (adapter, prompt) in enumerate(zip(PLAN, PROMPTS, strict=True)):
        send(engine, f"r{number}", prompt, adapter)
        engine.scheduler.turn()
    engine.run()
    return [engine.output(f"r{number}") for number in range(len(PROMPTS))]


def control(engine: DeviceTower, op: str, **args: object) -> ControlReply:
    if not engine.rank:
        engine.channel.inbox.append(ControlReq(seq=1, op=op, args=args))
    engine.channel.replies.clear()
    engine.scheduler.turn()
    return engine.channel.replies[0] if engine.channel.replies else ControlReply(1, True)


def test_adapters_change_tokens(llama: Adapters) -> None:
    """What the other tests compare would be no proof if adapters changed nothing."""
    base = [hf_greedy(llama.models[0], prompt, NEW_TOKENS) for prompt in PROMPTS]
    changed = [got != want for got, want in zip(llama.expected, base, strict=True)]
    assert changed == [adapter != 0 for adapter in PLAN]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"page_size": 16, "kv_segment_size": 64, "disable_overlap_schedule": True},
        {"max_loras_per_batch": 1, "page_size": 1, "chunked_prefill_size": 32},
        {"schedule_policy": "lpm", "max_loras_per_batch": 1, "lora_eviction_policy": "fifo"},
        {"attention_backend": "torch_native", "lora_target_modules": ["all"], "max_lora_rank": 9},
    ],
    ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()),
)
def test_a_mixed_batch_answers_as_merged_models(llama: Adapters, flags: dict[str, Any]) -> None:
    with tower(llama.path, lora_paths=llama.refs, **flags) as engine:
        assert answer_all(engine) == llama.expected
        engine.channel.outs.clear()
        assert answer_all(engine) == llama.expected, "the second time, from the cache"


@pytest.mark.parametrize(
    "family", ["qwen2", "gemma3", "qwen3_moe", "llama4", "gpt_oss", "granite", "glm4_moe"]
)
def test_families(family: str, tmp_path: Path) -> None:
    """Biases, norms, windows, shared experts beside routed ones: adapters go beside all of it."""
    model = Adapters(tmp_path, family)
    with tower(model.path, lora_paths=model.refs, page_size=16) as engine:
        found = answer_all(engine)
        for number, (adapter, prompt) in enumerate(zip(PLAN, PROMPTS, strict=True)):
            assert found[number] == best_next(model.models[adapter], prompt, found[number])
            assert len(found[number]) == NEW_TOKENS


@pytest.mark.parametrize("ranks", [1, 2])
def test_adapters_of_joined_projections(ranks: int, tmp_path: Path) -> None:
    """Phi's, whose heads turn in part; the prompt is long enough for the long factors."""
    base = make_hf_model("phi3")
    factors = make_factors(base, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))
    adapter = f"joined={save_adapter(tmp_path / 'joined', factors)}"
    models = [base, merged(base, factors)]
    prompt = np.random.default_rng(2).integers(0, VOCAB, 80).tolist()
    flags = {"lora_paths": [adapter], "page_size": 16}

    def answer(engine: DeviceTower) -> list[list[int]]:
        for number in range(2):
            send(engine, f"r{number}", prompt, number)
        engine.run()
        return [engine.output(f"r{number}") for number in range(2)]

    with rank_towers(ranks, save(base, tmp_path / "base"), **flags) as towers:
        found = towers.run(answer)
    assert found[0] != found[1]
    for model, tokens in zip(models, found, strict=True):
        assert len(tokens) == NEW_TOKENS
        assert tokens == best_next(model, prompt, tokens)


@pytest.mark.parametrize("flags", [{}, {"max_loras_per_batch": 1, "chunked_prefill_size": 32}])
def test_two_ranks_answer_as_one(llama: Adapters, flags: dict[str, Any]) -> None:
    with rank_towers(2, llama.path, lora_paths=llama.refs, **flags) as ranks:
        assert ranks.run(answer_all) == llama.expected


def test_more_ranks_than_kv_heads(tmp_path: Path) -> None:
    model = Adapters(tmp_path, num_key_value_heads=1)
    with rank_towers(2, model.path, lora_paths=model.refs) as ranks:
        assert ranks.run(answer_all) == model.expected


def test_retraction_changes_no_token(llama: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    flags = {"page_size": 16, "kv_segment_size": 64, "max_total_tokens": 256}
    flags |= {"chunked_prefill_size": 48, "max_loras_per_batch": 2}
    with tower(llama.path, lora_paths=llama.refs, **flags) as engine:
        for number, prompt in enumerate([*PROMPTS[:2], *PROMPTS[3:]]):
            send(engine, f"r{number}", prompt, number % 3, 60)
        engine.run()
        assert engine.scheduler.counters.num_retractions > 0
        for number, prompt in enumerate([*PROMPTS[:2], *PROMPTS[3:]]):
            want = hf_greedy(llama.models[number % 3], prompt, 60)
            assert engine.output(f"r{number}") == want


def batches_of(engine: DeviceTower) -> list[ScheduleBatch]:
    """Every step's batch; filled while the engine runs."""
    batches: list[ScheduleBatch] = []
    make_batch = engine.scheduler._make_batch

    def note(batch: ScheduleBatch, placement: KVPlacement) -> ForwardBatch:
        batches.append(batch)
        return make_batch(batch, placement)

    engine.scheduler._make_batch = note
    return batches


def adapters_of(batches: list[ScheduleBatch]) -> list[list[int | None]]:
    """The adapters of each step's sequences."""
    return [[item.req.adapter_id for item in batch.items] for batch in batches]


def changes_of(batches: list[ScheduleBatch]) -> list[tuple[int, int]]:
    """(adapter, place) of all changes."""
    changes = [change for batch in batches for change in batch.adapter_changes]
    return [(change.adapter_id, change.place) for change in changes]


def test_no_more_adapters_run_at_once_than_have_places(llama: Adapters) -> None:
    """Who waits for a place is overtaken by requests without an adapter alone."""
    with tower(llama.path, lora_paths=llama.refs, max_loras_per_batch=1) as engine:
        batches = batches_of(engine)
        for rid, adapter in (("a", 1), ("b", 2), ("c", 1), ("d", 0)):
            send(engine, rid, PROMPTS[1], adapter)
        engine.run()
        steps = adapters_of(batches)
        assert steps[0] == [1, None], "c has its adapter there, but b came first"
        assert all(len({one for one in step if one}) <= 1 for step in steps)
        seen = [one for step in steps for one in step if one]
        assert [one for one, _ in groupby(seen)] == [1, 2, 1]
        for rid, adapter in (("a", 1), ("b", 2), ("c", 1), ("d", 0)):
            assert engine.output(rid) == hf_greedy(llama.models[adapter], PROMPTS[1], NEW_TOKENS)


def test_a_pinned_adapter_keeps_its_place(llama: Adapters) -> None:
    large, small = (ref.partition("=")[2] for ref in llama.refs)
    refs = [{"lora_name": "l", "lora_path": large, "pinned": True}, f"s={small}", f"t={small}"]
    with tower(llama.path, lora_paths=refs, max_loras_per_batch=2) as engine:
        batches = batches_of(engine)
        for rid, adapter in (("a", 2), ("b", 3), ("c", 1), ("d", 2), ("e", 3), ("f", 1)):
            send(engine, rid, PROMPTS[1], adapter)
        engine.run()
        assert changes_of(batches) == [(2, 0), (1, 1), (3, 0), (2, 0), (3, 0)]


def test_a_more_urgent_request_takes_an_adapters_place(llama: Adapters) -> None:
    flags = {"max_loras_per_batch": 1, "enable_priority_scheduling": True}
    with tower(llama.path, lora_paths=llama.refs, **flags) as engine:
        send(engine, "low", PROMPTS[1], 1, 40, priority=0)
        for _ in range(5):
            engine.scheduler.turn()
        send(engine, "high", PROMPTS[1], 2, priority=20)
        engine.run()
        assert engine.scheduler.counters.num_preemptions == 1
        finals = [out.rid for out in engine.channel.outs if out.finish_reason is not None]
        assert finals == ["high", "low"]
        assert engine.output("low") == hf_greedy(llama.models[1], PROMPTS[1], 40)
        assert engine.output("high") == hf_greedy(llama.models[2], PROMPTS[1], NEW_TOKENS)


def test_only_so_many_of_a_long_queue_are_looked_at(llama: Adapters) -> None:
    """Behind more than that, even who needs no place waits its turn."""
    with tower(llama.path, lora_paths=llama.refs, max_loras_per_batch=1) as engine:
        batches = batches_of(engine)
        send(engine, "a", PROMPTS[0], 1, 3)
        for number in range(MAX_LOOKED_AT):
            send(engine, f"b{number}", PROMPTS[0], 2, 1)
        send(engine, "c", PROMPTS[0], 0, 1)
        engine.run()
        steps = adapters_of(batches)
        assert steps[0] == [1]
        assert sum(step.count(None) for step in steps) == 1


@pytest.mark.parametrize(("policy", "expected"), [("lru", [1, 2, 3, 2]), ("fifo", [1, 2, 3])])
def test_whose_place_is_taken(llama: Adapters, policy: str, expected: list[int]) -> None:
    small = llama.refs[1].partition("=")[2]
    flags = {"max_loras_per_batch": 2, "lora_eviction_policy": policy}
    with tower(llama.path, lora_paths=[f"{n}={small}" for n in "abc"], **flags) as engine:
        batches = batches_of(engine)
        for number, adapter in enumerate((1, 2, 1, 3, 2)):
            send(engine, f"r{number}", PROMPTS[1], adapter, 1)
            engine.run()
        assert [adapter for adapter, _ in changes_of(batches)] == expected


def test_a_prefix_belongs_to_its_adapter(llama: Adapters) -> None:
    prompt = PROMPTS[2]
    with tower(llama.path, lora_paths=llama.refs, page_size=16) as engine:
        for rid, adapter in (("a", 0), ("b", 1), ("c", 2), ("d", 1), ("e", 0)):
            send(engine, rid, prompt, adapter, 2)
            engine.run()
        cached = {out.rid: out.cached_tokens for out in engine.channel.outs}
        assert cached == {"a": 0, "b": 0, "c": 0, "d": 128, "e": 128}


def test_an_adapter_that_comes_back_under_another_number_shares_nothing(llama: Adapters) -> None:
    """A name that is loaded anew gets another number, whatever its weights."""
    large, small = (ref.partition("=")[2] for ref in llama.refs)
    with tower(llama.path, lora_paths=[f"x={large}"], page_size=16) as engine:
        send(engine, "a", PROMPTS[2], 1)
        engine.run()
        assert control(engine, "unload_lora_adapter", adapter_id=1).success
        new = {"adapter_id": 2, "name": "x", "path": small, "pinned": False}
        assert control(engine, "load_lora_adapter", **new).success
        send(engine, "b", PROMPTS[2], 2)
        send(engine, "c", PROMPTS[2], 1)
        engine.run()
        assert engine.output("a") == hf_greedy(llama.models[1], PROMPTS[2], NEW_TOKENS)
        assert engine.output("b") == hf_greedy(llama.models[2], PROMPTS[2], NEW_TOKENS)
        outs = {out.rid: out for out in engine.channel.outs}
        assert outs["b"].cached_tokens == 0
        gone = outs["c"].finish_reason
        assert gone is not None
        assert (gone.status_code, gone.message) == (
            400,
            "The request's LoRA adapter is not loaded.",
        )


def test_an_adapter_in_use_is_not_unloaded(llama: Adapters) -> None:
    with tower(llama.path, lora_paths=llama.refs) as engine:
        send(engine, "a", PROMPTS[1], 1)
        engine.scheduler.turn()
        reply = control(engine, "unload_lora_adapter", adapter_id=1)
        assert (reply.success, reply.message) == (False, "1 requests use it.")
        assert control(engine, "unload_lora_adapter", adapter_id=2).success
        assert control(engine, "unload_lora_adapter", adapter_id=2).message == "It is not loaded."
        engine.run()
        assert engine.output("a") == hf_greedy(llama.models[1], PROMPTS[1], NEW_TOKENS)
        assert control(engine, "unload_lora_adapter", adapter_id=1).success


def test_what_one_rank_cannot_load_no_rank_has(
    llama: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 has no file; both ranks go on with what they had."""
    small = llama.refs[1].partition("=")[2]
    with rank_towers(2, llama.path, lora_paths=llama.refs[:1], max_lora_rank=4) as ranks:

        def fail(*_: object) -> None:
            raise OSError("no such file")

        monkeypatch.setattr(ranks.towers[1].parts.adapters._places, "hold", fail)

        def load(engine: DeviceTower) -> tuple[bool, str]:
            args = {"adapter_id": 2, "name": "s", "path": small, "pinned": False}
            reply = control(engine, "load_lora_adapter", **args)
            refusal = engine.parts.adapters.refusal(2)
            assert refusal is not None
            return reply.success, reply.message

        results = ranks.ranks.run(lambda rank: load(ranks.towers[rank]))
        assert results[0] == (False, "another rank could not load it")

        def answer(engine: DeviceTower) -> list[int]:
            send(engine, "a", PROMPTS[1], 1)
            engine.run()
            return engine.output("a")

        assert ranks.run(answer) == hf_greedy(llama.models[1], PROMPTS[1], NEW_TOKENS)


def test_log_probabilities_of_a_prompt_are_the_adapters(llama: Adapters) -> None:
    """Rows of prompts, pruned and not, through layers and head."""
    with tower(llama.path, lora_paths=llama.refs, chunked_prefill_size=32) as engine:
        prompts = {1: PROMPTS[2], 2: PROMPTS[5], 0: PROMPTS[1]}
        for adapter, prompt in prompts.items():
            engine.channel.inbox.append(
                TokenizedGenerateReqInput(
                    rid=f"r{adapter}",
                    input_ids=memoryview(int32_buffer(prompt)),
                    sampling_params=SamplingParams(max_new_tokens=2, temperature=0.0),
                    return_logprob=True,
                    logprob_start_len=3,
                    lora_id=adapter or None,
                )
            )
        engine.run()
        for adapter, prompt in prompts.items():
            found = next(
                out.input_logprobs
                for out in engine.channel.outs
                if out.rid == f"r{adapter}" and out.input_logprobs is not None
            )
            with torch.inference_mode():
                logits = llama.models[adapter](torch.tensor([prompt])).logits[0].log_softmax(-1)
            want = [float(logits[at, prompt[at + 1]]) for at in range(3, len(prompt) - 1)]
            got = np.frombuffer(found.logprobs, "<f4")[1:]
            np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_paths": ["x=/no/such"]}, "/no/such is no directory"),
        ({"max_lora_rank": 2}, "/large has rank 4, --max-lora-rank is 2"),
        ({"lora_target_modules": ["q_proj", "wq"]}, "no linear layer of the model is called wq"),
        ({"lora_target_modules": ["q_proj"]}, "/large changes down_proj, gate_proj, k_proj"),
    ],
)
def test_what_can_not_be_served_ends_the_start(
    llama: Adapters, flags: dict[str, Any], message: str
) -> None:
    with (
        pytest.raises(ValueError, match=message) as error,
        tower(llama.path, **{"lora_paths": llama.refs, **flags}),
    ):
        pass
    assert "\n" not in str(error.value)


def test_recorded_steps_beside_adapted_ones(llama: Adapters) -> None:
    """Requests without adapters go onto tapes, also right after steps that had some."""
    with tower(llama.path, lora_paths=llama.refs) as engine:
        for rid, adapter, new in (("a", 1, 4), ("b", 0, 30), ("c", 0, 30), ("d", 2, 12)):
            send(engine, rid, PROMPTS[1], adapter, new)
        engine.run()
        for rid, adapter, new in (("a", 1, 4), ("b", 0, 30), ("c", 0, 30), ("d", 2, 12)):
            assert engine.output(rid) == hf_greedy(llama.models[adapter], PROMPTS[1], new)
        tapes = engine.parts.worker.runner.tapes
        if native_kernels() is not None:
            assert isinstance(tapes, DecodeTapes)
            assert tapes.recorded == (2,)
            assert not tapes.refused


@pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")
def test_one_row_with_an_adapter_is_recorded_for_its_place(llama: Adapters) -> None:
    """A tape stays good when another adapter takes the place."""
    flags = {"max_loras_per_batch": 1, "enable_fused_qk_norm_rope": True}
    with tower(llama.path, lora_paths=llama.refs, **flags) as engine:
        for rid, adapter in (("a", 1), ("b", 2), ("c", 0), ("d", 1)):
            send(engine, rid, PROMPTS[1], adapter)
            engine.run()
            assert engine.output(rid) == hf_greedy(llama.models[adapter], PROMPTS[1], NEW_TOKENS)
        tapes = engine.parts.worker.runner.tapes
        assert isinstance(tapes, DecodeTapes)
        assert tapes.recorded_places == (0,)
        assert tapes.recorded == (1,)
        assert not tapes.refused
