"""Puts the weights of a model on a CPU into memory of huge pages.

A decode step reads every weight once. With pages of 4 KiB a core spends much of that on finding
pages, the more so in a virtual machine; docs/benchmarks has figures. `load_model` calls this once,
with parameters before they are filled, so that nothing is copied, or with what stays quantised
afterwards. Whether the system has huge pages at the time is its own matter: it is asked, not told.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import torch
from torch import nn

from sglang.srt.layers.expert_weights import ExpertWeights
from sglang.srt.layers.quantization.matrix import QuantizedMatrix
from sglang.srt.layers.weights import WeightOwner

_HUGE = 2 << 20  # bytes; less than one page is left where it is
_LINE = 64  # bytes; where a tensor may begin


def move_to_huge_pages(model: nn.Module, *, copy: bool) -> int:
    """Give all weights of `model` on a CPU one piece of memory; its bytes, 0 when they stay.

    `copy` False: parameters alone, whose content is not kept. They stay where they are when they
    fill no huge page, and where the system has none or gives no memory. Call it before anything
    keeps an address of a weight.
    """
    parameters = [p for p in model.parameters() if p.device.type == "cpu" and p.numel()]
    kept = quantized_matrices(model) if copy else ()
    matrices = [one for one in kept if all(t.device.type == "cpu" for t in one.tensors())]
    sizes = [p.nbytes for p in parameters]
    sizes += [t.nbytes for matrix in matrices for t in matrix.tensors()]
    room = _Room.of(sum(_lines(size) for size in sizes))
    if room is None:
        return 0
    for parameter in parameters:
        target = room.take(parameter.data)
        parameter.data = target.copy_(parameter.data) if copy else target
    for matrix in matrices:
        matrix.replace_tensors(lambda tensor: room.take(tensor).copy_(tensor))
    return room.used


def quantized_matrices(model: nn.Module) -> Iterator[QuantizedMatrix]:
    """Every matrix once: gates and ups of experts may be two views of one."""
    found: dict[int, QuantizedMatrix] = {}
    for module in model.modules():
        if isinstance(module, WeightOwner) and module.quantized is not None:
            found[id(module.quantized)] = module.quantized
        if isinstance(module, ExpertWeights):
            for part in (module.gate, module.up, module.down):
                if part is not None:
                    found[id(part.matrix)] = part.matrix
    yield from found.values()


def _lines(num_bytes: int) -> int:
    return -(-num_bytes // _LINE) * _LINE


class _Room:
    """Private memory for tensors, one after another; it lives as long as any of them."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self._first = self._next = -start % _HUGE

    @classmethod
    def of(cls, num_bytes: int) -> _Room | None:
        """Room for `num_bytes` that begins with a huge page; None as `move_to_huge_pages` says."""
        if num_bytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return None
        try:
            memory = mmap.mmap(-1, num_bytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without huge pages, or strict accounting
            return None
        return cls(memory)

    @property
    def used(self) -> int:
        return self._next - self._first

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor of the shape and type of `like`."""
        taken = torch.frombuffer(
            self._memory, dtype=like.dtype, count=like.numel(), offset=self._next
        )
        self._next += _lines(like.nbytes)
        return taken.view(like.shape)
