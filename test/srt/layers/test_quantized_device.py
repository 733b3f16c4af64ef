"""Weights that stay quantised on a GPU: loaded, cut, multiplied; kernels are interpreted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers import moe
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.moe import ExpertLayout, Experts, Routing
from sglang.srt.layers.quantization import choice
from sglang.srt.layers.quantization.matrix import QuantizedMatrix, QuantizedWeight
from sglang.srt.layers.quantization.rounding import rounding_to
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.layers.weights import WeightOwner, deferred_parameter, give_memory
from sglang.srt.model_loader import loader
from sglang.srt.model_loader.huge_pages import quantized_matrices
from sglang.srt.model_loader.loader import fill_with_dummy_weights
from sglang.srt.utils.native import native_kernels, triton_kernels
from srt.managers.test_engine_device import graphs_of, late_tower
from srt.managers.test_engine_tokens import PROMPTS, tower
from srt.model_loader.gguf_files import write_gguf
from srt.model_loader.test_fp8_checkpoints import published as fp8_checkpoint
from srt.model_loader.test_gguf_mixtures import FAMILIES, experts_of, load, logits
from srt.models.hf_models import make_hf_model
from srt.utils.fake_device import NoValues, OpRecorder

kernels = triton_kernels()
if kernels is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
KERNELS = kernels
TYPES = gguf.GGMLQuantizationType


@pytest.fixture(autouse=True)
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the host pass for a GPU's where layers and the loader ask for kernels."""
    for module in (choice, loader):
        monkeypatch.setattr(module, "codes_kernels", lambda device: KERNELS)
    monkeypatch.setattr(moe, "device_kernels_for", lambda *tensors: KERNELS)
    monkeypatch.setattr(moe, "kernels_for", lambda *tensors: None)


def four_bits(outs: int, width: int, seed: int = 0, gain: float = 1.0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (outs, width // 2), generator=generator).to(torch.uint8)
    scales = torch.rand(outs, width // 32, generator=generator).half() / 8
    found: QuantizedWeight = KERNELS.QuantizedWeight(codes, scales, -8 * scales, gain)
    return found


def eight_bits(outs: int, width: int, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (outs, width), generator=generator).to(torch.int8)
    scales = torch.rand(outs, width // 32, generator=generator).half() / 64
    found: QuantizedWeight = KERNELS.QuantizedWeight(codes, scales)
    return found


def close(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), want.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 70])
def test_parts_of_different_layouts_are_one_matrix(rows: int) -> None:
    parts = [four_bits(40, 96), four_bits(8, 96, 1), eight_bits(16, 96, 2)]
    wide = torch.cat([part.dequantize(torch.float32) for part in parts])
    matrix = QuantizedMatrix(parts)
    x, bias = torch.randn(rows, 96), torch.randn(64)
    close(matrix.product(x, bias), F.linear(x, wide, bias))
    close(matrix.product(x, bias[3:50], 3, 50), F.linear(x, wide[3:50], bias[3:50]))
    assert matrix.product(x[:0]).shape == (0, 64)
    ids = torch.tensor([[63, 0], [47, 48]])
    assert torch.equal(matrix.take(ids, torch.float32), wide[ids])


def test_layers_keep_codes_and_those_that_must_not_have_numbers() -> None:
    parts = {"q": four_bits(64, 64), "k": four_bits(32, 64), "v": eight_bits(32, 64)}
    x = torch.randn(3, 64)
    wide = torch.cat([part.dequantize(torch.float32) for part in parts.values()])
    layer = QKVParallelLinear(64, 16, 4, 2, parallel=ParallelState(), dtype=torch.float32)
    for name, part in parts.items():
        layer.weight_loader("weight", part, name)
    assert layer.quantized is not None
    close(layer(x), x @ wide.t())
    close(layer.queries(x), x @ wide[:64].t())
    parallel = ParallelState(tp_rank=1, tp_size=2)
    row = RowParallelLinear(128, 24, parallel=parallel, dtype=torch.float32)
    row.weight_loader("weight", four_bits(24, 128))
    whole = four_bits(24, 128).dequantize(torch.float32)
    close(row.product(x), x @ whole[:, 64:].t())
    head = ParallelLMHead(51, 64, parallel=parallel, dtype=torch.float32)
    head.weight_loader("weight", four_bits(51, 64))
    assert head.quantized is None, "its last row is none of the file's"
    assert torch.equal(head.weight[:25], four_bits(51, 64).dequantize(torch.float32)[26:])


def test_memory_comes_with_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a weight that may stay quantised has none before."""
    monkeypatch.setattr("torch.get_default_device", lambda: torch.device("cuda"))

    def backed(parameter: nn.Parameter) -> bool:
        return bool(parameter.untyped_storage().nbytes() >= parameter.nbytes)

    table = VocabParallelEmbedding(50, 64, parallel=ParallelState(), dtype=torch.float32)
    assert not backed(table.weight)
    assert table.weight.shape == (50, 64)
    give_memory(table.weight)
    assert backed(table.weight)
    where = table.weight.data_ptr()
    give_memory(table.weight)
    assert table.weight.data_ptr() == where
    one = deferred_parameter(1, 1, dtype=torch.float32)
    give_memory(one)
    assert backed(one)
    numbers, codes = (
        RowParallelLinear(64, 24, parallel=ParallelState(), dtype=torch.float32) for _ in range(2)
    )
    numbers.weight_loader("weight", torch.ones(24, 64))
    assert torch.equal(numbers.weight, torch.ones(24, 64))
    codes.weight_loader("weight", four_bits(24, 64))
    assert codes.weight.shape == (0, 64)
    head = ParallelLMHead(50, 64, parallel=ParallelState(tp_rank=3, tp_size=4), dtype=torch.float32)
    head.weight_loader("weight", torch.ones(50, 64))
    assert head.weight.sum() == 11 * 64
    fill_with_dummy_weights(table, 3)
    assert len(table.weight.unique()) > 50
    weights = {
        "gate_proj": torch.full((4, 8, 32), 1.0),
        "up_proj": torch.full((4, 8, 32), 2.0),
        "down_proj": torch.full((4, 32, 8), 3.0),
    }
    experts = make_experts(ExpertLayout.STACKED, 8)
    for name, parameter, shard in experts.checkpoint_tensors():
        experts.weight_loader(parameter, weights[name.split(".")[0]], shard)
    assert experts.gate_up_proj[:, :8].unique().tolist() == [1.0]
    assert experts.gate_up_proj[:, 8:].unique().tolist() == [2.0]
    assert experts.down_proj.unique().tolist() == [3.0]
    merged = make_experts(ExpertLayout.MERGED, 8)
    merged.weight_loader("gate_up_proj", torch.ones(4, 32, 16))
    merged.weight_loader("down_proj", torch.ones(4, 8, 32))
    assert merged.down_proj.unique().tolist() == merged.gate_up_proj.unique().tolist() == [1.0]


def make_experts(
    layout: ExpertLayout, width: int = 32, parallel: ParallelState | None = None
) -> Experts:
    return Experts(
        4,
        32,
        width,
        layout=layout,
        parallel=parallel or ParallelState(),
        dtype=torch.float32,
    )


def loaded_experts(parallel: ParallelState | None = None, width: int = 32) -> Experts:
    experts = make_experts(ExpertLayout.STACKED, width, parallel)
    parts = {
        "gate_proj.weight": four_bits(4 * width, 32, 1),
        "up_proj.weight": four_bits(4 * width, 32, 2),
        "down_proj.weight": eight_bits(4 * 32, width, 3),
    }
    for name, parameter, shard in experts.checkpoint_tensors():
        experts.weight_loader(parameter, parts[name], shard)
    return experts


def routing(tokens: int) -> Routing:
    generator = torch.Generator().manual_seed(4)
    experts = torch.rand(tokens, 4, generator=generator).topk(2).indices
    return Routing(experts, torch.rand(tokens, 2, generator=generator))


def test_experts_of_codes_are_those_one_by_one() -> None:
    """Two matrices of gates and ups, then one of both, as rounding at load leaves it."""
    experts, x = loaded_experts(), torch.randn(5, 32)
    assert experts.gate is not None
    assert experts.down is not None
    close(experts(x, routing(5)), experts._one_by_one(x, routing(5)))
    for name, most in (("int8", 0.02), ("fp8", 0.06)):
        numbers = make_experts(ExpertLayout.MERGED)
        for parameter in (numbers.gate_up_proj, numbers.down_proj):
            parameter.data.normal_()
        want = numbers(x, routing(5))
        numbers.quantize(rounding_to(name, KERNELS))
        assert numbers.gate_up_proj.shape[0] == numbers.down_proj.shape[0] == 0
        found = numbers(x, routing(5))
        close(found, numbers._one_by_one(x, routing(5)))
        assert (found - want).norm() < most * want.norm()


def test_ranks_have_their_share_of_experts() -> None:
    """Where a rank's inputs of down would cut a block, down becomes numbers beside codes."""
    x = torch.randn(3, 32)
    for width in (64, 32):
        whole = loaded_experts(width=width)._one_by_one(x, routing(3))
        ranks = [loaded_experts(ParallelState(tp_rank=rank, tp_size=2), width) for rank in (0, 1)]
        assert [rank.down is None for rank in ranks] == [width == 32] * 2
        parts = []
        for rank in ranks:
            found = rank.device_parts(KERNELS)
            assert found is not None
            parts.append(rank._launch(KERNELS, found, x, routing(3)))
        close(parts[0] + parts[1], whole)


def test_experts_whose_layouts_differ_are_computed_one_by_one() -> None:
    experts, x = loaded_experts(), torch.randn(2, 32)
    want = experts(x, routing(2))
    assert experts.down is not None
    first = experts.down.matrix.whole
    assert first is not None
    halves = [first.rows(0, 64), first.rows(64, 128)]
    halves[1].gain, halves[1].scales = 2.0, halves[1].scales / 2  # type: ignore[attr-defined]
    object.__setattr__(experts.down, "matrix", QuantizedMatrix(halves))
    assert experts.device_parts(KERNELS) is None
    close(experts(x, routing(2)), want)


class Unlaunched:
    """In place of a kernel: what a capture sees of a launch."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **sizes: None


def test_a_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is done beside launches could be captured."""
    kernels_of = {
        "quantized": ("quantized_linear", "quantized_rows", "sum_splits", "dequantize"),
        "expert_codes": ("grouped_quantized",),
        "moe": ("sum_pairs",),
    }
    for module, names in kernels_of.items():
        for name in names:
            monkeypatch.setattr(f"sgl_kernel.triton.{module}.{name}_kernel", Unlaunched())
    matrix = QuantizedMatrix([four_bits(40, 96), eight_bits(24, 96)])
    experts, x, ids = loaded_experts(), torch.randn(2, 96), torch.tensor([3, 63])
    with torch.inference_mode(), OpRecorder(), NoValues():
        matrix.take(ids, torch.float32)
        for rows in (1, 2):
            matrix.product(x[:rows], None, 3, 50)
            experts(x[:rows, :32].contiguous(), routing(rows))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_files_give_the_answers_of_their_numbers(family: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    quant = {"qwen3_moe": TYPES.Q4_1, "gpt_oss": TYPES.Q8_0}[family]
    write_gguf(path, make_hf_model(family, **FAMILIES[family]), quant)
    numbers, codes = load(path, "none"), load(path, "gguf")
    assert all(one.gate is not None and one.down is not None for one in experts_of(codes))
    owners = [module for module in codes.modules() if isinstance(module, WeightOwner)]
    kept = [owner for owner in owners if owner.quantized is not None]
    assert len(kept) >= len(owners) - 1, "a tied head has the embedding's"
    for owner in kept:
        assert owner.quantized is not None
        assert owner.quantized.whole is None or owner.quantized.whole.on_device
    close(logits(codes, 9), logits(numbers, 9))


def test_rounding_at_load_gives_the_codes_of_a_cpu(tmp_path: Path) -> None:
    make_hf_model("llama").save_pretrained(tmp_path)
    found = load(tmp_path, "int8")
    cpu = native_kernels()
    if cpu is None:
        pytest.skip("sgl-kernel is not built")
    with pytest.MonkeyPatch.context() as patch:
        for module in (choice, loader):
            patch.setattr(module, "codes_kernels", lambda device: cpu)
        wanted = load(tmp_path, "int8")
    modules = dict(wanted.named_modules())
    count = 0
    for name, module in found.named_modules():
        if isinstance(module, WeightOwner) and module.quantized is not None:
            pairs: Any = modules[name]
            for mine, theirs in zip(
                module.quantized.tensors(), pairs.quantized.tensors(), strict=True
            ):
                assert torch.equal(mine, theirs), name
            assert module.quantized.whole is not None
            count += module.quantized.whole.on_device
    assert count >= 12


def test_fp8_checkpoints_keep_their_codes(tmp_path: Path) -> None:
    """Inputs are rounded where the method is asked for by name and the checkpoint says so."""
    paths = {
        kind: fp8_checkpoint(tmp_path / name, kind, "qwen3", 1)[1]
        for kind, name in (("block of 128", "dynamic"), ("channel", "static"))
    }
    rounding = {}
    for kind, path in paths.items():
        for name in (None, "fp8"):
            model = load(path, name)
            parts = [one.whole for one in quantized_matrices(model)]
            assert len(parts) == 7, "all but the one that has numbers"
            assert all(part is not None and part.is_fp8 and part.on_device for part in parts)
            rounding[kind, name] = {part.rounds_inputs for part in parts if part is not None}
            if kind == "channel" and name is None:
                close(logits(model, 9), logits(load(path, "none"), 9))
    assert rounding == {
        ("block of 128", None): {False},
        ("block of 128", "fp8"): {True},
        ("channel", None): {False},
        ("channel", "fp8"): {False},
    }


def test_recorded_steps_of_codes_say_what_numbers_say(tmp_path: Path) -> None:
    """Decode steps of a tower whose weights are codes, as graphs and call by call."""
    path = str(tmp_path / "m.gguf")
    write_gguf(Path(path), make_hf_model("llama", num_hidden_layers=1), TYPES.Q4_1)
    with tower(path, quantization="none", attention_backend="torch_native") as engine:
        engine.send("a", PROMPTS[0], max_new_tokens=4)
        engine.run()
        expected = engine.output("a")
    for disabled in (False, True):
        flags = {"cuda_graph_max_bs": 1, "disable_cuda_graph": disabled}
        with late_tower(path, repeats_calls=True, **flags) as (engine, _):
            engine.send("a", PROMPTS[0], max_new_tokens=4)
            engine.run()
            assert engine.output("a") == expected
            assert disabled or graphs_of(engine).num_replays > 0
            head = engine.parts.worker.runner.model.lm_head
            assert head.quantized is not None
            assert head.quantized.whole.on_device
