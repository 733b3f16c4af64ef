"""Pooled models on the whole device tower: transformers' vectors, whatever memory and chunks do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sglang.srt.managers.io_struct import (
    AbortReq,
    PoolingMode,
    PoolingSpec,
    TokenizedGenerateReqInput,
    TokenOut,
    int32_buffer,
)
from sglang.srt.managers.pooling_worker import PoolingWorker
from sglang.srt.sampling.sampling_params import SamplingParams
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_tokens import PROMPTS, DeviceTower, tower
from srt.models.hf_models import make_hf_model, save
from srt.models.pooled_models import (
    hidden_states,
    make_classifier,
    save_decoder,
    write_pooling,
)

Vector = npt.NDArray[np.float32]
SWITCHES = {"last": "pooling_mode_lasttoken", "mean": "pooling_mode_mean_tokens"}
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def pool(hidden: torch.Tensor, mode: str) -> Vector:
    chosen = hidden.mean(0) if mode == "mean" else hidden[-1]
    return chosen.numpy()


def ask(
    engine: DeviceTower,
    rid: str,
    prompt: list[int],
    mode: PoolingMode,
    *,
    whole: bool = False,
    second_from: int = 0,
    **more: Any,
) -> None:
    if engine.rank:
        return
    engine.channel.inbox.append(
        TokenizedGenerateReqInput(
            rid=rid,
            input_ids=memoryview(int32_buffer(prompt)),
            sampling_params=SamplingParams(max_new_tokens=0),
            pooling=PoolingSpec(mode, whole, second_from),
            **more,
        )
    )


def final(engine: DeviceTower, rid: str) -> TokenOut:
    (out,) = (out for out in engine.channel.outs if out.rid == rid)
    return out


def vector(engine: DeviceTower, rid: str) -> Vector:
    out = final(engine, rid)
    assert out.pooled is not None
    assert out.finish_reason is not None
    assert (out.finish_reason.type, out.output_ids) == ("length", b"")
    return np.frombuffer(out.pooled, "<f4")


def answer_all(engine: DeviceTower, mode: PoolingMode) -> list[Vector]:
    for number, prompt in enumerate(PROMPTS):
        ask(engine, f"r{number}", prompt, mode)
    engine.run()
    return [vector(engine, f"r{number}") for number in range(len(PROMPTS))]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Callable[[str], str], list[torch.Tensor]]:
    """Gives a directory by its pooling mode, and transformers' hidden states of each prompt."""
    changes = {"sliding_window": 50} if request.param == "mistral" else {}
    reference = make_hf_model(request.param, **changes)
    folder: Path = tmp_path_factory.mktemp(request.param)
    path = save_decoder(reference, folder)

    def directory(mode: str) -> str:
        write_pooling(folder, SWITCHES[mode])
        return path

    return directory, [hidden_states(reference, prompt) for prompt in PROMPTS]


FLAGS: list[dict[str, Any]] = [
    {},
    {"page_size": 16, "kv_segment_size": 64, "chunked_prefill_size": 32},
    {"page_size": 1, "chunked_prefill_size": 24, "disable_overlap_schedule": True},
    {"disable_radix_cache": True, "max_running_requests": 2},
    {"kv_canary": "full", "page_size": 16, "chunked_prefill_size": 32},
]


@pytest.mark.parametrize("mode", ["last", "mean"])
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: ",".join(flags) or "plain")
def test_vectors_equal_transformers(
    model: tuple[Callable[[str], str], list[torch.Tensor]],
    mode: PoolingMode,
    flags: dict[str, Any],
) -> None:
    directory, hidden = model
    with tower(directory(mode), **flags) as engine:
        for got, states in zip(answer_all(engine, mode), hidden, strict=True):
            np.testing.assert_allclose(got, pool(states, mode), **TOLERANCE)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[torch.Tensor]]:
    """A causal checkpoint with a head that nobody needs."""
    reference = make_hf_model("llama")
    path = save(reference, tmp_path_factory.mktemp("causal"))
    return path, [hidden_states(reference, prompt) for prompt in PROMPTS]


def test_a_hit_gives_the_same_last_token(llama: tuple[str, list[torch.Tensor]]) -> None:
    path, hidden = llama
    with tower(path, is_embedding=True, page_size=16) as engine:
        first = answer_all(engine, "last")
        engine.channel.outs.clear()
        again = answer_all(engine, "last")
        cached = [final(engine, f"r{n}").cached_tokens for n in range(len(PROMPTS))]
        assert cached == [0, 16, 128, 70, 70, 96]
        for one, two, states in zip(first, again, hidden, strict=True):
            np.testing.assert_allclose(one, pool(states, "last"), **TOLERANCE)
            np.testing.assert_allclose(two, one, **TOLERANCE)


def test_a_mean_takes_no_prefix_and_leaves_none(llama: tuple[str, list[torch.Tensor]]) -> None:
    path, hidden = llama
    write_pooling(Path(path), SWITCHES["mean"])
    try:
        with tower(path, is_embedding=True, page_size=16) as engine:
            for _ in range(2):
                engine.channel.outs.clear()
                found = answer_all(engine, "mean")
                assert {out.cached_tokens for out in engine.channel.outs} == {0}
                for got, states in zip(found, hidden, strict=True):
                    np.testing.assert_allclose(got, pool(states, "mean"), **TOLERANCE)
            pages = engine.memory.memory_object()["pages"]
            assert isinstance(pages, dict)
            assert (pages["used"], pages["cached"]) == (0, 0)
    finally:
        (Path(path) / "modules.json").unlink()


def test_the_head_that_writes_takes_no_memory(llama: tuple[str, list[torch.Tensor]]) -> None:
    path, _ = llama
    with tower(path, is_embedding=True) as engine:
        worker = engine.parts.worker
        assert isinstance(worker, PoolingWorker)
        names = [name for name, _ in worker._model.named_parameters()]
        assert not [name for name in names if "lm_head" in name]


def test_batch_equals_single(llama: tuple[str, list[torch.Tensor]]) -> None:
    path, _ = llama
    with tower(path, is_embedding=True, disable_radix_cache=True) as engine:
        together = answer_all(engine, "last")
        engine.channel.outs.clear()
        for number, prompt in enumerate(PROMPTS):
            ask(engine, f"r{number}", prompt, "last")
            engine.run()
            np.testing.assert_allclose(vector(engine, f"r{number}"), together[number], **TOLERANCE)


@pytest.mark.parametrize("mode", ["last", "mean"])
def test_a_retracted_prompt_is_pooled_once(
    llama: tuple[str, list[torch.Tensor]], mode: PoolingMode
) -> None:
    path, hidden = llama
    write_pooling(Path(path), SWITCHES[mode])
    flags = {"page_size": 16, "kv_segment_size": 64, "chunked_prefill_size": 32}
    try:
        with tower(path, is_embedding=True, disable_overlap_schedule=True, **flags) as engine:
            ask(engine, "r2", PROMPTS[2], mode)
            engine.scheduler.turn()
            engine.scheduler.turn()
            assert engine.scheduler.retract_one()
            engine.run()
            out = final(engine, "r2")
            assert out.num_retractions == 1
            got = vector(engine, "r2")
            np.testing.assert_allclose(got, pool(hidden[2], mode), **TOLERANCE)
    finally:
        (Path(path) / "modules.json").unlink()


def test_an_abort_in_mid_prompt_gives_no_vector(llama: tuple[str, list[torch.Tensor]]) -> None:
    path, _ = llama
    with tower(path, is_embedding=True, page_size=16, chunked_prefill_size=16) as engine:
        ask(engine, "r2", PROMPTS[2], "last")
        engine.scheduler.turn()
        engine.channel.inbox.append(AbortReq("r2"))
        engine.run()
        out = final(engine, "r2")
        assert out.pooled is None
        assert out.finish_reason is not None
        assert out.finish_reason.type == "abort"


def test_urgent_prompts_come_first(llama: tuple[str, list[torch.Tensor]]) -> None:
    path, _ = llama
    flags = {"enable_priority_scheduling": True, "max_running_requests": 1}
    with tower(path, is_embedding=True, **flags) as engine:
        for number in range(3):
            ask(engine, f"r{number}", PROMPTS[number], "last", priority=number)
        engine.run()
        assert [out.rid for out in engine.channel.outs] == ["r2", "r1", "r0"]


def test_two_ranks_have_the_same_vectors(llama: tuple[str, list[torch.Tensor]]) -> None:
    path, hidden = llama
    with rank_towers(2, path, is_embedding=True, page_size=16, chunked_prefill_size=32) as towers:

        def program(engine: DeviceTower) -> list[list[float]]:
            return [one.tolist() for one in answer_all_here(engine)]

        def answer_all_here(engine: DeviceTower) -> list[Vector]:
            for number, prompt in enumerate(PROMPTS):
                ask(engine, f"r{number}", prompt, "last")
            engine.run()
            return [vector(engine, f"r{number}") for number in range(len(PROMPTS))]

        for got, states in zip(towers.run(program), hidden, strict=True):
            np.testing.assert_allclose(got, pool(states, "last"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "num_labels"), [("llama", 1), ("qwen2", 3), ("qwen3", 2)])
def test_a_classifier_gives_transformers_logits(
    family: str, num_labels: int, tmp_path: Path
) -> None:
    reference = make_classifier(family, num_labels)
    path = save(reference, tmp_path)
    with torch.inference_mode():
        wanted = [reference(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS]
    with tower(path, page_size=16, chunked_prefill_size=32) as engine:
        for got, logits in zip(answer_all(engine, "last"), wanted, strict=True):
            assert got.shape == (num_labels,)
            np.testing.assert_allclose(got, logits, **TOLERANCE)


def test_bf16_stays_close(llama: tuple[str, list[torch.Tensor]]) -> None:
    path, hidden = llama
    with tower(path, is_embedding=True, dtype="bfloat16", chunked_prefill_size=32) as engine:
        for got, states in zip(answer_all(engine, "last"), hidden, strict=True):
            want = pool(states, "last")
            cosine = got @ want / np.linalg.norm(got) / np.linalg.norm(want)
            assert cosine > 0.999


def test_adapters_of_a_pooled_model_are_refused(tmp_path: Path) -> None:
    path = save(make_hf_model("llama"), tmp_path)
    flags = {"is_embedding": True, "enable_lora": True, "max_lora_rank": 4}
    with pytest.raises(ValueError, match="adapters are served of models that generate only"):
        DeviceTower(path, **flags, lora_target_modules=["q_proj"])
