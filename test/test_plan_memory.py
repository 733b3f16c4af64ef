"""What models need on published devices: exact numbers, from configs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang.plan_memory import load_config, main
from sglang.planner.known_models import KNOWN_MODELS
from sglang.planner.machines import DEVICES
from sglang.planner.memory_plan import MemoryPlan, Question, count_weights, make_plan
from sglang.srt.configs.families import FAMILIES
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState


def plan_of(name: str, **changes: Any) -> MemoryPlan:
    config = load_config(name)
    asked = {
        "config": config,
        "device": DEVICES["h200"],
        "tp_size": 8,
        "context_length": 10_000_000,
        "kv_dtype": "bfloat16",
        "dtype": "bfloat16",
        **changes,
    }
    return make_plan(Question(**asked))


def test_scout_at_ten_million_tokens_on_eight_devices() -> None:
    plan = plan_of("llama-4-scout")
    full, chunked = plan.groups
    assert plan.bytes_per_token_all_layers == 196_608
    assert (full.kind, full.num_layers, 8 * full.bytes_per_token) == ("full", 12, 49_152)
    assert (chunked.kind, chunked.num_layers, chunked.span) == ("chunked", 36, 8192)
    assert (full.kept_tokens, chunked.kept_tokens) == (10_000_000, 8192)
    assert plan.kv_bytes == 10_000_000 * 6144 + 8192 * 18_432
    assert round(plan.kv_bytes / 1e9, 1) == 61.6
    assert chunked.peak_tokens == 2 * 8192 + 64
    assert plan.kv_bytes < plan.needed_bytes < 1.02 * plan.kv_bytes
    assert plan.fits


def test_the_dense_table_of_scouts_own_context_is_eighty_gib() -> None:
    plan = plan_of(
        "llama-4-scout", context_length=load_config("llama-4-scout").max_position_embeddings
    )
    assert plan.dense_table_bytes == 80 << 30


def test_fp8_halves_what_is_kept() -> None:
    assert (
        2 * plan_of("llama-4-scout", kv_dtype="fp8_e4m3").kv_bytes
        == plan_of("llama-4-scout").kv_bytes
    )


def test_parameters_are_those_of_the_model() -> None:
    config = load_config("llama-3.1-8b")
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    embedding = 128256 * 4096
    weights = count_weights(config, ParallelState(), "bfloat16")
    assert weights.num_params == 32 * layer + 2 * embedding + 4096
    assert weights.num_active == weights.num_params - embedding
    assert weights.all_bytes == 2 * weights.num_params


def test_experts_that_a_token_does_not_choose_are_not_active() -> None:
    weights = count_weights(load_config("llama-4-scout"), ParallelState(), "bfloat16")
    experts = 48 * 16 * 3 * 5120 * 8192
    embedding = 202048 * 5120
    assert weights.num_params - weights.num_active == experts * 15 // 16 + embedding


def test_work_and_bytes_bound_the_times() -> None:
    plan = plan_of("llama-3.1-8b", tp_size=1, context_length=1000)
    head, keys = 128256 * 4096, 32 * 1000 * 1001 // 2
    flops = 2 * (plan.weights.num_active - head) * 1000 + 4 * 32 * 128 * keys
    assert plan.prefill_flops == flops
    assert plan.prefill_s == pytest.approx(flops / 989.5e12)
    assert plan.decode_s == pytest.approx((plan.weights.active_bytes + plan.kv_bytes) / 4.8e12)


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_every_known_model_is_of_a_family_that_is_computed(name: str) -> None:
    assert KNOWN_MODELS[name]["architectures"][0] in FAMILIES
    too_large = name in ("llama-4-maverick", "deepseek-v3", "deepseek-v3.2", "glm-5")
    assert plan_of(name, tp_size=4, context_length=1000).fits is not too_large


def test_latents_are_whole_on_every_device(capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-V3: 61 layers of 512 + 64 numbers, whatever the number of heads and devices."""
    for ranks in (1, 8, 16):
        plan = plan_of("deepseek-v3", tp_size=ranks, context_length=100_000)
        (group,) = plan.groups
        assert plan.bytes_per_token_all_layers == group.bytes_per_token == 61 * 576 * 2 == 70_272
        assert plan.kv_bytes == 7_027_200_000
    assert plan_of("deepseek-v3", kv_dtype="fp8_e4m3").bytes_per_token_all_layers == 35_136
    assert plan_of("deepseek-v2-lite").bytes_per_token_all_layers == 27 * 576 * 2
    assert main(["--model-path", "deepseek-v3", "--tp-size", "16"]) == 0
    shown = capsys.readouterr().out
    assert "70,272 B in 61 layers that keep every token" in shown
    assert "latents of all heads: whole on each of 16 devices" in shown


def test_states_are_kept_whatever_the_length(capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen3-Next-80B: 36 of 48 layers keep states, two between steps and three at the peak."""
    state = 36 * (32 * 128 * 128 + 3 * 8192) * 4
    for tokens in (10_000, 1_000_000):
        plan = plan_of("qwen3-next-80b-a3b", tp_size=1, context_length=tokens)
        full, states = plan.groups
        assert (full.num_layers, full.bytes_per_token) == (12, 24_576)
        assert (states.kind, states.num_layers, states.state_bytes) == ("state", 36, state)
        assert plan.kv_bytes == tokens * 24_576 + 2 * state
        assert states.num_segments == 3
    assert plan.bytes_per_token_all_layers == 24_576
    halved = plan_of("qwen3-next-80b-a3b", tp_size=2, context_length=1000)
    assert halved.groups[1].state_bytes == state // 2
    assert abs(plan.weights.num_params / 1e9 - 79.7) < 0.1
    # A token meets the state of each layer, and the keys of few layers.
    far, near = (
        plan_of("qwen3-next-80b-a3b", tp_size=1, context_length=n).prefill_flops
        for n in (2000, 1000)
    )
    keys = 2 * 16 * 512 * 12 * (2000 * 2001 / 2 - 2 * 1000 * 1001 / 2)
    assert abs(far - 2 * near - keys) < 1e-9 * far
    assert main(["--model-path", "qwen3-next-80b-a3b"]) == 0
    shown = capsys.readouterr().out
    assert "79,036,416 B for 36 layers' state, whatever the length" in shown


def test_parameters_of_deepseek_v3() -> None:
    """671 billion, of which a token multiplies with 37 (arXiv 2412.19437)."""
    weights = count_weights(load_config("deepseek-v3"), ParallelState(), "bfloat16")
    assert round(weights.num_params / 1e9) == 671
    assert round(weights.num_active / 1e9) == 37


def test_work_and_bytes_where_tokens_are_chosen() -> None:
    """DeepSeek-V3.2: 2,048 tokens of each context are attended to, all are scored."""
    plans = {n: plan_of("deepseek-v3.2", tp_size=8, context_length=n) for n in (2048, 100_000)}
    dense = {n: plan_of("deepseek-v3", tp_size=8, context_length=n) for n in (2048, 100_000)}
    plan, n, k = plans[100_000], 100_000, 2048
    assert plan.bytes_per_token_all_layers == 61 * (576 + 128) * 2 == 85_888
    keys = 61 * (k * (k + 1) // 2 + (n - k) * k)
    scored = 61 * (n * (n + 1) - k * (k + 1)) // 2
    head = 129280 * 7168 // 8
    flops = 2 * (plan.weights.num_active - head) * n + 2 * 128 * (576 + 512) * keys / 8
    assert plan.prefill_flops == pytest.approx(flops + 2 * 64 * 128 * scored)
    read = 61 * 2 * (128 * n + 576 * k)
    assert plan.decode_s == pytest.approx((plan.weights.active_bytes + read) / 4.8e12)
    assert plan.prefill_flops < 0.6 * dense[100_000].prefill_flops
    # Without a choice the indexer's weights are all that a prompt costs more.
    more = 2 * 2048 * (plans[2048].weights.num_active - dense[2048].weights.num_active)
    assert plans[2048].prefill_flops - dense[2048].prefill_flops == pytest.approx(more)


def test_parameters_of_glm_5() -> None:
    """744 billion, of which a token multiplies with 40, says its model card: the head aside."""
    weights = count_weights(load_config("glm-5"), ParallelState(), "bfloat16")
    assert round(weights.num_params / 1e9) == 744
    assert round((weights.num_active - 154_880 * 6144) / 1e9) == 40


def test_json_names_what_would_make_it_fit(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model-path", "llama-4-scout", "--context-length", "10M", "--tp-size", "8"]
    assert main([*asked, "--gpu", "h100", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert not answer["fits"]
    remedies = answer["remedies"]
    smaller = str(remedies["capacity_tokens"])
    memory = str(remedies["device_memory_bytes"])
    for change in (
        ["--context-length", smaller, "--gpu", "h100"],
        ["--kv-cache-dtype", "fp8", "--gpu", "h100"],
        ["--gpu", "h100", "--gpu-memory", memory],
    ):
        assert main([*asked, *change, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["fits"], change
    assert (
        main([*asked, "--context-length", str(int(smaller) + 8192), "--gpu", "h100", "--json"]) == 0
    )
    assert not json.loads(capsys.readouterr().out)["fits"]


def test_more_devices_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model-path", "llama-3.1-8b-ultralong-4m", "--context-length", "4M", "--gpu", "h200"]
    assert main([*asked, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["fits"], answer["remedies"]["tp_size"]) == (False, 8)


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model-path", "llama-4-scout", "--context-length", "10M", "--tp-size", "8"]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  KV held           61.6 GB by a request of the whole context" in lines
    assert "fits                yes" in lines
    assert main(["--model-path", "llama-4-scout", "--gpu", "cpu", "--gpu-memory", "24GiB"]) == 0
    assert "prefill, at least   not known for this device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (["--model-path", "no-such-model"], "models known by name: llama-4-scout"),
        (["--model-path", "llama-4-scout", "--tp-size", "3"], "cannot be divided by tp_size 3"),
        (["--model-path", "llama-4-scout", "--tp-size", "0"], "--tp-size must be at least 1"),
        (["--model-path", "llama-3.1-8b", "--mem-fraction-static", "1.5"], "is not in (0, 1]"),
    ],
)
def test_an_impossible_question_is_one_line(
    asked: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(asked) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def quantised(folder: Path, base: dict[str, Any], scheme: dict[str, Any] | None) -> ModelConfig:
    text = json.dumps({**base, "quantization_config": scheme})
    (folder / "config.json").write_text(text)
    return ModelConfig.from_path(str(folder))


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 5.0),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8.5),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, 0.0),
        ({"quant_method": "awq", "bits": 4, "group_size": 16}, 0.0),
        ({"quant_method": "fp8"}, 8.0),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8.25),
        ({"quant_method": "fp8", "weight_block_size": [128, 40]}, 0.0),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "a": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 128}}
                },
            },
            5.0,
        ),
    ],
)
def test_matrices_that_stay_quantised(tmp_path: Path, scheme: dict[str, Any], bits: float) -> None:
    base = KNOWN_MODELS["llama-3.1-8b"]
    plain = count_weights(quantised(tmp_path, base, None), ParallelState(), "bfloat16")
    found = count_weights(quantised(tmp_path, base, scheme), ParallelState(), "bfloat16")
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)
    assert (plain.num_coded, plain.all_bytes) == (0, 2 * plain.num_params)
    assert found.code_bits == bits
    assert found.num_coded == found.active_coded == (32 * layer if bits else 0)
    saved = int(found.num_coded * (16 - bits) / 8)
    assert found.all_bytes == plain.all_bytes - saved
    assert found.active_bytes == plain.active_bytes - saved


def test_experts_of_gpt_oss_stay_quantised(tmp_path: Path) -> None:
    config = quantised(tmp_path, KNOWN_MODELS["gpt-oss-20b"], {"quant_method": "mxfp4"})
    found = count_weights(config, ParallelState(), "bfloat16")
    assert found.num_coded == 24 * 32 * 3 * 2880 * 2880
    assert found.active_coded == found.num_coded * 4 // 32
    assert found.code_bits == 4.5


def test_places_of_adapters_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Of q and down in 32 layers, rank 16, 4 places; B of q spans k and v too, which q is merged
    with."""
    asked = ["--model-path", "llama-3.1-8b", "--max-lora-rank", "16", "--max-loras-per-batch", "4"]
    asked += ["--lora-target-modules", "q_proj", "down_proj"]
    assert main([*asked, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    numbers = 4096 + (4096 + 2 * 1024) + 14336 + 4096
    places = 2 * 4 * 16 * 32 * numbers
    assert answer["weights"]["adapter_bytes"] == places
    plain = plan_of("llama-3.1-8b", tp_size=1, context_length=131072)
    assert answer["weights"]["all_bytes"] == plain.weights.all_bytes + places
    assert answer["budget_bytes"] == int(141e9 * 0.9) - answer["weights"]["all_bytes"]
    assert main(asked) == 0
    assert "  adapters          0.1 GB in their places" in capsys.readouterr().out.splitlines()
    assert main([*asked[:-1], "w_proj"]) == 2
    assert "no linear layer of the model is called w_proj" in capsys.readouterr().err
    assert main(["--model-path", "llama-3.1-8b", "--max-lora-rank", "0"]) == 2
    assert "--max-lora-rank must be at least 1" in capsys.readouterr().err


def test_a_vision_tower_is_counted_on_every_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two layers of width 32 (transformers' tower), whole on both ranks, idle for text."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    }
    raw = {**KNOWN_MODELS["llama-4-scout"], "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    asked = ["--model-path", str(tmp_path), "--tp-size", "2", "--context-length", "1000"]
    assert main([*asked, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["weights"]
    assert main([*asked, "--enable-multimodal", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)["weights"]
    assert (plain["num_vision"], seen["num_active"]) == (0, plain["num_active"])
    assert seen["num_vision"] == seen["num_params"] - plain["num_params"] > 5120 * 64
    assert seen["all_bytes"] == plain["all_bytes"] + 2 * seen["num_vision"]
    assert main([*asked, "--enable-multimodal"]) == 0
    assert "of it for the vision tower, whole on each device" in capsys.readouterr().out


def test_a_directory_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS["llama-3.1-8b"]))
    assert main(["--model-path", str(tmp_path), "--context-length", "100k", "--json"]) == 0
    here = json.loads(capsys.readouterr().out)
    assert main(["--model-path", "llama-3.1-8b", "--context-length", "100k", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == here
