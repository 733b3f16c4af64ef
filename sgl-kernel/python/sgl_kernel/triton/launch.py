"""What every Triton wrapper asks before it launches: where tensors lie, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sgl_kernel.library import KernelError

# Triton's names of what K and V are stored in.
TRITON_TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}

# Of every launch: a product and a sum may be rounded once. Said, because Triton's default changes.
FP_FUSION: dict[str, Any] = {"enable_fp_fusion": True}


class Pairs(NamedTuple):
    """Pairs of token and expert, by expert, in tiles of `block` rows of one expert each.

    `order` int32 [tiles * block]: pair t * K + i is token t's i-th expert, T * K is padding.
    `tile_experts` int32 [tiles], E for tiles that are left over.
    """

    order: torch.Tensor
    tile_experts: torch.Tensor
    block: int
    num_tokens: int
    num_chosen: int

    @property
    def num_pairs(self) -> int:
        """T * K."""
        return self.num_tokens * self.num_chosen


@dataclass(frozen=True, slots=True)
class GroupedTile:
    """Sizes of a product's launch: rows, output features and input features, powers of two."""

    rows: int
    columns: int
    depth: int


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 when Triton was imported."""
    return bool(triton.knobs.runtime.interpret)


def check_device(*tensors: torch.Tensor) -> None:
    """Raises KernelError for tensors on a CPU, unless Triton interprets."""
    if not is_interpreted() and any(tensor.device.type == "cpu" for tensor in tensors):
        raise KernelError(
            "Triton kernels compute on a GPU; on a CPU only in its interpreter, for tests: set "
            "TRITON_INTERPRET=1 before Triton is imported"
        )


def power_of_two(value: int) -> int:
    """The lowest power of two that is not below `value`."""
    return 1 << max(0, value - 1).bit_length()
