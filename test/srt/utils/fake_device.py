"""A device that is the host in disguise: everything comes late, and order alone makes it right.

`LateRuntime` keeps "device" tensors in host memory, but a fetched value is only there when it is
waited for, moved tensors are copies, and it counts what crosses. Used to test what an asynchronous
device asks of those above; what only hardware can tell is not tested here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sglang.srt.utils.device import HostCopy, Replay, pack_host_tensors, unpack
from sglang.srt.utils.host_memory import HostMemory

GIB = 1 << 30


class LateCopy:
    """Values that are read at the time of the copy but only shown to who waits."""

    def __init__(self, owner: LateRuntime, values: npt.NDArray[Any]) -> None:
        self._owner = owner
        self._values = values

    def wait(self) -> npt.NDArray[Any]:
        self._owner.num_waits += 1
        return self._values


class LateRuntime:
    """See the module."""

    is_async = True
    stream_handles = (7,)

    def __init__(
        self, *, total: int = 80 * GIB, free: int = 70 * GIB, repeats_calls: bool = False
    ) -> None:
        """`repeats_calls`: a recording is made again by running its Python, on the same inputs.

        For kernels that no recorder of tensor operations sees.
        """
        self._repeats_calls = repeats_calls
        self.device = torch.device("cpu")
        self.memory = HostMemory(total, free, "cudaMemGetInfo")
        self.num_moves = self.num_fetches = self.num_waits = self.num_syncs = 0
        self.depth = 0

    @contextmanager
    def computing(self) -> Iterator[None]:
        self.depth += 1
        yield
        self.depth -= 1

    def move(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        assert self.depth, "moved outside of the compute stream"
        self.num_moves += 1
        staging, places = pack_host_tensors(tensors, pin_memory=False)
        return unpack(staging, places)

    def fetch(self, tensor: torch.Tensor) -> HostCopy:
        assert self.depth, "fetched outside of the compute stream"
        self.num_fetches += 1
        return LateCopy(self, tensor.clone().numpy())

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        assert self.depth, "recorded outside of the compute stream"
        if self._repeats_calls:
            first = work()

            def again() -> None:
                with torch.inference_mode():
                    first.copy_(work())

            return again, first
        recorder = OpRecorder()
        with recorder, NoValues():
            result = work()
        return recorder.replay, result

    def read_memory(self) -> HostMemory:
        return self.memory

    def synchronize(self) -> None:
        self.num_syncs += 1


class NoValues(TorchFunctionMode):
    """Refuses to look at a tensor's values, which in inference mode no dispatcher sees."""

    LOOKS = frozenset(
        getattr(torch.Tensor, name)
        for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self.LOOKS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        return func(*args, **(kwargs or {}))


class OpRecorder(TorchDispatchMode):
    """Every tensor operation of a piece of work, in order, so that they can be made again.

    As a CUDA graph: only operations on tensors come back, no Python. What looks at a value, or
    makes a tensor whose size depends on one, raises as it would in a capture.
    """

    WAITS = (
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::equal",
        "aten::bincount",
        "aten::masked_select",
        "aten::_unique2",
    )

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name().split(".")[0]
        masks = name == "aten::index" and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if masks or name in self.WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.name()}")
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, result in self._calls:
                again = func(*args, **kwargs)
                pairs = zip(_tensors(result), _tensors(again), strict=True)
                for old, new in pairs:
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [one for one in result or () if isinstance(one, torch.Tensor)]
