"""Decode steps on tapes: the same tokens as without, whatever the batch does between steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.managers.scheduler_setup import compute_threads
from sglang.srt.model_executor import decode_tapes
from sglang.srt.model_executor.decode_tapes import DecodeTapes, StepLogits, StepShape
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.utils.cpu_cores import usable_cores
from sglang.srt.utils.native import native_kernels
from srt.managers.test_engine_tokens import NEW_TOKENS, PROMPTS, answer_all, tower
from srt.model_loader.gguf_files import write_gguf
from srt.model_loader.test_gguf_mixtures import FAMILIES as MIXTURES
from srt.model_loader.test_gguf_mixtures import experts_of, yarn
from srt.models.hf_models import best_next, hf_greedy, make_hf_model, save

pytestmark = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")

RECORDED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma3",
    "qwen3_moe",
    "gpt_oss",
    "llama4",
)


def tapes_of(engine: object) -> DecodeTapes:
    tapes = engine.parts.worker._runner.tapes  # type: ignore[attr-defined]
    assert isinstance(tapes, DecodeTapes)
    return tapes


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    reference = make_hf_model("llama")
    expected = [hf_greedy(reference, prompt, NEW_TOKENS) for prompt in PROMPTS]
    return save(reference, tmp_path_factory.mktemp("llama")), expected


@pytest.mark.parametrize("family", RECORDED)
def test_steps_of_all_families_are_recorded(family: str, tmp_path: Path) -> None:
    changes = {"mistral": {"sliding_window": 50}, "gemma3": {"final_logit_softcapping": 2.0}}
    reference = make_hf_model(family, **changes.get(family, {}))
    with tower(save(reference, tmp_path)) as engine:
        answers = answer_all(engine)
        assert [len(one) for one in answers] == [NEW_TOKENS] * len(PROMPTS)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer == best_next(reference, prompt, answer)
        tapes = tapes_of(engine)
        assert tapes.recorded == (1, 2, 3, 4, 5, 6)
        assert not tapes.refused


def test_what_is_no_native_call_is_computed_as_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e3}
    reference = make_hf_model("llama", rope_parameters=dynamic)
    with caplog.at_level("INFO"), tower(save(reference, tmp_path)) as engine:
        assert answer_all(engine) == [hf_greedy(reference, one, NEW_TOKENS) for one in PROMPTS]
        assert tapes_of(engine).recorded == ()
        assert tapes_of(engine).refused
    assert "are not recorded: aten." in caplog.text


def test_steps_have_the_same_tables_until_a_page_begins(
    llama: tuple[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a step need not look at the pages of all its requests again."""
    seen: dict[int, tuple[object, ...]] = {}
    pack = ForwardBatch.from_schedule_batch

    def watch(*args: Any, **kwargs: Any) -> ForwardBatch:
        batch = pack(*args, **kwargs)
        if batch.num_tokens == 1:
            seen[int(batch.geometry.seq_lens[0])] = batch.geometry.block_tables
        return batch

    monkeypatch.setattr(ForwardBatch, "from_schedule_batch", watch)
    with tower(llama[0], page_size=16) as engine:
        engine.send("one", [1, 2], max_new_tokens=31)
        engine.run()
    assert list(seen) == list(range(3, 33))
    changed = [length for length in range(4, 33) if seen[length] is not seen[length - 1]]
    assert changed == [17]


def test_flags(llama: tuple[str, list[list[int]]]) -> None:
    path, expected = llama
    with tower(path, disable_cuda_graph=True) as engine:
        assert engine.parts.worker._runner.tapes is None
        assert answer_all(engine) == expected
    with tower(path, cuda_graph_max_bs=2) as engine:
        assert answer_all(engine) == expected
        assert tapes_of(engine).recorded == (1, 2)
    for flags in ({"kv_backing": "segment_table"}, {"attention_backend": "torch_native"}):
        with tower(path, **flags) as engine:
            assert engine.parts.worker._runner.tapes is None


def test_pages_that_move_between_steps(
    llama: tuple[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retraction under a tiny budget, then a second round on what the cache kept."""
    path, expected = llama
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    flags = {"page_size": 16, "kv_segment_size": 64, "max_total_tokens": 384}
    with tower(path, chunked_prefill_size=48, **flags) as engine:
        assert answer_all(engine) == expected
        assert engine.scheduler.counters.num_retractions > 0
        first = tapes_of(engine).recorded
        engine.channel.outs.clear()
        assert answer_all(engine) == expected
        assert set(first) <= set(tapes_of(engine).recorded)


def test_sampling_reads_logits_of_a_tape(llama: tuple[str, list[list[int]]]) -> None:
    """Random rows, penalties and log probabilities edit the logits that the tape writes anew."""
    path, _ = llama
    params = {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.3, "sampling_seed": 11}
    outputs = []
    for off in (False, True):
        with tower(path, disable_cuda_graph=off) as engine:
            for number, prompt in enumerate(PROMPTS[:4]):
                engine.send(f"r{number}", prompt, **(params if number % 2 else {}))
            engine.run()
            outputs.append([engine.output(f"r{number}") for number in range(4)])
    assert outputs[0] == outputs[1]


def test_what_no_step_may_bring(
    llama: tuple[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and slots are looked at before native code reads by them."""
    path, _ = llama
    seen: list[ForwardBatch] = []
    compute = DecodeTapes.compute

    def keep(
        self: DecodeTapes, batch: ForwardBatch, before: Callable[[], None]
    ) -> StepLogits | None:
        seen.append(batch)
        return compute(self, batch, before)

    monkeypatch.setattr(DecodeTapes, "compute", keep)
    with tower(path) as engine:
        engine.send("r", PROMPTS[1])
        engine.run()
        batch = seen[-1]
        assert batch.num_tokens == 1
        tapes = tapes_of(engine)
        token = batch.input_ids.clone()
        batch.input_ids[:] = 10_000
        with pytest.raises(InvariantError, match="is not below"):
            compute(tapes, batch)
        batch.input_ids[:] = token
        slot = batch.out_cache_loc[0].clone()
        batch.out_cache_loc[0][:] = 1 << 50
        with pytest.raises(InvariantError, match="slots outside"):
            compute(tapes, batch)
        batch.out_cache_loc[0][:] = slot
        batch.geometry.extend_prefix_lens[:] = 1 << 20
        with pytest.raises(ValueError, match="outside its block table"):
            compute(tapes, batch)


def test_a_full_arena_is_no_error(
    llama: tuple[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = llama
    monkeypatch.setattr(decode_tapes, "_ARENA_BYTES", 4096)
    with tower(path) as engine:
        assert answer_all(engine) == expected
        assert StepShape(6, 6, 6) in tapes_of(engine).refused


def test_threads_that_compute(llama: tuple[str, list[list[int]]]) -> None:
    assert compute_threads(3, 8) == 3
    assert compute_threads(None, 1) == 1
    assert compute_threads(None, 1 << 20) == usable_cores()
    path, expected = llama
    before = torch.get_num_threads()
    try:
        with tower(path, cpu_threads=3) as engine:
            found = engine.parts.worker._thread.submit(torch.get_num_threads).result()
            assert found == 3
            assert answer_all(engine)[0] == expected[0]
    finally:
        torch.set_num_threads(before)


def test_only_whole_decode_steps_are_taken(llama: tuple[str, list[list[int]]]) -> None:
    """A decode beside a prompt's chunk is not for a tape, the steps after it are."""
    path, expected = llama
    with tower(path, chunked_prefill_size=16, page_size=16) as engine:
        engine.send("a", PROMPTS[1])
        for _ in range(8):
            engine.scheduler.turn()
        engine.send("b", PROMPTS[2])
        engine.run()
        assert engine.output("a") == expected[1]
        assert engine.output("b") == expected[2]
        assert tapes_of(engine).recorded == (1, 2)


@pytest.mark.parametrize("family", list(MIXTURES))
def test_mixtures_that_stay_quantised(family: str, tmp_path: Path) -> None:
    """The same tokens with tapes and without, and codes in memory either way."""
    path = tmp_path / "m.gguf"
    quant = gguf.GGMLQuantizationType.Q8_0
    write_gguf(path, make_hf_model(family, **MIXTURES[family]), quant, metadata=yarn(family))
    answers = []
    for off in (False, True):
        with tower(str(path), disable_cuda_graph=off) as engine:
            answers.append(answer_all(engine))
            runner = engine.parts.worker._runner
            assert all(one.gate is not None for one in experts_of(runner.model))
            assert off or tapes_of(engine).recorded == (1, 2, 3, 4, 5, 6)
    assert answers[0] == answers[1]
    assert len({tuple(tokens) for tokens in answers[0]}) == len(PROMPTS)
