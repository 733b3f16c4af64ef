"""Runtimes: what is moved and fetched, and which calls a CUDA device gets; no hardware here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang.srt.utils.device import (
    CpuRuntime,
    CudaRuntime,
    HostCopy,
    make_runtime,
    pack_host_tensors,
    unpack,
)
from sglang.srt.utils.device_probe import detect_device


def test_the_cpu_moves_nothing() -> None:
    runtime = CpuRuntime()
    tensors = [torch.arange(3), torch.ones(2)]
    assert all(a is b for a, b in zip(runtime.move(tensors), tensors, strict=True))
    assert runtime.fetch(tensors[0]).wait().tolist() == [0, 1, 2]
    assert runtime.read_memory().total_bytes > 0
    assert not runtime.is_async


def test_many_tensors_go_in_one() -> None:
    tensors = [
        torch.arange(5),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([[True], [False]]),
        torch.rand(3, dtype=torch.float64),
        torch.tensor([1.5], dtype=torch.float32),
    ]
    staging, places = pack_host_tensors(tensors, pin_memory=False)
    assert staging.dtype is torch.uint8
    assert all(first % 16 == 0 for first, _, _ in places)
    for got, wanted in zip(unpack(staging, places), tensors, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    kept = tensors[0].clone()
    tensors[0].zero_()
    assert torch.equal(unpack(staging, places)[0], kept)


class FakeCuda:
    """The calls of torch.cuda that a runtime makes, written down.

    A thread's current device is 0 until it chooses another, and leaving a stream goes back to the
    one before; `touched` are the devices that would have a context by that.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self.calls: list[str] = []
        self.touched: set[int] = set()
        self._of_thread = threading.local()

    @property
    def current(self) -> int:
        return int(getattr(self._of_thread, "device", 0))

    def _use(self, index: int) -> None:
        self._of_thread.device = index
        self.touched.add(index)

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def set_device(self, index: int) -> None:
        if index != self.current or not self.touched:
            self.calls.append(f"set_device {index}")
        self._use(index)

    def Stream(self, device: torch.device) -> Any:
        return SimpleNamespace(cuda_stream=4711, device=device)

    def Event(self) -> Any:
        return SimpleNamespace(
            record=lambda stream: self._use(stream.device.index),
            synchronize=lambda: self._use(self.current),
        )

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.calls.append(f"stream {stream.cuda_stream}")
        before = self.current
        self._use(stream.device.index)
        yield
        self._use(before)

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
        self._use(self.current)

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        self.calls.append("mem_get_info")
        return 60, 80

    def synchronize(self, device: torch.device) -> None:
        self.calls.append("synchronize")


def test_a_cuda_runtime_has_a_stream_of_its_own() -> None:
    cuda = FakeCuda()
    runtime = CudaRuntime(cuda=cuda)
    assert runtime.device == torch.device("cuda", 0)
    assert runtime.stream_handles == (4711, 0)
    with runtime.computing():
        pass
    memory = runtime.read_memory()
    assert (memory.total_bytes, memory.available_bytes) == (80, 60)
    runtime.synchronize()
    wanted = ["set_device 0", "stream 4711", "empty_cache", "mem_get_info", "synchronize"]
    assert cuda.calls == wanted


def test_no_thread_makes_a_context_on_another_ranks_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launching, waiting for results and asking for memory, each on a thread of its own."""
    empty = torch.empty

    def pageable(*args: Any, pin_memory: bool, **more: Any) -> torch.Tensor:
        assert pin_memory
        return empty(*args, **more)

    monkeypatch.setattr("sglang.srt.utils.device.torch.empty", pageable)
    cuda = FakeCuda(2)
    runtime = CudaRuntime(1, cuda=cuda)

    def launch() -> HostCopy:
        with runtime.computing():
            return runtime.fetch(torch.arange(3))

    def on_a_thread(work: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(work).result()

    copy = on_a_thread(launch)
    assert on_a_thread(copy.wait).tolist() == [0, 1, 2]
    assert on_a_thread(runtime.read_memory).total_bytes == 80
    assert cuda.touched == {1}


def test_no_device() -> None:
    with pytest.raises(ValueError, match="finds no CUDA device"):
        CudaRuntime(cuda=FakeCuda(0))
    with pytest.raises(ValueError, match="finds only 1 of 2 CUDA devices"):
        CudaRuntime(1, cuda=FakeCuda(1))
    assert make_runtime("cpu").device.type == "cpu"
    second = make_runtime("cuda", 1, lambda index: CudaRuntime(index, cuda=FakeCuda(2)))
    assert second.device == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="cpu and cuda exist"):
        make_runtime("xpu")


def test_the_device_is_found_without_torch_where_no_driver_is(tmp_path: Path) -> None:
    def never() -> bool:
        raise AssertionError("torch was asked")

    assert detect_device(tmp_path, never) == "cpu"
    (tmp_path / "nvidiactl").touch()
    assert detect_device(tmp_path, lambda: True) == "cuda"
    assert detect_device(tmp_path, lambda: False) == "cpu"
