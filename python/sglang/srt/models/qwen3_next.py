"""Qwen3-Next: Gated DeltaNet in most layers, gated attention in the others, experts.

The decoder is Llama's with Gemma's kind of norm. Source: the published configuration and model
card of Qwen3-Next, arXiv 2412.06464 (Gated DeltaNet), 2505.06708 (gated attention).

Shape letters: T packed new tokens, R rows whose logits are wanted, H query heads, D head dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.layernorm import GemmaRMSNorm
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.linear_attention.mixer import StatePlanner
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import RotaryEmbedding, get_rope
from sglang.srt.layers.rows import take_rows
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.arranged import ArrangedDecoderLayer
from sglang.srt.models.causal_lm import AdapterSite
from sglang.srt.models.gated_delta_net import GatedDeltaNet
from sglang.srt.models.llama import DecoderOptions, LlamaModel
from sglang.srt.models.mixture import MixtureForCausalLM, MixtureOptions


class GatedAttention(nn.Module):
    """Attention whose heads turn in part, and whose output a sigmoid of the token gates."""

    def __init__(
        self,
        config: ModelConfig,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads = parallel.shard_size(config.num_heads, "attention heads")
        # A head's gate stands behind its query, as if it were a head of its own.
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            2 * config.num_heads,
            config.num_kv_heads,
            bias=config.attention_bias,
            parallel=parallel,
            dtype=dtype,
        )
        self.o_proj = RowParallelLinear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            bias=config.attention_output_bias,
            parallel=parallel,
            dtype=dtype,
        )
        self.q_norm = GemmaRMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype)
        self.k_norm = GemmaRMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype)
        self.rotary_emb = rotary_emb
        self.attn = RadixAttention(
            self.num_heads,
            config.head_dim,
            config.head_dim**-0.5,
            self.qkv_proj.num_kv_heads,
            layer_id,
        )

    def forward(
        self, x: torch.Tensor, forward_batch: ForwardBatch, *, rows_pruned: bool
    ) -> torch.Tensor:
        """Attend from x [T, hidden]: [T, hidden], or [R, hidden] when `rows_pruned`."""
        positions = forward_batch.positions
        if rows_pruned:
            rows = forward_batch.logits_rows
            both = self.qkv_proj.queries(take_rows(x, rows))
            k, v = self.qkv_proj.keys_values(x)
            asked = take_rows(positions, rows)
        else:
            both, k, v = self.qkv_proj.split(self.qkv_proj(x))
            asked = positions
        # Keys first: the angles of all positions are at hand from the layer before.
        k = self._place(k.reshape(len(k), -1, self.head_dim), self.k_norm, positions)
        heads = both.reshape(len(both), self.num_heads, 2, self.head_dim)
        q = self._place(heads[:, :, 0], self.q_norm, asked)
        attended = self.attn(q, k, v, forward_batch, rows_pruned=rows_pruned)
        output: torch.Tensor = self.o_proj(attended * heads[:, :, 1].flatten(1).sigmoid())
        return output

    def _place(
        self, heads: torch.Tensor, norm: GemmaRMSNorm, positions: torch.Tensor
    ) -> torch.Tensor:
        """Heads [*, heads, D] normalised, their first dimensions turned: [*, heads * D]."""
        normed: torch.Tensor = norm(heads.contiguous())
        width = self.rotary_emb.head_dim
        if width == self.head_dim:
            return self.rotary_emb.rotate(positions, normed.flatten(1))
        turning = normed[..., :width].flatten(1)
        turned = self.rotary_emb.rotate(positions, turning).view(*normed.shape[:-1], width)
        return torch.cat((turned, normed[..., width:]), -1).flatten(1)


class Qwen3NextForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    mixture = MixtureOptions(shared="shared_expert")
    norm_class = GemmaRMSNorm
    orders_rows = False  # what turns of a head is cut out

    def make_model(
        self,
        config: ModelConfig,
        options: DecoderOptions,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> LlamaModel:
        del options  # of plain attention
        # The first dimensions of a head are cut out, and all of those turn.
        width, rope = config.rope.turned(config.head_dim), replace(config.rope, partial=1.0)
        rotary_emb = get_rope(width, rope, config.max_position_embeddings, dtype)
        planner = StatePlanner()
        layers: list[ArrangedDecoderLayer] = []
        for layer_id in range(config.num_layers):
            mlp, linear = self.make_mlp(config, layer_id, parallel, dtype), config.linear
            mixer: nn.Module
            if linear is not None and layer_id in linear.layers:
                mixer = GatedDeltaNet(config, linear, layer_id, planner, parallel, dtype)
                name = "linear_attn"
            else:
                mixer = GatedAttention(config, layer_id, rotary_emb, parallel, dtype)
                name = "self_attn"
            made = ArrangedDecoderLayer(
                config,
                mixer,
                mlp,
                self.norm_places,
                dtype,
                norm_class=self.norm_class,
                attention_name=name,
            )
            layers.append(made)
        return LlamaModel(config, layers, parallel, dtype, norm_class=self.norm_class)

    def adapter_sites(self) -> dict[str, AdapterSite]:
        """See `CausalLM.adapter_sites`; neither states nor gated queries take adapters."""
        sites = super().adapter_sites()
        closed = (".linear_attn.", ".self_attn.q_proj")
        return {name: site for name, site in sites.items() if not any(x in name for x in closed)}
