"""How the package's wrappers are made, and that their plans do not run into each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang.srt.layers.attention import flashinfer_wrappers
from sglang.srt.layers.attention.flashinfer_wrappers import FlashInferWrappers, PageBuffers


class FakePackage:
    """The two classes of the package, and with what they were made."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.events: list[str] = []

    def BatchDecodeWithPagedKVCacheWrapper(self, workspace: Any, layout: str, **more: Any) -> Any:
        self.calls.append((layout, more))
        return self

    def BatchPrefillWithPagedKVCacheWrapper(self, workspace: Any, layout: str) -> Any:
        return self.BatchDecodeWithPagedKVCacheWrapper(workspace, layout)

    def plan(self, number: int) -> None:
        self.events.append(f"plan {number}")

    def mark(self) -> Any:
        number = len(self.events)
        return lambda: self.events.append(f"wait for {number}")


def test_wrappers_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_wrappers, "WORKSPACE_BYTES", 64)
    package = FakePackage()
    wrappers = FlashInferWrappers(package, package.mark)
    one = PageBuffers(*(torch.zeros(n, dtype=torch.int32) for n in (3, 9, 2)))
    device = torch.device("cpu")
    made: Any = wrappers.decode(device)
    wrappers.prefill(device)
    wrappers.recorded_decode(one)
    assert [layout for layout, _ in package.calls] == ["NHD"] * 3
    decode, prefill, recorded = (more for _, more in package.calls)
    assert decode == {"use_tensor_cores": True}
    assert prefill == {}
    assert recorded.pop("use_cuda_graph") is True
    assert recorded.pop("use_tensor_cores") is True
    names = ("indptr", "indices", "last_page_len")
    for name, buffer in zip(names, one, strict=True):
        assert recorded.pop(f"paged_kv_{name}_buffer") is buffer
    assert recorded == {}
    # A plan's staging memory is the wrapper's: the next one waits for what was copied from it.
    made.plan(1)
    made.plan(2)
    made.plan(3)
    assert package.events == ["plan 1", "wait for 1", "plan 2", "wait for 3", "plan 3"]
