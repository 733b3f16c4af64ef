"""FlashInfer's paged wrappers as the backends use them, and the package's own behind that.

A wrapper is planned with page tables, then run for as many layers as share them. Written from
FlashInfer's documentation (docs.flashinfer.ai); the tests' stand-ins do what that says.

Legend: R query rows, N sequences, H query heads, G kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, NamedTuple, Protocol

import torch

WORKSPACE_BYTES: Final = 256 << 20  # of floats, zeroed once; all wrappers share it
# What a wrapper takes beside, as an issue of FlashInfer's found for 0.5.1 (number 2046).
WRAPPER_BYTES: Final = 72 << 20


class DecodeWrapper(Protocol):
    """`flashinfer.BatchDecodeWithPagedKVCacheWrapper`: one query for each sequence."""

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **options: Any,
    ) -> None:
        """Page tables int32: `indptr` [N + 1], `indices` [pages], `last_page_len` [N]."""

    def run(
        self, q: torch.Tensor, paged_kv_cache: Any, *, return_lse: bool, **scales: float
    ) -> Any:
        """q [N, H, D] over (k, v) of [pages, page_size, G, D]: (out [N, H, D], lse to base 2).

        With `k_scale` K counts as so many times what is stored.
        """


class PrefillWrapper(Protocol):
    """`flashinfer.BatchPrefillWithPagedKVCacheWrapper`: runs of queries."""

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        **options: Any,
    ) -> None:
        """As `DecodeWrapper.plan`, with the sequences' rows: `qo_indptr` int32 [N + 1]."""

    def run(
        self, q: torch.Tensor, paged_kv_cache: Any, *, return_lse: bool, **scales: float
    ) -> Any:
        """As `DecodeWrapper.run`, with q [R, H, D]."""


class PageBuffers(NamedTuple):
    """Where a recorded wrapper keeps its page tables for good, int32 on the device.

    `indptr` [N + 1] and `last` [N] are for exactly N sequences, `pages` for at most as many ids as
    it has room.
    """

    indptr: torch.Tensor
    pages: torch.Tensor
    last: torch.Tensor


class Wrappers(Protocol):
    """Makes wrappers over a workspace on `device`; what the package offers, or a stand-in."""

    def decode(self, device: torch.device) -> DecodeWrapper: ...

    def prefill(self, device: torch.device) -> PrefillWrapper: ...

    def recorded_decode(self, buffers: PageBuffers) -> DecodeWrapper:
        """One whose `run` may be captured in a graph, which then does what was planned last.

        `plan` copies tables into the buffers; it is called between replays, never in a capture, and
        for N sequences only.
        """


class FencedWrapper:
    """A wrapper of the package whose plans do not run into each other.

    `plan` writes into page-locked memory of the wrapper's own and launches a copy from it. Where
    the device is behind, the next plan would overwrite what is yet to be copied: it waits for that.
    `mark` is called after a plan and gives what returns when all that was launched is done.
    """

    def __init__(self, wrapper: Any, mark: Callable[[], Callable[[], None]]) -> None:
        self._wrapper = wrapper
        self._mark = mark
        self._copied: Callable[[], None] = lambda: None

    def plan(self, *tables: Any, **options: Any) -> None:
        """See DecodeWrapper and PrefillWrapper."""
        self._copied()
        self._wrapper.plan(*tables, **options)
        self._copied = self._mark()

    def run(
        self, q: torch.Tensor, paged_kv_cache: Any, *, return_lse: bool, **scales: float
    ) -> Any:
        """See DecodeWrapper."""
        return self._wrapper.run(q, paged_kv_cache, return_lse=return_lse, **scales)


def _mark_stream() -> Callable[[], None]:
    """What waits for all that was launched on the current stream so far."""
    cuda: Any = torch.cuda
    event = cuda.Event()
    event.record()
    wait: Callable[[], None] = event.synchronize
    return wait


class FlashInferWrappers:
    """The package's own wrappers, one workspace a device.

    `package` and `mark` replace flashinfer and CUDA's events.
    """

    def __init__(
        self, package: Any = None, mark: Callable[[], Callable[[], None]] = _mark_stream
    ) -> None:
        self._package = import_module("flashinfer") if package is None else package
        self._mark = mark
        self._workspaces: dict[torch.device, torch.Tensor] = {}

    def decode(self, device: torch.device) -> DecodeWrapper:
        """See Wrappers. Tensor cores: they serve every number of heads in a group."""
        return self._fenced(
            self._package.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace(device), "NHD", use_tensor_cores=True
            )
        )

    def prefill(self, device: torch.device) -> PrefillWrapper:
        """See Wrappers."""
        return self._fenced(
            self._package.BatchPrefillWithPagedKVCacheWrapper(self._workspace(device), "NHD")
        )

    def recorded_decode(self, buffers: PageBuffers) -> DecodeWrapper:
        """See Wrappers."""
        return self._fenced(
            self._package.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace(buffers.pages.device),
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=buffers.indptr,
                paged_kv_indices_buffer=buffers.pages,
                paged_kv_last_page_len_buffer=buffers.last,
            )
        )

    def _fenced(self, wrapper: Any) -> FencedWrapper:
        return FencedWrapper(wrapper, self._mark)

    def _workspace(self, device: torch.device) -> torch.Tensor:
        if device not in self._workspaces:
            self._workspaces[device] = torch.zeros(
                WORKSPACE_BYTES, dtype=torch.uint8, device=device
            )
        return self._workspaces[device]


def has_flashinfer() -> bool:
    """Whether the package is installed; it is imported when the backend is made."""
    return find_spec("flashinfer") is not None
