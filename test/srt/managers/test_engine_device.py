"""The whole tower on a device that runs behind the host, a stand-in: transformers' tokens.

Inputs, the relay and the sampled tokens stay on the "device", results come late, and decode steps
are recorded as operations on tensors and made again. What only hardware can tell is not shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang.srt.layers.attention import (
    flashinfer_backend,
    registry,
    torch_device_backend,
    triton_backend,
)
from sglang.srt.managers.io_struct import (
    LogprobArrays,
    PoolingMode,
    TokenizedGenerateReqInput,
    int32_buffer,
)
from sglang.srt.model_executor.cuda_graph_runner import CudaGraphRunner
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.native import triton_kernels
from sglang.srt.utils.sizes import format_bytes
from srt.layers.attention.fake_flashinfer import FakeWrappers
from srt.managers.test_engine_lora import NEW_TOKENS as NEW_ADAPTED
from srt.managers.test_engine_lora import Adapters
from srt.managers.test_engine_lora import answer_all as answer_adapted
from srt.managers.test_engine_lora import send as send_adapted
from srt.managers.test_engine_pooling import SWITCHES, TOLERANCE, pool
from srt.managers.test_engine_pooling import answer_all as pool_all
from srt.managers.test_engine_tokens import NEW_TOKENS, PROMPTS, DeviceTower, answer_all, tower
from srt.model_loader.test_kv_scales import add_tensors
from srt.models.hf_models import VOCAB, best_next, hf_greedy, make_hf_model, save
from srt.models.pooled_models import hidden_states, write_pooling
from srt.utils.fake_device import LateRuntime

FAMILIES = ("llama", "qwen3", "mistral", "gemma3", "llama4", "deepseek_v3", "cohere2", "olmo3")
SPARSE = ("deepseek_v32", "glm_moe_dsa")


@pytest.fixture(autouse=True)
def no_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device computes with tensor operations, which alone can be recorded."""
    for module in ("utils.native", "mem_cache.memory_pool"):
        monkeypatch.setattr(f"sglang.srt.{module}.native_kernels", lambda: None)
    # A recorded step reads as much for every row, and the recorder keeps all that it makes.
    monkeypatch.setattr(torch_device_backend, "RECORDED_TOKENS", 256)


@contextmanager
def late_tower(
    path: str, *, repeats_calls: bool = False, **flags: object
) -> Iterator[tuple[DeviceTower, LateRuntime]]:
    runtime = LateRuntime(repeats_calls=repeats_calls)
    values = {
        "device": "cuda",
        "attention_backend": "torch_native",
        "cuda_graph_max_bs": 6,
        "kv_segment_size": 256,
        **flags,
    }
    with tower(path, runtime=runtime, **values) as engine:
        yield engine, runtime


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    reference = make_hf_model("llama")
    expected = [hf_greedy(reference, prompt, NEW_TOKENS) for prompt in PROMPTS]
    return save(reference, tmp_path_factory.mktemp("llama")), expected


def graphs_of(engine: DeviceTower) -> CudaGraphRunner:
    graphs = engine.parts.worker.runner.tapes
    assert isinstance(graphs, CudaGraphRunner)
    return graphs


def test_tokens_with_graphs_and_without(llama: tuple[str, list[list[int]]]) -> None:
    path, expected = llama
    for flags in ({}, {"disable_cuda_graph": True}, {"cuda_graph_max_bs": 2}):
        with late_tower(path, **flags) as (engine, runtime):
            assert answer_all(engine) == expected
            assert runtime.num_waits == runtime.num_fetches
            if "disable_cuda_graph" in flags:
                assert engine.parts.worker.runner.tapes is None
                continue
            graphs = graphs_of(engine)
            wanted = (1, 2) if "cuda_graph_max_bs" in flags else (1, 2, 4, 6)
            assert graphs.recorded == wanted
            assert graphs.num_replays > 0
            assert engine.parts.ready.details["attention_backend"] == "torch_native"


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    # Experts look at how many tokens each has: DeepSeek's attention is recorded without them.
    changes = {"mistral": {"sliding_window": 50}, "deepseek_v3": {"first_k_dense_replace": 3}}
    reference = make_hf_model(family, **changes.get(family, {}))
    with late_tower(save(reference, tmp_path)) as (engine, _):
        answers = answer_all(engine)
        assert [len(one) for one in answers] == [NEW_TOKENS] * len(PROMPTS)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer == best_next(reference, prompt, answer)
        if family != "llama4":
            assert graphs_of(engine).num_replays > 0


def test_states_are_computed_call_by_call(tmp_path: Path) -> None:
    """No step is recorded; the second round begins from states in the cache."""
    reference = make_hf_model("qwen3_5")
    expected = [hf_greedy(reference, prompt, NEW_TOKENS) for prompt in PROMPTS]
    flags: dict[str, Any] = {"page_size": 8, "chunked_prefill_size": 37}
    with late_tower(save(reference, tmp_path), **flags) as (engine, _):
        assert engine.parts.worker.runner.tapes is None
        assert answer_all(engine) == expected
        engine.channel.outs.clear()
        assert answer_all(engine) == expected
        cached = {out.rid: out.cached_tokens for out in engine.channel.outs}
        assert cached["r2"] == 128


@pytest.mark.parametrize("family", SPARSE)
def test_tokens_that_are_chosen_on_the_device(family: str, tmp_path: Path) -> None:
    reference = make_hf_model(family)
    with late_tower(save(reference, tmp_path)) as (engine, runtime):
        answers = answer_all(engine)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer == best_next(reference, prompt, answer)
        assert runtime.num_waits == runtime.num_fetches
        assert engine.parts.worker.runner.tapes is None


def test_a_model_that_waits_is_computed_call_by_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = make_hf_model("qwen3_moe")
    path = save(reference, tmp_path)
    with caplog.at_level("WARNING"), late_tower(path) as (engine, _):
        assert graphs_of(engine).recorded == ()
        assert answer_all(engine) == [hf_greedy(reference, one, NEW_TOKENS) for one in PROMPTS]
    assert "Decode steps are not recorded as graphs: operation not permitted" in caplog.text


@pytest.mark.parametrize("flags", [{}, {"disable_cuda_graph": True}, {"cuda_graph_max_bs": 2}])
def test_adapters_with_graphs_and_without(tmp_path: Path, flags: dict[str, Any]) -> None:
    """Steps with adapters have graphs of their own; mixed rows, idle places, padding rows."""
    model = Adapters(tmp_path)
    lora = {"lora_paths": model.refs, "max_loras_per_batch": 3}
    with late_tower(model.path, **lora, **flags) as (engine, runtime):
        assert answer_adapted(engine) == model.expected
        assert runtime.num_waits == runtime.num_fetches
        if "disable_cuda_graph" not in flags:
            graphs = graphs_of(engine)
            assert {adapted for _, adapted in graphs._graphs} == {False, True}
            assert graphs.num_replays > 0
            before = graphs.num_replays
            for rid, adapter in (("a", 1), ("b", 0)):
                send_adapted(engine, rid, PROMPTS[1], adapter)
                engine.run()
                assert graphs.num_replays == before + NEW_ADAPTED - 1
                before = graphs.num_replays
                want = hf_greedy(model.models[adapter], PROMPTS[1], NEW_ADAPTED)
                assert engine.output(rid) == want


def test_retraction_growth_and_chunks(
    llama: tuple[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments are mapped while graphs replay, requests leave and come back, tokens stay."""
    path, expected = llama
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    flags = {"page_size": 16, "kv_segment_size": 64, "max_total_tokens": 384}
    with late_tower(path, chunked_prefill_size=48, **flags) as (engine, _):
        assert answer_all(engine) == expected
        assert engine.scheduler.counters.num_retractions > 0
        assert graphs_of(engine).num_replays > 0


@pytest.mark.parametrize("mode", ["last", "mean"])
def test_vectors_come_late(mode: PoolingMode, tmp_path: Path) -> None:
    reference = make_hf_model("llama")
    path = save(reference, tmp_path)
    write_pooling(tmp_path, SWITCHES[mode])
    flags = {"is_embedding": True, "page_size": 16, "chunked_prefill_size": 48}
    with late_tower(path, **flags) as (engine, _):
        for prompt, found in zip(PROMPTS, pool_all(engine, mode), strict=True):
            want = pool(hidden_states(reference, prompt), mode)
            np.testing.assert_allclose(found, want, **TOLERANCE)


class CountingRuntime(LateRuntime):
    """Counts the steps that were launched as well; where nothing is recorded, as it is here."""

    num_launched = 0

    @contextmanager
    def computing(self) -> Iterator[None]:
        with super().computing():
            yield
        self.num_launched += 1


# Everything that a host knows how to edit logits by, and nothing of it.
ASKED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"frequency_penalty": 0.3, "presence_penalty": -0.2},
    {},
    {"temperature": 0.0, "logit_bias": {3: 2.0, 5: -4.0}, "frequency_penalty": 1.5},
    {"min_new_tokens": 40, "stop_token_ids": tuple(range(60)), "repetition_penalty": 0.9},
    {"temperature": 0.0, "presence_penalty": 1.0},
)


def numbers_of(found: Iterable[LogprobArrays | None]) -> list[np.ndarray]:
    """Own, largest and named log probabilities, one after another."""
    told = [one for one in found if one is not None]
    return [
        np.frombuffer(b"".join(getattr(one, name) for one in told), "<f4")
        for name in ("logprobs", "top_logprobs", "picked_logprobs")
    ]


@pytest.mark.parametrize(
    "memory", [{}, {"page_size": 16, "kv_segment_size": 64, "max_total_tokens": 384}]
)
def test_sampling_and_log_probabilities_are_those_of_the_host(
    llama: tuple[str, list[list[int]]],
    memory: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step n + 1 is launched before the host knows the tokens of n, which its penalties count."""
    path, _ = llama
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    # Tokens whose probabilities differ by less than what sums round stand in either order, and the
    # two may round apart. This seed draws none of them.
    params = {"temperature": 0.8, "top_p": 0.9, "sampling_seed": 12, "max_new_tokens": NEW_TOKENS}
    outputs, numbers = [], []
    prompts: dict[str, list[str]] = {}
    late = CountingRuntime()
    for runtime in (None, late):
        device = "cpu" if runtime is None else "cuda"
        flags = {"attention_backend": "torch_native", "disable_cuda_graph": True, **memory}
        with tower(path, runtime=runtime, device=device, **flags) as engine:
            for number, prompt in enumerate(PROMPTS):
                engine.channel.inbox.append(
                    TokenizedGenerateReqInput(
                        rid=f"r{number}",
                        input_ids=memoryview(int32_buffer(prompt)),
                        sampling_params=SamplingParams(**{**params, **ASKED[number]}),
                        return_logprob=number % 2 == 1,
                        logprob_start_len=len(prompt) - (0 if number < 3 else 7 * number - 8),
                        top_logprobs_num=number,
                        token_ids_logprob=int32_buffer([7, 1]) if number == 3 else b"",
                    )
                )
            engine.run()
            outputs.append([engine.output(f"r{number}") for number in range(len(PROMPTS))])
            outs = [out for out in engine.channel.outs if out.rid == "r3"]
            numbers.append(
                [
                    *numbers_of(out.output_logprobs for out in outs),
                    *numbers_of(out.input_logprobs for out in outs),
                ]
            )
            prompts[device] = [out.rid for out in engine.channel.outs if out.input_logprobs]
            assert bool(engine.scheduler.counters.num_retractions) == bool(memory)
    assert outputs[0] == outputs[1]
    assert prompts["cpu"] == prompts["cuda"]
    assert {"r3", "r5"} <= set(prompts["cpu"])
    rows = [NEW_TOKENS] * 3 + [len(numbers[0][3])] * 3
    for host, device_ones, count, num in zip(*numbers, (1, 3, 2) * 2, rows, strict=True):
        assert len(host) == count * num > 0
        np.testing.assert_allclose(device_ones, host, atol=1e-4)
    # A step waits for its own end, and then reads what came of prompts before.
    assert late.num_fetches == late.num_waits
    assert late.num_launched < late.num_fetches <= late.num_launched + 2 * len(prompts["cuda"])


@pytest.mark.skipif(triton_kernels() is None, reason="Triton is not installed")
def test_recorded_steps_of_triton_attention(
    llama: tuple[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans with fixed room, renewed in place, padded rows included; in Triton's interpreter."""
    path, expected = llama
    kernels = triton_kernels()
    assert kernels is not None
    turn, turned = kernels.rotate_and_store, []

    def rotate_and_store(q: torch.Tensor, *args: object, **more: object) -> object:
        turned.append(len(q))
        return turn(q, *args, **more)

    monkeypatch.setattr(kernels, "rotate_and_store", rotate_and_store)
    flags = {"attention_backend": "triton", "cuda_graph_max_bs": 3}
    monkeypatch.setattr(triton_backend, "_INTERPRETED_PROGRAMS", 2)  # less padding, not none
    with late_tower(path, repeats_calls=True, **flags) as (engine, _):
        wanted = {"a": (1, 6), "b": (0, 5), "c": (0, 4)}
        for rid, (number, count) in wanted.items():
            engine.send(rid, PROMPTS[number], max_new_tokens=count)
        engine.run()
        for rid, (number, count) in wanted.items():
            assert engine.output(rid) == expected[number][:count]
        assert graphs_of(engine).recorded == (1, 2, 3)
        assert graphs_of(engine).num_replays > 3
        assert {1, 2, 3} <= set(turned)


@pytest.mark.skipif(triton_kernels() is None, reason="Triton is not installed")
def test_recorded_steps_over_a_scaled_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer's launches keep its own scales."""
    monkeypatch.setattr(triton_backend, "_INTERPRETED_PROGRAMS", 2)  # less padding, not none
    hf = make_hf_model("llama", num_hidden_layers=2)
    path = save(hf, tmp_path)
    for layer in range(hf.config.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn"
        scales = {"k_scale": 0.03 * (layer + 1), "v_scale": 5.0 * (layer + 1)}
        add_tensors(path, {f"{name}.{key}": torch.tensor(x) for key, x in scales.items()})
    flags = {"attention_backend": "triton", "kv_cache_dtype": "fp8_e4m3", "cuda_graph_max_bs": 2}
    answers = []
    for disabled in (True, False):
        kept = {"repeats_calls": True, "disable_cuda_graph": disabled, **flags}
        with late_tower(path, **kept) as (engine, _):
            for rid, number in (("a", 1), ("b", 0)):
                engine.send(rid, PROMPTS[number], max_new_tokens=5)
            engine.run()
            answers.append([engine.output(rid) for rid in "ab"])
            assert disabled or graphs_of(engine).num_replays > 3
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("running", "counted"), [(None, 6), (4, 4), (9, 6)])
def test_counts_for_penalties_come_off_the_budget(
    llama: tuple[str, list[list[int]]],
    caplog: pytest.LogCaptureFixture,
    running: int | None,
    counted: int,
) -> None:
    path, _ = llama
    flags = {"max_running_requests": running, "cuda_graph_max_bs": 6, "disable_cuda_graph": True}
    with caplog.at_level("INFO"), late_tower(path, **flags):
        pass
    (line,) = [one for one in caplog.messages if one.startswith("device memory")]
    assert f" + counts for penalties {format_bytes(4 * VOCAB * counted)} + " in line


def test_recorded_steps_of_flashinfer(
    llama: tuple[str, list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Stand-ins for its wrappers, strict in what its documentation says of graphs."""
    path, _ = llama
    monkeypatch.setattr(registry, "has_flashinfer", lambda: True)
    monkeypatch.setattr(flashinfer_backend, "FlashInferWrappers", FakeWrappers)
    monkeypatch.setattr(flashinfer_backend, "RECORDED_PAGES", 12)
    flags = {"attention_backend": "flashinfer", "dtype": "float16", "cuda_graph_max_bs": 3}
    answers = []
    for disabled in (True, False):
        caplog.clear()
        tower_of = late_tower(path, disable_cuda_graph=disabled, **flags)
        with caplog.at_level("INFO"), tower_of as (engine, _):
            wanted = {"a": (1, 9), "b": (0, 8), "c": (3, 5), "d": (2, 30)}
            for rid, (number, count) in wanted.items():
                engine.send(rid, PROMPTS[number], max_new_tokens=count)
            engine.run()
            answers.append([engine.output(rid) for rid in wanted])
            assert [len(one) for one in answers[-1]] == [count for _, count in wanted.values()]
            taken = flashinfer_backend.FlashInferAttnBackend.device_bytes((1, 2, 3), 1)
            assert (f" + attention backend {format_bytes(taken)} + " in caplog.text) != disabled
            if not disabled:
                assert graphs_of(engine).recorded == (1, 2, 3)
                assert graphs_of(engine).num_replays > 20
    assert answers[0] == answers[1]
