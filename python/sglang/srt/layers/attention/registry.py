"""Names of attention backends (--attention-backend) and the classes behind them."""

from __future__ import annotations

from dataclasses import replace

from sglang.srt.distributed.communicator import TensorCommunicator
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.cpu_backend import CpuAttnBackend, has_native_kernels
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.attention.flashinfer_table import FlashInferTableBackend
from sglang.srt.layers.attention.flashinfer_wrappers import has_flashinfer
from sglang.srt.layers.attention.kv_parallel_backend import KVParallelAttnBackend
from sglang.srt.layers.attention.kv_parallel_sparse import KVParallelSparseBackend
from sglang.srt.layers.attention.sparse_cpu_backend import SparseCpuBackend
from sglang.srt.layers.attention.sparse_device_backend import SparseDeviceBackend
from sglang.srt.layers.attention.torch_device_backend import TorchDeviceAttnBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.attention.torch_native_table import SegmentTableAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend, check_triton
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.utils.native import triton_kernels


def get_attention_backend(name: str | None, device: str) -> type[AttentionBackend]:
    """The backend class called `name`, or the device's default for None and "auto".

    The class tells `preferred_page_size` before a KVCacheSpec exists; an instance is made from
    the spec. Raises ValueError naming what is available.
    """
    if device == "cpu":
        available = _on_cpu(name)
    elif device == "cuda":
        available = _on_cuda(name)
    else:
        raise ValueError(
            f"no attention backend for device {device!r}; available devices: cpu, cuda"
        )
    if name is None or name == "auto":
        return next(iter(available.values()))
    if name not in available:
        names = ", ".join(available)
        raise ValueError(f"attention backend {name!r} is not available on {device}; use {names}")
    return available[name]


def _on_cpu(name: str | None) -> dict[str, type[AttentionBackend]]:
    """What serves on a CPU, the default first. Raises ValueError when `name` lacks a package."""
    available: dict[str, type[AttentionBackend]] = {}
    if has_native_kernels():
        available[CpuAttnBackend.name] = CpuAttnBackend
    elif name == CpuAttnBackend.name:
        raise ValueError(
            "attention backend 'cpu' needs the native kernels: pip install ./sgl-kernel, "
            "which takes a C++ compiler"
        )
    available[TorchNativeAttnBackend.name] = TorchNativeAttnBackend
    if name == TritonAttnBackend.name:  # for tests: only in the interpreter
        check_triton("cpu")
        available[TritonAttnBackend.name] = TritonAttnBackend
    return available


def _on_cuda(name: str | None) -> dict[str, type[AttentionBackend]]:
    """As `_on_cpu`, on a GPU."""
    available: dict[str, type[AttentionBackend]] = {}
    if triton_kernels() is not None:
        available[TritonAttnBackend.name] = TritonAttnBackend
    elif name == TritonAttnBackend.name:
        check_triton("cuda")
    available[TorchDeviceAttnBackend.name] = TorchDeviceAttnBackend
    if has_flashinfer():
        available[FlashInferAttnBackend.name] = FlashInferAttnBackend
    elif name == FlashInferAttnBackend.name:
        raise ValueError(
            "attention backend 'flashinfer' needs its package: pip install flashinfer-python"
        )
    return available


def make_attention_backend(
    backend: type[AttentionBackend],
    pool: MHATokenToKVPool,
    kv_group: TensorCommunicator | None = None,
    index_topk: int | None = None,
) -> AttentionBackend:
    """An instance that reads `pool`; a segment table takes another class than contiguous memory.

    `kv_group` are the ranks that share the pool's pages, None when this rank has all. With
    `index_topk` queries see so many tokens of each request, which index keys choose. Raises
    ValueError when the backend can't read the pool, or not so.
    """
    made = _make_reader(backend, pool, pool.spec)
    dense = made
    if kv_group is not None:
        if not isinstance(made, TorchNativeAttnBackend):
            raise ValueError(f"attention backend {backend.name} can't share KV between ranks")
        dense = KVParallelAttnBackend(made, pool.share, kv_group)
    if index_topk is None:
        return dense
    if not isinstance(made, TorchNativeAttnBackend):
        if not pool.contiguous:
            raise ValueError(
                f"attention backend {backend.name} needs contiguous KV memory for sparse attention"
            )
        return SparseDeviceBackend(dense, index_topk)
    tokens = _make_reader(backend, pool, replace(pool.spec, page_size=1))
    assert isinstance(tokens, TorchNativeAttnBackend)
    if isinstance(dense, KVParallelAttnBackend):
        return KVParallelSparseBackend(dense, tokens, index_topk)
    return SparseCpuBackend(dense, tokens, index_topk)


def _make_reader(
    backend: type[AttentionBackend], pool: MHATokenToKVPool, spec: KVCacheSpec
) -> AttentionBackend:
    if pool.contiguous or issubclass(backend, TritonAttnBackend):
        return backend(spec)
    segment_tokens = tuple(layout.slots_per_segment for layout in pool.layouts)
    if issubclass(backend, TorchNativeAttnBackend):
        return SegmentTableAttnBackend(spec, segment_tokens)
    if issubclass(backend, FlashInferAttnBackend):
        return FlashInferTableBackend(spec, segment_tokens)
    raise ValueError(f"attention backend {backend.name} needs contiguous KV memory")
