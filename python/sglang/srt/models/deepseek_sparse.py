"""DeepSeek-V3.2 and GLM-5: latent attention over the tokens that an indexer chooses.

All but the choice is DeepSeek-V3's (deepseek_v2.py). Layers without an indexer of their own see
what the last one before them chose; a checkpoint's index weights of such layers are passed over.
See docs/kv_segments.md, Note [Sparse attention].

Legend: as in deepseek_v2. Source: DeepSeek-V3.2-Exp's report, section 2.1.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.model_traits import IndexConfig, LatentConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.attention.sparse_backend import SparseAttnBackend
from sglang.srt.layers.indexer import Indexer
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.layers.rows import take_rows
from sglang.srt.layers.weights import LoadedWeight
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2ForCausalLM,
    latent_rope,
)

_INDEXER = re.compile(r"model\.layers\.(\d+)\.self_attn\.indexer\.")


class SparseLatentAttention(DeepseekV2Attention):
    """Latent attention of one layer over chosen tokens; `indexer` None: those of a layer before."""

    def __init__(
        self,
        config: ModelConfig,
        latent: LatentConfig,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        parallel: ParallelState,
        dtype: torch.dtype,
        indexer: Indexer | None,
    ) -> None:
        super().__init__(config, latent, layer_id, rotary_emb, parallel, dtype)
        self.indexer = indexer

    def forward(
        self, x: torch.Tensor, forward_batch: ForwardBatch, *, rows_pruned: bool
    ) -> torch.Tensor:
        """As `DeepseekV2Attention.forward`; the batch's backend is the sparse one."""
        backend: SparseAttnBackend = forward_batch.attn_backend
        positions, asked = forward_batch.positions, x
        rows = self.kept_rows(x, positions)
        if self.indexer is not None:
            keys = self.indexer.keys(x, positions)
            backend.store_index(keys, self.attn, forward_batch)
        if rows_pruned:
            asked = take_rows(x, forward_batch.logits_rows)
            positions = take_rows(positions, forward_batch.logits_rows)
        q_latents = self.query_latents(asked)
        if self.indexer is not None and backend.chooses(forward_batch, rows_pruned=rows_pruned):
            query = self.indexer.query(q_latents, asked, positions)
            backend.choose(query, self.attn, forward_batch, rows_pruned=rows_pruned)
        q = self.turned(self.q_b_proj(q_latents), positions)
        return self.attended(q, rows, forward_batch, rows_pruned=rows_pruned)


class DeepseekV32ForCausalLM(DeepseekV2ForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    def make_attentions(
        self,
        config: ModelConfig,
        latent: LatentConfig,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> list[nn.Module]:
        """See `DeepseekV2ForCausalLM`; all indexers turn by one rotation too."""
        index = config.index
        if index is None or latent.q_rank is None:
            raise ValueError(f"{config.architecture} without an indexer")
        rope = latent_rope(config, latent, dtype, interleaved=config.interleaved_rope)
        index_rope = rope
        if index.interleaved != config.interleaved_rope:
            index_rope = latent_rope(config, latent, dtype, interleaved=index.interleaved)

        def indexer(layer_id: int, index: IndexConfig, rank: int) -> Indexer | None:
            if layer_id not in index.layers:
                return None
            return Indexer(config.hidden_size, rank, index, index_rope, dtype)

        return [
            SparseLatentAttention(
                *(config, latent, layer_id, rope, parallel, dtype),
                indexer(layer_id, index, latent.q_rank),
            )
            for layer_id in range(config.num_layers)
        ]

    def _may_be_ignored(self, name: str, tensor: LoadedWeight) -> bool:
        place = _INDEXER.match(name)
        if place is not None and self.config.index is not None:
            layer = int(place[1])
            if layer < self.config.num_layers and layer not in self.config.index.layers:
                return True
        return super()._may_be_ignored(name, tensor)


class GlmMoeDsaForCausalLM(DeepseekV32ForCausalLM):
    """GLM-5, which differs from DeepSeek-V3.2 in what its config says alone."""
