"""Where the native kernels come from, and how they are kept out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sglang.srt.utils import native

pytest.importorskip("sgl_kernel")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Looked for once in a process: anew for each test, and as ever afterwards."""
    native.native_kernels.cache_clear()
    yield
    native.native_kernels.cache_clear()


@pytest.mark.parametrize(("value", "has_kernels"), [("1", False), ("0", True), ("", True)])
def test_the_environment_keeps_them_out(
    value: str, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_DISABLE_NATIVE_KERNELS", value)
    assert (native.native_kernels() is not None) == has_kernels
    assert (native.kernels_for(torch.ones(1)) is not None) == has_kernels


def test_they_take_floats_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_DISABLE_NATIVE_KERNELS", raising=False)
    assert native.kernels_for(torch.ones(1, dtype=torch.bfloat16)) is not None
    assert native.kernels_for(torch.ones(1), torch.ones(1, dtype=torch.float64)) is None
    assert native.kernels_for(torch.ones(1, device="meta")) is None
