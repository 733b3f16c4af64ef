"""Types that a server computes in and keeps K and V in: as asked for, or as a checkpoint says."""

from __future__ import annotations

import torch

from sglang.srt.configs.quantization_config import KVCacheScheme

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def resolve_dtype(requested: str, checkpoint: str, device: str = "cpu") -> str:
    """The type of weights and activations: the requested one, or for "auto" the checkpoint's.

    As in SGLang, auto never computes in float32 but in float16; on a CPU 16 bits means bfloat16,
    which has hardware products where float16 has none.
    """
    if requested != "auto":
        return requested
    if device != "cpu":
        return "float16" if checkpoint == "float32" else checkpoint
    return "bfloat16" if checkpoint in ("float32", "float16") else checkpoint


def resolve_kv_dtype(
    requested: str, scheme: KVCacheScheme | None, activations: str
) -> tuple[str, str | None]:
    """The type of K and V, and what has to be said of it: (type, text or None).

    `requested` counts unless it is "auto"; then what the checkpoint says of its KV cache, where it
    is served, else `activations`, the type of those.
    """
    if requested != "auto":
        return requested, None
    if scheme is None:
        return activations, None
    if scheme.dtype is not None:
        return scheme.dtype, (
            f"The KV cache is {scheme.dtype}, as the checkpoint says ({scheme.told}); "
            "--kv-cache-dtype takes another type."
        )
    return activations, (
        f"The checkpoint's scheme for its KV cache is not served ({scheme.told}): the cache is "
        f"{activations}. Served is fp8 with one scale for a layer's K and one for its V."
    )
