"""Layers for Hypothesis to draw: what a backend may be asked to see, over any KV cache."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from srt.layers.attention_cases import make_layer


def draw_layer(draw: st.DrawFn, spec: KVCacheSpec, spans: Sequence[int | None]) -> RadixAttention:
    """A layer of `spec` with one of `spans` as its window or its chunk, None for neither."""
    span = draw(st.sampled_from(spans))
    chunked = draw(st.booleans())
    return make_layer(
        spec,
        group=draw(st.sampled_from([1, 3])),
        window=None if chunked else span,
        chunk=span if chunked else None,
        cap=draw(st.sampled_from([0.0, 0.0, 2.0])),
        sinks=draw(st.booleans()),
    )
