"""Tapes: the native calls of a computation, recorded once and made again in one call.

Between two kernels of a decode step stand only Python, allocations and threads that fall asleep;
with a small model they cost more than the kernels. A `Tape` keeps the structures that the wrappers
passed while it was recorded. They name memory, not values: who changes what stands there and plays
the tape again gets the result for the new values, as with a CUDA graph.

`record` belongs to the thread that enters it, as stream capture does in CUDA; a tape is played by
one thread at a time.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sgl_kernel.fusion import fuse
from sgl_kernel.library import KernelError, Op, Step, library

_LINE = 64


class NotRecorded(Exception):
    """A computation can't be played again: something in it was no call of this package."""


class Arena:
    """Memory of intermediate results, given back as the tensors in it go.

    What one tensor left is used for the next: when a tape is played in the order in which it was
    recorded, each place is read before it is written anew. Several tapes may share an arena if none
    of them reads what another one left. Reserves `num_bytes` of address space; memory is committed
    when it is first written.
    """

    def __init__(self, num_bytes: int) -> None:
        size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._room = np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8)
        self._begin = self._room.ctypes.data
        self._free = [(0, size)]  # (offset, bytes), ascending, never touching

    def holds(self, tensor: torch.Tensor) -> bool:
        """True for tensors in this memory."""
        return 0 <= tensor.data_ptr() - self._begin < self._room.nbytes

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor on a line of 64 bytes. Raises NotRecorded when there is no room."""
        num_bytes = prod(shape) * dtype.itemsize
        size = max(_LINE, -(-num_bytes // _LINE) * _LINE)
        offset = self._take(size)
        part = self._room[offset : offset + num_bytes]
        weakref.finalize(part, self._give_back, offset, size).atexit = False
        return torch.from_numpy(part).view(dtype).view(*shape)

    def _take(self, size: int) -> int:
        for i, (offset, room) in enumerate(self._free):
            if room >= size:
                rest = [(offset + size, room - size)] if room > size else []
                self._free[i : i + 1] = rest
                return offset
        raise NotRecorded(f"there is no room for {size} bytes")

    def _give_back(self, offset: int, size: int) -> None:
        spans = sorted([*self._free, (offset, size)])
        joined = spans[:1]
        for begin, room in spans[1:]:
            last, before = joined[-1]
            if last + before == begin:
                joined[-1] = (last, before + room)
            else:
                joined.append((begin, room))
        self._free = joined


class Tape:
    """Calls in their order. `arena` holds what they write and nobody else keeps.

    Holds the other tensors and arrays that the calls name, whose memory must stay where it is.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.ops: list[Op] = []
        self._calls: list[ctypes.Structure] = []
        self._operands: list[object] = []
        self._steps: ctypes.Array[Step] = (Step * 0)()

    def __len__(self) -> int:
        return len(self.ops)

    def add(self, op: Op, call: ctypes.Structure, operands: Sequence[object]) -> None:
        """Append a call; `operands` own the memory that it names."""
        self.ops.append(op)
        self._calls.append(call)
        self._operands += [
            one for one in operands if not (isinstance(one, torch.Tensor) and self.arena.holds(one))
        ]

    def fuse(self) -> None:
        """Make as one call what belongs together, see `fusion.py`; once, after recording.

        The numbers stay the same. What a norm writes between a product and a rotation is not
        written any more.
        """
        fused = fuse(list(zip(self.ops, self._calls, strict=True)))
        self._operands += self._calls  # which the fused ones name
        self.ops = [op for op, _ in fused]
        self._calls = [call for _, call in fused]
        self._steps = (Step * 0)()

    def play(self, num_threads: int) -> None:
        """Make all calls. Raises KernelError when one is not served."""
        self._run(num_threads, None)

    def times(self, num_threads: int) -> list[tuple[Op, float]]:
        """Make all calls and tell how many seconds each took."""
        seconds = (ctypes.c_double * len(self))()
        self._run(num_threads, seconds)
        return list(zip(self.ops, seconds, strict=True))

    def _run(self, num_threads: int, seconds: Any) -> None:
        if len(self._steps) != len(self._calls):
            pairs = zip(self._calls, self.ops, strict=True)
            steps = [Step(ctypes.addressof(call), op) for call, op in pairs]
            self._steps = (Step * len(steps))(*steps)
        made = library().sgl_run(self._steps, len(self), num_threads, seconds)
        if made != len(self):
            raise KernelError(f"call {made} of a tape, {self.ops[made].name}, is not served")


class _Recording(threading.local):
    tape: Tape | None = None


_recording = _Recording()


def _storage_of(tensor: torch.Tensor) -> int:
    """Where a tensor's storage lies."""
    return tensor.untyped_storage().data_ptr()


class _ViewsOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Lets through operations that compute nothing: a tape would not have them."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch asks. A yes would import its compiler, a second's work, at the first step."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        aliases = [one.alias_info for one in func._schema.arguments]
        if any(alias is not None and alias.is_write for alias in aliases):
            raise NotRecorded(f"{func} is no native call")
        result = func(*args, **(kwargs or {}))
        # By the memory, not by the schema: a reshape may be a view or a copy.
        owners = {_storage_of(one) for one in args if isinstance(one, torch.Tensor)}
        for one in result if isinstance(result, (tuple, list)) else (result,):
            # What is no tensor is a value that was read: it would stay that of the recorded step.
            if not isinstance(one, torch.Tensor) or _storage_of(one) not in owners:
                raise NotRecorded(f"{func} is no native call")
        return result


@contextmanager
def record(tape: Tape) -> Iterator[None]:
    """Every native call of this thread goes onto the tape, and is made.

    Raises NotRecorded where another tensor operation than a view is computed meanwhile. The calls
    before it have been made then.
    """
    if _recording.tape is not None:
        raise NotRecorded("a tape is being recorded already")
    _recording.tape = tape
    try:
        with _ViewsOnly():  # type: ignore[no-untyped-call]
            yield
    finally:
        _recording.tape = None


def is_recording() -> bool:
    """True while this thread records a tape: what depends on values must not be decided then."""
    return _recording.tape is not None


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A new tensor for a call's result: in the arena of the tape that is being recorded, if any."""
    tape = _recording.tape
    return torch.empty(shape, dtype=dtype) if tape is None else tape.arena.empty(shape, dtype)


def make(op: Op, call: ctypes.Structure, *operands: object) -> None:
    """Make a call, and put it onto the tape that is being recorded, if any.

    `operands` own the memory that the call names. Raises KernelError when it is not served.
    """
    if _function(op)(ctypes.byref(call)):
        raise KernelError(f"{op.name.lower()} does not serve these arguments")
    if _recording.tape is not None:
        _recording.tape.add(op, call, operands)


@cache
def _function(op: Op) -> Any:
    return getattr(library(), f"sgl_{op.name.lower()}")
