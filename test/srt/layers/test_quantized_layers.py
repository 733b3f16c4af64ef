"""Layers whose weights stay quantised compute as if they were numbers."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.expert_weights import ExpertLayout
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.moe import Experts, Routing
from sglang.srt.layers.quantization import matrix as matrices
from sglang.srt.layers.quantization.choice import choose_quantization
from sglang.srt.layers.quantization.int8 import quantize_int8
from sglang.srt.layers.quantization.matrix import QuantizedMatrix, QuantizedWeight
from sglang.srt.layers.quantization.rounding import quantize_fp8, rounding_to
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.utils.native import native_kernels

kernels = native_kernels()
if kernels is None:
    pytest.skip("sgl-kernel is not installed", allow_module_level=True)
KERNELS = kernels


def eight_bits(outs: int, width: int, seed: int = 0) -> QuantizedWeight:
    weight = torch.randn(outs, width, generator=torch.Generator().manual_seed(seed))
    codes, scales, gain = quantize_int8(weight)
    found: QuantizedWeight = KERNELS.QuantizedWeight(codes, scales, gain=gain)
    return found


def four_bits(outs: int, width: int, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (outs, width // 2), generator=generator).to(torch.uint8)
    scales = torch.rand(outs, width // 32, generator=generator).half() / 8
    found: QuantizedWeight = KERNELS.QuantizedWeight(codes, scales, -8 * scales)
    return found


def close(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), want.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 6, 32, 33, 64, 65, 200])
def test_parts_of_different_layouts_are_one_matrix(rows: int) -> None:
    parts = [four_bits(40, 96), four_bits(8, 96, 1), eight_bits(16, 96, 2)]
    matrix = QuantizedMatrix(parts)
    wide = torch.cat([part.dequantize(torch.float32) for part in parts])
    assert matrix.shape == (64, 96)
    assert matrix.nbytes == sum(part.nbytes for part in parts)
    x, bias = torch.randn(rows, 96), torch.randn(64)
    close(matrix.product(x, bias), F.linear(x, wide, bias))
    for first, last in ((0, 40), (3, 64), (41, 50), (48, 64)):
        found = matrix.product(x, bias[first:last], first, last)
        close(found, F.linear(x, wide[first:last], bias[first:last]))
    ids = torch.tensor([[63, 0], [47, 48]])
    assert torch.equal(matrix.take(ids, torch.float32), wide[ids])


def test_leading_dimensions_and_half_precision() -> None:
    matrix = QuantizedMatrix([four_bits(48, 64)])
    wide = four_bits(48, 64).dequantize(torch.float32)
    x = torch.randn(2, 30, 64).bfloat16()
    out = matrix.product(x)
    assert out.shape == (2, 30, 48)
    assert out.dtype is torch.bfloat16
    want = x.float() @ wide.t()
    # An input may be rounded to a step of its group's largest over 127.
    step = x.float().abs().max() / 127
    bound = 0.01 * want.abs() + 0.05 + step / 2 * wide.abs().sum(1)
    assert ((out.float() - want).abs() <= bound).all()
    assert matrix.product(x[:0]).shape == (0, 30, 48)
    many = torch.randn(3, 30, 64).bfloat16()
    out = matrix.product(many)
    assert out.dtype is torch.bfloat16
    want = many.float() @ wide.t()
    bound = 0.01 * want.abs() + 0.05
    # By tiles, of the matrix or of the processor, but where any number of rows is rounded.
    if most_rounded_rows("4") >= 90:
        bound += many.float().abs().max() / 127 / 2 * wide.abs().sum(1)
    assert ((out.float() - want).abs() <= bound).all()


def linear_pair() -> tuple[QKVParallelLinear, QKVParallelLinear, dict[str, QuantizedWeight]]:
    def make() -> QKVParallelLinear:
        return QKVParallelLinear(
            64, 16, 4, 2, bias=True, parallel=ParallelState(), dtype=torch.float32
        )

    return make(), make(), {"q": four_bits(64, 64), "k": four_bits(32, 64), "v": eight_bits(32, 64)}


def test_a_fused_layer_keeps_the_codes_of_its_parts() -> None:
    layer, plain, parts = linear_pair()
    for name in ("v", "q", "k"):  # files have their own order
        bias = torch.randn(parts[name].shape[0])
        for one, weight in ((layer, parts[name]), (plain, parts[name].dequantize(torch.float32))):
            one.weight_loader("weight", weight, name)
            one.weight_loader("bias", bias, name)
    assert layer.quantized is not None
    assert len(layer.weight) == 0
    assert plain.quantized is None
    x = torch.randn(5, 64)
    close(layer(x), plain(x))
    close(layer.queries(x), plain.queries(x))
    for found, want in zip(layer.keys_values(x), plain.keys_values(x), strict=True):
        close(found, want)


def test_one_part_in_numbers_makes_numbers_of_all() -> None:
    layer, plain, parts = linear_pair()
    for name, part in parts.items():
        weight = part.dequantize(torch.float32)
        layer.weight_loader("weight", weight if name == "k" else part, name)
        plain.weight_loader("weight", weight, name)
    assert layer.quantized is None
    assert torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize("tp_rank", [0, 1])
@pytest.mark.parametrize("width", [128, 64, 96])  # a rank's columns: 64, 32 and 48, which cuts
def test_ranks_take_their_rows_and_columns(tp_rank: int, width: int) -> None:
    parallel = ParallelState(tp_rank=tp_rank, tp_size=2)
    weight = four_bits(24, width)
    wide = weight.dequantize(torch.float32)
    rows = MergedColumnParallelLinear(width, (16, 8), parallel=parallel, dtype=torch.float32)
    rows.weight_loader("weight", weight)
    first, second = tp_rank * 8, 16 + tp_rank * 4
    x = torch.randn(3, width)
    close(rows(x), x @ torch.cat((wide[first : first + 8], wide[second : second + 4])).t())
    columns = RowParallelLinear(width, 24, parallel=parallel, dtype=torch.float32)
    columns.weight_loader("weight", weight)
    assert (columns.quantized is None) == (width == 96)
    here = slice(tp_rank * width // 2, (tp_rank + 1) * width // 2)
    close(columns.product(x[:, here]), x[:, here] @ wide[:, here].t())


def test_a_wrong_width_is_refused() -> None:
    layer = MergedColumnParallelLinear(64, (16,), parallel=ParallelState(), dtype=torch.float32)
    with pytest.raises(ValueError, match="96 columns, not 64"):
        layer.weight_loader("weight", four_bits(16, 96), 0)


def test_a_tied_head_and_its_embedding_share_the_codes() -> None:
    parallel = ParallelState()
    table = VocabParallelEmbedding(50, 64, parallel=parallel, dtype=torch.float32)
    head = ParallelLMHead(50, 64, parallel=parallel, dtype=torch.float32, tied_to=table)
    table.weight_loader("weight", four_bits(50, 64))
    wide = four_bits(50, 64).dequantize(torch.float32)
    ids, x = torch.tensor([3, 49, 3]), torch.randn(2, 64)
    assert torch.equal(table(ids), wide[ids])
    close(head(x), x @ wide.t())
    assert head.quantized is None, "it has none of its own"


def test_a_rank_with_padded_rows_has_numbers() -> None:
    parallel = ParallelState(tp_rank=1, tp_size=2)
    head = ParallelLMHead(51, 64, parallel=parallel, dtype=torch.float32)
    head.weight_loader("weight", four_bits(51, 64))
    wide = four_bits(51, 64).dequantize(torch.float32)
    assert head.quantized is None
    assert torch.equal(head.weight[:25], wide[26:])
    assert not head.weight[25:].any()


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_int8_is_within_half_a_step(scale: float) -> None:
    weight = torch.randn(37, 96, dtype=torch.float64) * scale
    weight[3, 32:64] = 0.0
    codes, scales, gain = quantize_int8(weight.float())
    steps = scales.double().repeat_interleave(32, 1) * gain
    error = (codes.double() * steps - weight).abs()
    # the largest magnitude of a group may be cut by what its scale was rounded down
    assert (error <= 0.5 * steps + 127 * steps * 2.0**-11).all()
    assert not codes[3, 32:64].any()


def test_int8_of_a_layer() -> None:
    layer = RowParallelLinear(64, 24, parallel=ParallelState(), dtype=torch.float32)
    weight = torch.randn(24, 64)
    layer.weight_loader("weight", weight)
    layer.quantize(rounding_to("int8", KERNELS))
    assert layer.quantized is not None
    assert layer.quantized.nbytes == 24 * (64 + 2 * 2)
    x = torch.randn(4, 64)
    assert (layer(x) - x @ weight.t()).abs().max() < 0.2
    odd = RowParallelLinear(40, 24, parallel=ParallelState(), dtype=torch.float32)
    odd.weight_loader("weight", torch.randn(24, 40))
    odd.quantize(rounding_to("int8", KERNELS))
    assert odd.quantized is None


def test_fp8_is_the_nearest() -> None:
    """Half a step of a code, of 3 bits, or half the smallest; zeros stay zeros."""
    weight = torch.randn(37, 96, dtype=torch.float64)
    weight[3] = 0.0
    weight[5] *= 1e-12
    codes, scales = quantize_fp8(weight.float())
    assert scales.shape == (37, 1)
    error = (codes.double() * scales.double() - weight).abs()
    step = torch.maximum(weight.abs() * 2.0**-4, scales.double() * 2.0**-10)
    assert (error <= 1.0001 * step).all()
    assert not codes[3].float().any()
    whole = quantize_fp8(torch.full((1, 32), 3.0))
    assert (whole[0].float() == 448.0).all()


def test_fp8_of_a_layer() -> None:
    rounding = rounding_to("fp8", KERNELS)
    layer = RowParallelLinear(64, 24, parallel=ParallelState(), dtype=torch.bfloat16)
    weight = torch.randn(24, 64)
    layer.weight_loader("weight", weight)
    layer.quantize(rounding)
    assert layer.quantized is not None
    assert layer.quantized.nbytes == 24 * (64 + 4)
    assert layer.weight.numel() == 0
    codes, scales = quantize_fp8(weight.bfloat16())
    wide = codes.double() * scales.double()
    for rows in (1, 5, 70):
        x = torch.randn(rows, 64).bfloat16()
        error = (layer(x).double() - x.double() @ wide.t()).abs()
        terms = x.double().abs() @ wide.abs().t()
        assert (error <= 2.0**-8 * terms).all(), "no input was rounded to bytes"


@pytest.mark.parametrize("rows", [2, 200])
def test_fp8_of_experts(rows: int) -> None:
    """In one call and one after the other; inputs of 16 bits are not rounded to bytes."""
    experts = Experts(
        *(4, 64, 32),
        layout=ExpertLayout.MERGED,
        parallel=ParallelState(),
        dtype=torch.bfloat16,
    )
    for parameter in (experts.gate_up_proj, experts.down_proj):
        parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    weights = (experts.gate_up_proj.data, experts.down_proj.data)
    parts = [quantize_fp8(one.flatten(0, 1)) for one in weights]
    experts.quantize(rounding_to("fp8", KERNELS))
    assert experts.gate is not None
    assert experts.down is not None
    assert experts.gate.matrix.nbytes == 4 * 64 * (64 + 4)
    assert experts.gate.matrix is experts.up.matrix  # type: ignore[union-attr]
    assert not experts.has_integers
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    chosen = torch.rand(rows, 4).topk(2).indices
    shares = torch.rand(rows, 2)
    both, down = ((codes.double() * scales.double()).view(4, -1, codes.shape[1])
                  for codes, scales in parts)  # fmt: skip
    want = torch.zeros(rows, 64, dtype=torch.float64)
    for place in range(2):
        gate, up = (both[chosen[:, place]] @ x.double().unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        inner = (F.silu(gate) * up).unsqueeze(-1)
        want += (down[chosen[:, place]] @ inner).squeeze(-1) * shares[:, place, None].double()
    found = experts(x, Routing(chosen, shares))
    assert (found.double() - want).abs().max() <= 0.01 * want.abs().max()


def test_ranks_cut_blocks_of_fp8() -> None:
    """Scales of 128 by 128 on two ranks with 96 inputs, and 40 outputs, each."""
    generator = torch.Generator().manual_seed(3)
    weight, scales = torch.randn(80, 192, generator=generator), torch.rand(80, 2) + 0.5
    codes = (weight * 100).to(torch.float8_e4m3fn)
    wide = codes.float() * scales.repeat_interleave(128, 1)[:, :192]
    whole = KERNELS.QuantizedWeight(codes, scales, group=128)
    x, total = torch.randn(3, 192), torch.zeros(3, 80)
    for rank in range(2):
        parallel = ParallelState(tp_rank=rank, tp_size=2)
        inputs = RowParallelLinear(192, 80, parallel=parallel, dtype=torch.float32)
        inputs.weight_loader("weight", whole)
        assert inputs.quantized is not None
        total += inputs.product(x[:, rank * 96 : rank * 96 + 96])
        outputs = MergedColumnParallelLinear(192, (80,), parallel=parallel, dtype=torch.float32)
        outputs.weight_loader("weight", whole, 0)
        assert outputs.quantized is not None
        here = wide[rank * 40 : rank * 40 + 40]
        torch.testing.assert_close(outputs(x), x @ here.t(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(total, x @ wide.t(), rtol=1e-4, atol=1e-2)


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_quantization(None, is_gguf=True, device="cpu") == "gguf"
    assert choose_quantization(None, is_gguf=False, device="cpu") == "none"
    assert choose_quantization("int8", is_gguf=False, device="cpu") == "int8"
    assert choose_quantization("none", is_gguf=True, device="cpu") == "none"
    for name, device, message in (
        ("gguf", "cpu", "this model is none"),
        ("marlin", "cpu", "must be one of"),
        ("mxfp4", "cpu", "has no quantised weights"),
        ("awq", "meta", "has no quantised weights, and is not made so here"),
        ("int8", "meta", "needs the native kernels"),
        ("fp8", "meta", "needs the native kernels"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_quantization(name, is_gguf=False, device=device)
    for name in (None, "mxfp4"):
        found = [
            choose_quantization(name, is_gguf=False, method="mxfp4", device=device)
            for device in ("cpu", "meta")
        ]
        assert found == ["mxfp4", "none"]
    for name, method in (("gptq_marlin", "gptq"), ("awq", "awq"), ("awq_marlin", "awq")):
        assert choose_quantization(name, is_gguf=False, method=method, device="cpu") == method
        assert choose_quantization(name, is_gguf=False, method=method, device="meta") == "none"
    with pytest.raises(ValueError, match=r"--quantization awq_marlin: .* is quantised by gptq"):
        choose_quantization("awq_marlin", is_gguf=False, method="gptq", device="cpu")
    for name, device, kept in ((None, "cpu", "fp8"), ("fp8", "cpu", "fp8"), (None, "meta", "none")):
        assert choose_quantization(name, is_gguf=False, method="fp8", device=device) == kept
    assert choose_quantization("fp8", is_gguf=False, device="cpu") == "fp8"
    for own in ({"is_gguf": True}, {"is_gguf": False, "method": "compressed-tensors"}):
        with pytest.raises(ValueError, match="--quantization fp8: this checkpoint is quantised by"):
            choose_quantization("fp8", device="cpu", **own)
    assert choose_quantization("int8", is_gguf=False, method="mxfp4", device="cpu") == "int8"
    assert choose_quantization("none", is_gguf=False, method="mxfp4", device="cpu") == "none"
    with pytest.raises(ValueError, match="--quantization mxfp4: this checkpoint is quantised by g"):
        choose_quantization("mxfp4", is_gguf=True, device="cpu")
    monkeypatch.setattr("sglang.srt.utils.native.native_kernels", lambda: None)
    assert choose_quantization(None, is_gguf=True, device="cpu") == "none"
    assert choose_quantization("mxfp4", is_gguf=False, method="mxfp4", device="cpu") == "none"
    with pytest.raises(ValueError, match="needs the native kernels"):
        choose_quantization("gguf", is_gguf=True, device="cpu")


VALUES = {"4 of up to 16": (*range(-15, 0), 16), "4 of up to 17": (*range(-15, 0), 17)}


def test_what_is_chosen_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, kept in ((object(), "gguf"), (None, "none")):
        monkeypatch.setattr("sglang.srt.utils.native._layer_kernels", lambda found=found: found)
        assert choose_quantization(None, is_gguf=True, device="cuda:1") == kept
    with pytest.raises(ValueError, match=r"needs the native kernels.*the package triton"):
        choose_quantization("int8", is_gguf=False, device="cuda")


def most_rounded_rows(codes: str) -> int:
    """Of inputs of 16 bits, beside no matrix tiles."""
    if not KERNELS.has_byte_dots():
        return 0
    if KERNELS.cpu_isa().name in ("AVX2", "AVX512"):
        return 1 << 30 if codes in ("4", "4 of up to 16") else 8
    return 64


@pytest.mark.parametrize("kind", ["4", *VALUES, "8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 5, 8, 9, 64, 65])
def test_when_inputs_of_16_bits_are_rounded(dtype: torch.dtype, rows: int, kind: str) -> None:
    """Only where bytes are multiplied: everywhere else few rows are exact too.

    Beside matrix tiles, more than four rows of bfloat16 meet a rounded weight instead.
    """
    codes = torch.randint(-127, 128, (24, 96 if kind == "8" else 48), dtype=torch.int8)
    scales = torch.rand(24, 3).half() + 0.1
    codes = codes if kind == "8" else codes.view(torch.uint8)
    weight = KERNELS.QuantizedWeight(codes, scales, values=VALUES.get(kind))
    x = torch.randn(rows, 96).to(dtype)
    found = QuantizedMatrix([weight]).product(x)
    exact = x.double() @ weight.dequantize(torch.float32).double().t()
    if dtype is torch.bfloat16 and rows > 4 and KERNELS.has_tiles():
        assert torch.equal(found, weight.multiply(x, round_weight=True))
        assert not torch.equal(found, weight.multiply(x, round_inputs=True))
    elif dtype is torch.float32 or rows > most_rounded_rows(kind):
        terms = x.double().abs() @ weight.dequantize(torch.float32).double().abs().t()
        assert ((found.double() - exact).abs() <= 8 * torch.finfo(dtype).eps * terms).all()
    else:
        assert torch.equal(found, weight.multiply(x, round_inputs=True))
        assert not torch.equal(found, weight.multiply(x))


@pytest.mark.parametrize(("level", "small", "large"), [("AVX2", sys.maxsize, 8), ("AMX", 64, 64)])
def test_how_many_rows_are_rounded(
    level: str, small: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = SimpleNamespace(has_byte_dots=lambda: True, cpu_isa=lambda: KERNELS.Isa[level])
    monkeypatch.setattr(matrices, "native_kernels", lambda: others)
    assert matrices._most_rounded_rows.__wrapped__(True) == small
    assert matrices._most_rounded_rows.__wrapped__(False) == large
