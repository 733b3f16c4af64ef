"""Where compute runs, as one protocol: moving values there and back, streams, events, memory.

`CpuRuntime` does nothing that takes time: what it moves stays where it is. `CudaRuntime` gives the
worker a stream of its own; what it moves goes through page-locked memory without waiting, and what
comes back is waited for by its event. Everything above asks a runtime and no code asks whether
this is a GPU. `CudaRuntime` has not yet run on hardware; see docs/gpu.md, Device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.utils.host_memory import HostMemory, read_host_memory

_ALIGNMENT = 16  # bytes; of every array within one transfer


Replay = Callable[[], None]
"""Launches once more what was recorded."""


class HostCopy(Protocol):
    """A tensor's values on their way to the host."""

    def wait(self) -> npt.NDArray[Any]:
        """The values; returns when they have come."""


class DeviceRuntime(Protocol):
    """One device as the worker and the memory see it.

    `device` is where tensors of weights and batches live. `is_async`: what is launched runs later,
    in order, on the compute stream; results are then collected by a `HostCopy`. `stream_handles`
    are the driver's handles of the streams on which work may read KV memory.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def is_async(self) -> bool: ...

    @property
    def stream_handles(self) -> tuple[int, ...]: ...

    def computing(self) -> AbstractContextManager[Any]:
        """What is launched inside goes to the compute stream of the calling thread."""

    def move(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Host tensors as tensors on the device, in one transfer that is not waited for.

        The host tensors may be changed afterwards. Where the device is the host: as they are.
        """

    def fetch(self, tensor: torch.Tensor) -> HostCopy:
        """Begin to copy a tensor of the compute stream to the host."""

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        """Record what `work` launches, for replaying, and the tensor that replays write anew.

        `work` must launch the same calls on the same tensors as ever and wait for nothing; it has
        run before. Raises RuntimeError when it can't be recorded.
        """

    def read_memory(self) -> HostMemory:
        """What the device has in all and what of it may still be taken."""

    def synchronize(self) -> None:
        """Return when everything that was launched is done."""


class _Here:
    """A `HostCopy` of what is on the host already."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._values = values

    def wait(self) -> npt.NDArray[Any]:
        """See HostCopy."""
        return self._values


class CpuRuntime:
    """The host itself."""

    device = torch.device("cpu")
    is_async = False
    stream_handles: tuple[int, ...] = ()

    def computing(self) -> AbstractContextManager[Any]:
        """See DeviceRuntime."""
        return nullcontext()

    def move(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See DeviceRuntime."""
        return list(tensors)

    def fetch(self, tensor: torch.Tensor) -> HostCopy:
        """See DeviceRuntime."""
        return _Here(tensor.numpy())

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        """See DeviceRuntime: always RuntimeError; a host records on tapes."""
        raise RuntimeError(f"{work} runs on the host, which records no graphs")

    def read_memory(self) -> HostMemory:
        """See DeviceRuntime: MemAvailable and every cgroup's limit, whichever is less."""
        return read_host_memory()

    def synchronize(self) -> None:
        """See DeviceRuntime."""


class _OnItsWay:
    """A `HostCopy` into page-locked memory, behind an event."""

    def __init__(self, target: torch.Tensor, event: Any, choose_device: Callable[[], None]) -> None:
        self._target = target
        self._event = event
        self._choose_device = choose_device

    def wait(self) -> npt.NDArray[Any]:
        """See HostCopy. Releases the interpreter lock while it waits."""
        self._choose_device()
        self._event.synchronize()
        values: npt.NDArray[Any] = self._target.numpy()
        return values


class CudaRuntime:
    """CUDA device number `index`, with one compute stream.

    A thread begins with device 0 as its current one, and what it asks of CUDA then, or comes back
    to when it leaves a stream, makes a context there: half a GiB of a device that is another
    rank's. So every call here makes the process's device that of its thread, for good.

    `cuda` replaces torch.cuda. Raises ValueError when torch has no such device.
    """

    is_async = True

    def __init__(self, index: int = 0, *, cuda: Any = None) -> None:
        self._cuda = torch.cuda if cuda is None else cuda
        found = self._cuda.device_count() if self._cuda.is_available() else 0
        if index >= found:
            which = f"only {found} of {index + 1} CUDA devices" if found else "no CUDA device"
            raise ValueError(f"--device cuda: torch {torch.__version__} finds {which}")
        self.device = torch.device("cuda", index)
        self._choose_device()
        self._stream = self._cuda.Stream(device=self.device)
        self._graph_pool: Any = None

    @property
    def stream(self) -> Any:
        """The compute stream, as torch knows it."""
        return self._stream

    @property
    def stream_handles(self) -> tuple[int, ...]:
        """See DeviceRuntime: the compute stream and the default one, which loading used."""
        return (int(self._stream.cuda_stream), 0)

    def computing(self) -> AbstractContextManager[Any]:
        """See DeviceRuntime. The stream waits for nothing that others launched."""
        self._choose_device()
        context: AbstractContextManager[Any] = self._cuda.stream(self._stream)
        return context

    def move(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See DeviceRuntime. torch keeps the page-locked memory until the transfer is over."""
        return upload(tensors, self.device)

    def fetch(self, tensor: torch.Tensor) -> HostCopy:
        """See DeviceRuntime."""
        target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        target.copy_(tensor, non_blocking=True)
        event = self._cuda.Event()
        event.record(self._stream)
        return _OnItsWay(target, event, self._choose_device)

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        """See DeviceRuntime: a CUDA graph; all of them share one pool of memory.

        Other threads may call the driver meanwhile, as the one does that maps KV memory.
        """
        if self._graph_pool is None:
            self._graph_pool = self._cuda.graph_pool_handle()
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(
            graph,
            pool=self._graph_pool,
            stream=self._stream,
            capture_error_mode="thread_local",
        ):
            result = work()
        return graph.replay, result

    def read_memory(self) -> HostMemory:
        """See DeviceRuntime: as the driver says, once torch's cache is given back to it."""
        self._choose_device()
        self._cuda.empty_cache()
        free, total = self._cuda.mem_get_info(self.device)
        return HostMemory(int(total), int(free), "cudaMemGetInfo")

    def synchronize(self) -> None:
        """See DeviceRuntime."""
        self._cuda.synchronize(self.device)

    def _choose_device(self) -> None:
        self._cuda.set_device(self.device.index)

    def __repr__(self) -> str:
        return f"CudaRuntime({self.device})"


def upload(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copies of host tensors on `device`, in one transfer that is not waited for.

    From page-locked memory where the device is a GPU; what is launched afterwards on the current
    stream sees them.
    """
    on_gpu = device.type == "cuda"
    staging, places = pack_host_tensors(tensors, pin_memory=on_gpu)
    return unpack(staging.to(device, non_blocking=on_gpu), places)


Place = tuple[int, torch.dtype, torch.Size]


def pack_host_tensors(
    tensors: Sequence[torch.Tensor], *, pin_memory: bool
) -> tuple[torch.Tensor, list[Place]]:
    """All values in one tensor of bytes, and where each tensor begins: (byte, dtype, shape)."""
    places: list[Place] = []
    size = 0
    for tensor in tensors:
        places.append((size, tensor.dtype, tensor.shape))
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    staging = torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
    for view, tensor in zip(unpack(staging, places), tensors, strict=True):
        view.copy_(tensor)
    return staging, places


def unpack(staging: torch.Tensor, places: Sequence[Place]) -> list[torch.Tensor]:
    """Views of `staging`, uint8, as the tensors that were packed."""
    views = []
    for first, dtype, shape in places:
        size = int(np.prod(shape)) * dtype.itemsize
        views.append(staging[first : first + size].view(dtype).view(shape))
    return views


def make_runtime(
    device: str, index: int = 0, make_cuda: Callable[[int], DeviceRuntime] = CudaRuntime
) -> DeviceRuntime:
    """The runtime that `--device` names, of several CUDA devices number `index`.

    Side effect: that device is this process's current one. Raises ValueError for a device that is
    not there.
    """
    if device == "cpu":
        return CpuRuntime()
    if device == "cuda":
        return make_cuda(index)
    raise ValueError(f"--device {device}: cpu and cuda exist")
