from __future__ import annotations

import pytest

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from srt.layers.attention_cases import Case, make_layer, make_spec, make_tables


def test_new_tokens_are_stored_before_they_are_read() -> None:
    # The pool holds NaN where nothing was stored: a correct output proves the store.
    spec = make_spec()
    lengths = [(0, 6), (9, 1)]
    case = Case(spec, lengths, make_tables(lengths, 4, [1]), make_layer(spec))
    out = case.run(TorchNativeAttnBackend(spec))
    assert (out.double() - case.reference()).abs().max() < 2e-6


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="5 query heads over 2 kv heads"):
        RadixAttention(5, 16, 0.25, 2, 0)
    with pytest.raises(ValueError, match="sliding_window must be at least 1"):
        RadixAttention(4, 16, 0.25, 2, 0, sliding_window=0)
    with pytest.raises(ValueError, match="attention_chunk must be at least 1"):
        RadixAttention(4, 16, 0.25, 2, 0, attention_chunk=0)
    with pytest.raises(ValueError, match="not both"):
        RadixAttention(4, 16, 0.25, 2, 0, sliding_window=8, attention_chunk=8)


def test_defaults() -> None:
    layer = RadixAttention(4, 16, 0.25, 2, 7)
    assert (layer.v_head_dim, layer.sliding_window, layer.logit_cap) == (16, None, 0.0)
    assert layer.attention_chunk is None
    assert layer.layer_id == 7
