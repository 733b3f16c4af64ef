"""The reference backend over K and V of fp8, against float64 of the stored numbers."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from sglang.srt.layers.attention import torch_native_backend
from sglang.srt.layers.attention.merge import partial_attention
from sglang.srt.layers.attention.torch_native_backend import TorchNativeTuning
from srt.crossed import crossed
from srt.layers.attention.test_torch_native_backend import TINY, check
from srt.layers.attention_cases import Case, make_layer, make_spec, make_tables


@pytest.mark.parametrize(
    ("types", "run_pages"),
    crossed(
        list(product(("fp8_e4m3", "fp8_e5m2"), (torch.float32, torch.bfloat16))),
        [[2, 7], [], [1]],
    ),
    ids=str,
)
def test_fp8_cache(types: tuple[str, torch.dtype], run_pages: list[int]) -> None:
    """Single queries, batches of them, prompts, windows and caps: in place or gathered."""
    dtype, q_dtype = types
    lengths = [(300, 1), (0, 130), (290, 40), (33, 1), (31, 1), (29, 1), (700, 1)]
    for page_size, v_dim in ((16, 16), (4, 24)):
        spec = make_spec(page_size=page_size, dtype=dtype, v_head_dim=v_dim)
        tables = make_tables(lengths, page_size, run_pages)
        for changes in ({}, {"window": 21}, {"cap": 2.0, "sinks": True}, {"chunk": 40}):
            case = Case(
                spec, lengths, tables, make_layer(spec, **changes), logits_rows=[0, 131, 172]
            )
            case.q_dtype = q_dtype
            for tuning in (None, TINY, TorchNativeTuning(batch_row_bytes=0)):
                check(case, tuning, atol=2e-6 if q_dtype == torch.float32 else 2e-2)


def test_fp8_is_widened_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(page_size=4, dtype="fp8_e4m3")
    lengths = [(2000, 1), (1500, 3)]
    tuning = TorchNativeTuning(query_block=6, gather_bytes=16 << 10, min_run_bytes=1)
    seen = []

    def partial(q: torch.Tensor, k: torch.Tensor, *rest: object, **more: object) -> object:
        seen.append(k.nbytes)
        return partial_attention(q, k, *rest, **more)

    monkeypatch.setattr(torch_native_backend, "partial_attention", partial)
    check(Case(spec, lengths, make_tables(lengths, 4, []), make_layer(spec)), tuning)
    assert len(seen) > 20
    assert max(seen) <= 16 << 10
