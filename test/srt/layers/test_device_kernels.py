"""Layers over Triton's kernels, in its interpreter: what they give without them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers import activation, layernorm, moe
from sglang.srt.layers.activation import ClampedGate, GatedActivation, GeluTanhAndMul, SiluAndMul
from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm
from sglang.srt.layers.moe import ExpertLayout, Experts, Routing
from sglang.srt.mem_cache import memory_pool
from sglang.srt.utils import native
from sglang.srt.utils.native import device_kernels_for, triton_kernels
from srt.mem_cache.test_memory_pool import make_pool, random_kv
from srt.utils.fake_device import LateRuntime

pytestmark = pytest.mark.skipif(triton_kernels() is None, reason="Triton is not installed")


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Tensors of the host pass for a GPU's; the names of the modules that asked."""
    asked: list[str] = []
    for module in (activation, layernorm, moe, memory_pool):

        def kernels(*tensors: torch.Tensor, name: str = module.__name__) -> object:
            asked.append(name.rpartition(".")[2])
            return triton_kernels()

        monkeypatch.setattr(module, "device_kernels_for", kernels)
        if hasattr(module, "kernels_for"):
            monkeypatch.setattr(module, "kernels_for", lambda *_: None)
    return asked


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_only_tensors_of_a_gpu_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_kernels_for(torch.ones(2)) is None
    assert device_kernels_for(torch.ones(2, device="meta")) is None
    monkeypatch.setenv("SGLANG_DISABLE_NATIVE_KERNELS", "1")
    assert native._layer_kernels.__wrapped__() is None  # type: ignore[attr-defined]
    monkeypatch.delenv("SGLANG_DISABLE_NATIVE_KERNELS")
    assert native._layer_kernels.__wrapped__() is triton_kernels()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "gate", [SiluAndMul(), GeluTanhAndMul(), ClampedGate(1.702, 7.0)], ids=lambda one: type(one)
)
def test_activations(gate: GatedActivation, on_device: list[str]) -> None:
    x = 3 * numbers(2, 3, 40)
    torch.testing.assert_close(gate(x), gate.compute(*x.chunk(2, -1)), rtol=1e-5, atol=1e-5)
    assert on_device == ["activation"]


@pytest.mark.parametrize("kind", [RMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(kind: type[RMSNorm], dtype: torch.dtype, on_device: list[str]) -> None:
    norm = kind(48, 1e-5, dtype=dtype)
    norm.weight.data.copy_(numbers(48, seed=1))
    atol = 1e-5 if dtype is torch.float32 else 4e-2
    x, residual = numbers(5, 48, seed=2, dtype=dtype), numbers(5, 48, seed=3)

    def equal(got: torch.Tensor, wanted: torch.Tensor) -> None:
        assert got.dtype is wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=0, atol=atol)

    equal(norm(x), norm._norm(x))
    heads = x.view(5, 48).repeat(1, 2).view(5, 2, 48)
    equal(norm(heads), norm._norm(heads))
    normed, total = norm(x, residual)
    equal(total, x + residual)
    equal(normed, norm._norm(x + residual))
    normed, first = norm.begin(x)
    equal(normed, norm._norm(x))
    equal(first, x.float())
    assert set(on_device) == {"layernorm"}


@pytest.mark.parametrize("scale_inputs", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_mixtures(scale_inputs: bool, bias: bool, on_device: list[str]) -> None:
    experts = Experts(
        4,
        32,
        16,
        layout=ExpertLayout.MERGED,
        scale_inputs=scale_inputs,
        bias=bias,
        parallel=ParallelState(),
        dtype=torch.float32,
    )
    for number, parameter in enumerate(experts.parameters()):
        parameter.data.copy_(0.3 * numbers(*parameter.shape, seed=number))
    x = numbers(6, 32, seed=9)
    chosen = torch.tensor([[0, 2], [1, 3], [2, 0], [3, 2], [0, 1], [2, 3]])
    routing = Routing(chosen, torch.rand(6, 2, generator=torch.Generator().manual_seed(4)))
    wanted = experts._one_by_one(x, routing)
    on_device.clear()
    added = numbers(6, 32, seed=11)
    torch.testing.assert_close(experts(x, routing, added), wanted + added, rtol=1e-4, atol=1e-5)
    assert "moe" in on_device


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8_e5m2"])
def test_stores(dtype: str, on_device: list[str]) -> None:
    pools = [make_pool(dtype), make_pool(dtype)]
    pools[1].serve(LateRuntime())
    loc = torch.tensor([20, 9, 30])
    k, v = random_kv(3)
    if dtype == "bfloat16":  # which the interpreter cuts float32 to, where hardware rounds
        k, v = k.bfloat16(), v.bfloat16()
    for pool in pools:
        pool.set_kv_buffer(0, loc, k, v)
    for which in range(2):
        stored = [pool.get_kv_buffer(0)[which][loc].float() for pool in pools]
        assert torch.equal(*stored)
    assert on_device == ["memory_pool"]
