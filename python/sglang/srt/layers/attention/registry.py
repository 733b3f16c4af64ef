"""Names of attention backends (--attention-backend) and the classes behind them."""

from __future__ import annotations

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend


def get_attention_backend(name: str | None, device: str) -> type[AttentionBackend]:
    """The backend class called `name`, or the device's default for None and "auto".

    The class tells `preferred_page_size` before a KVCacheSpec exists; an instance is made from
    the spec. Raises ValueError naming what is available.
    """
    available: dict[str, type[AttentionBackend]] = {}
    if device == "cpu":
        available[TorchNativeAttnBackend.name] = TorchNativeAttnBackend
    if not available:
        raise ValueError(f"no attention backend for device {device!r}; available devices: cpu")
    if name is None or name == "auto":
        return next(iter(available.values()))
    if name not in available:
        names = ", ".join(available)
        raise ValueError(f"attention backend {name!r} is not available on {device}; use {names}")
    return available[name]
