"""What the tests change in Triton's interpreter: how often it swaps, never what it computes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from kernels.interpreter import swap_once_per_launch  # noqa: E402


@triton.jit
def sums_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(3):
        total += tl.sum(tl.load(x_ptr + row * BLOCK + offs), 0)
    tl.store(out_ptr + offs, total)


def test_a_launch_computes_the_same_and_leaves_the_language_as_it_was() -> None:
    before = {name: getattr(tl, name) for name in dir(tl)}
    x, out = torch.arange(24.0), torch.zeros(8)
    for _ in range(2):
        sums_kernel[(1,)](out, x, BLOCK=8)
        assert out.tolist() == [float(sum(range(24)))] * 8
    assert all(getattr(tl, name) is member for name, member in before.items())


def fake_interpreter(swaps: list[str]) -> ModuleType:
    """Whose launch calls functions of two modules, three times each, and counts what is swapped."""
    module = ModuleType("interpreter")

    class GridExecutor:
        def __call__(self) -> None:
            for function in ("own", "language") * 3:
                made = eval("lambda: None", {"mine": MODULES[function]})
                made.__name__ = function
                module._patch_lang(made)

    def swap(fn: Any) -> str:
        swaps.append(fn.__name__)
        return "a scope"

    module._patch_lang = swap  # type: ignore[attr-defined]
    module._LangPatchScope = object  # type: ignore[attr-defined]
    module.GridExecutor = GridExecutor  # type: ignore[attr-defined]
    return module


MODULES = {name: ModuleType(name) for name in ("own", "language")}


def test_every_launch_swaps_once_for_every_set_of_modules() -> None:
    swaps: list[str] = []
    module = fake_interpreter(swaps)
    swap_once_per_launch(module)
    launch = module.GridExecutor()
    launch()
    assert swaps == ["own", "language"]
    launch()
    assert swaps == ["own", "language"] * 2


def test_an_interpreter_of_another_make_is_left_alone() -> None:
    module = ModuleType("interpreter")
    module._patch_lang = swap = object()  # type: ignore[attr-defined]
    swap_once_per_launch(module)
    assert module._patch_lang is swap
