"""Every family's step on tensors that have no values: nothing is looked at, nothing is the host's.

The device "meta" stands for a GPU: reading a value from it raises, and so does an operation that it
shares with a tensor of the host. What a step does there it does on a GPU without waiting.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.sparse_device_backend import SparseDeviceBackend
from sglang.srt.layers.attention.torch_device_backend import TorchDeviceAttnBackend
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe import Experts
from sglang.srt.managers.scheduler_pool_plan import kv_cache_spec
from sglang.srt.mem_cache.segment_backing.static import StaticBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)
from sglang.srt.mem_cache.segment_table_pool import (
    make_kv_pool,
)
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch, ForwardMode
from sglang.srt.models.registry import resolve_model_class
from sglang.srt.utils.device import upload
from sglang.srt.utils.progress import Progress
from srt.layers.attention_cases import make_tables
from srt.models.hf_models import (
    FAMILIES,
    LATENT_FAMILIES,
    MIXED_FAMILIES,
    MOE_FAMILIES,
    SPARSE_FAMILIES,
    make_hf_model,
    save,
)
from srt.utils.fake_device import LateRuntime

META = torch.device("meta")
WHOLE = [(0, 9), (30, 1), (0, 1)]
DECODES = [(9, 1), (30, 1), (60, 1)]


class MetaRuntime(LateRuntime):
    """A device whose tensors have no values."""

    def __init__(self) -> None:
        super().__init__()
        self.device = META


@pytest.mark.parametrize("lengths", [WHOLE, DECODES], ids=["prompts", "decodes"])
@pytest.mark.parametrize(
    "family",
    sorted({**FAMILIES, **MIXED_FAMILIES, **MOE_FAMILIES, **LATENT_FAMILIES, **SPARSE_FAMILIES}),
)
def test_a_step_waits_for_nothing(
    family: str,
    lengths: list[tuple[int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"sliding_window": 50} if family == "mistral" else {}
    # One by one, experts ask how many tokens each has; on a GPU a kernel does it at once.
    monkeypatch.setattr(Experts, "_one_by_one", lambda self, x, routing: torch.zeros_like(x))
    config = ModelConfig.from_path(save(make_hf_model(family, **changes), tmp_path))
    parallel = ParallelState()
    with torch.device(META):
        model = resolve_model_class(config.architecture)(config, parallel, torch.bfloat16)
    spec = kv_cache_spec(config, parallel, "bfloat16", 16)
    layouts = make_segment_layouts(
        spec,
        slots_per_segment=64,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=1,
        machine_bytes=1 << 20,
        budget_bytes=0,
    )
    backing = StaticBacking(device="meta", available_bytes=lambda: 1 << 40)
    backing.reserve(spec, layouts)
    pool = make_kv_pool(spec, layouts, backing)
    pool.serve(MetaRuntime())
    backend: AttentionBackend = TorchDeviceAttnBackend(spec)
    if config.index is not None:
        backend = SparseDeviceBackend(backend, config.index.topk)
    batch = make_batch(lengths, spec.num_groups, pool, backend)
    with torch.inference_mode():
        hidden = model(batch)
        out = LogitsProcessor()(hidden, model.lm_head, batch, [None] * 3, [0, 1, 2])
    assert out.next_token_logits.device == META
    assert out.next_token_logits.shape == (3, config.vocab_size)


def test_the_stand_in_refuses_what_a_device_would() -> None:
    there = torch.ones(3, device=META)
    with pytest.raises(RuntimeError, match="meta"):
        there * torch.ones(3)
    with pytest.raises(RuntimeError, match="meta tensors"):
        there.sum().item()
    with pytest.raises(TypeError):
        there.numpy()


def make_batch(
    lengths: list[tuple[int, int]], num_groups: int, pool: object, backend: AttentionBackend
) -> ForwardBatch:
    prefix = np.array([p for p, _ in lengths], np.int64)
    extend = np.array([e for _, e in lengths], np.int64)
    starts = np.cumsum(extend) - extend
    total = int(extend.sum())
    geometry = BatchGeometry(
        seq_lens=prefix + extend,
        extend_prefix_lens=prefix,
        extend_seq_lens=extend,
        q_starts=starts,
        logits_rows=starts + extend - 1,
        block_tables=(tuple(make_tables(lengths, 16, [])),) * num_groups,
        page_size=16,
    )
    numbers = torch.arange(total)
    ids, positions, rows, *locs = upload(
        [numbers, numbers, torch.from_numpy(geometry.logits_rows), *[numbers] * num_groups], META
    )
    return ForwardBatch(
        forward_mode=ForwardMode.MIXED,
        input_ids=ids,
        positions=positions,
        geometry=geometry,
        out_cache_loc=tuple(locs),
        logits_rows=rows,
        token_to_kv_pool=pool,
        attn_backend=backend,
        attn_plan=backend.plan(geometry),
        progress=Progress(),
    )
