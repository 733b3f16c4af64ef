"""--enable-torch-compile: which steps it computes, and that tokens stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang.srt.configs.rope_config import RopeConfig
from sglang.srt.layers import activation, layernorm, rotary_embedding
from sglang.srt.layers.activation import ClampedGate, GeluTanhAndMul, SiluAndMul
from sglang.srt.layers.compiled import compile_layers
from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm
from sglang.srt.layers.rotary_embedding import get_rope
from srt.managers.test_engine_tokens import answer_all, tower
from srt.models.hf_models import make_hf_model, save


def answers(path: str, **flags: object) -> list[list[int]]:
    with tower(path, **flags) as engine:
        assert not flags.get("enable_torch_compile") or engine.parts.worker.runner.tapes is None
        return answer_all(engine)


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return save(make_hf_model("llama"), tmp_path)


@pytest.mark.parametrize("max_rows", [1, 4])
def test_steps_of_few_rows_are_compiled_and_no_others(
    llama: str, max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that gives back what it gets."""
    expected = answers(llama)
    rows: dict[str, set[int]] = {}

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(layer: object, x: torch.Tensor, *rest: torch.Tensor) -> Any:
            rows.setdefault(function.__name__, set()).add(len(x))
            return function(layer, x, *rest)

        return call

    for module in (layernorm, activation, rotary_embedding):
        monkeypatch.setattr(module, "compiled", compiled)
    found = answers(llama, enable_torch_compile=True, torch_compile_max_bs=max_rows)
    assert found == expected
    assert set(rows) == {"_begin", "_add", "_turn", "compute"}
    for seen in rows.values():
        assert seen == set(range(1, max_rows + 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of torch's compiler
def test_compiled_layers_give_the_same_numbers() -> None:
    """Every layer that can be compiled, of one row and of several."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for kind in (RMSNorm, GemmaRMSNorm):
        norm = kind(64, 1e-5, dtype=torch.bfloat16)
        norm.weight.data.copy_(draw(64))
        for rows in (1, 3):
            x, residual = draw(rows, 64).bfloat16(), draw(rows, 64)
            expected = (norm(x, residual), norm.begin(x), (norm(x),))
            compile_layers(norm, 4)
            found = (norm(x, residual), norm.begin(x), (norm(x),))
            compile_layers(norm, 0)
            for one, other in zip(found, expected, strict=True):
                for a, b in zip(one, other, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    for gate in (SiluAndMul(), GeluTanhAndMul(), ClampedGate(1.7, 7.0)):
        for rows in (1, 3):
            x = draw(rows, 64)
            plain = gate(x)
            compile_layers(gate, 4)
            torch.testing.assert_close(gate(x), plain, rtol=1e-5, atol=1e-5)
            compile_layers(gate, 0)
    rope = get_rope(16, RopeConfig(), 1 << 20, torch.float32)
    for positions in (torch.tensor([9_999_999]), torch.tensor([0, 5, 77])):
        x = draw(len(positions), 64)
        plain = rope.rotate(positions, x)
        compile_layers(rope, 4)
        torch.testing.assert_close(rope.rotate(positions, x), plain, rtol=1e-5, atol=1e-5)
        compile_layers(rope, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of torch's compiler
def test_tokens_stay(llama: str) -> None:
    assert answers(llama, enable_torch_compile=True) == answers(llama)
