"""DeepSeek-V2, V3 and R1: latent attention and mixtures of experts in groups.

What is kept of a token is a latent and a key that turns, one row for all heads; queries are taken
to the latents' side, so that every step, prompt or decode, is attention of many query heads over
one kv head (docs/kv_segments.md, Note [Latent attention]). The layers of multi-token prediction
that checkpoints of V3 have behind the last layer are models/deepseek_nextn.py.

Shape letters: T packed new tokens, R rows whose queries are wanted, H query heads of this rank,
N, P, V widths of a head's part that doesn't turn, that turns, and of its value; C latent width.
Sources: arXiv 2405.04434 (V2), 2412.19437 (V3).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.model_traits import LatentConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.latent_projection import LatentUpProjection
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import RotaryEmbedding, get_rope
from sglang.srt.layers.rows import take_rows
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.causal_lm import MergedProjections
from sglang.srt.models.llama import DecoderOptions, LlamaDecoderLayer, LlamaModel
from sglang.srt.models.mixture import MixtureForCausalLM

_WHOLE = ParallelState()  # of what every rank computes alike
_NORM_EPS = 1e-6  # of the norms inside attention, whatever the model's own


class DeepseekV2Attention(nn.Module):
    """Latent attention of one layer."""

    def __init__(
        self,
        config: ModelConfig,
        latent: LatentConfig,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.latent, self.rotary_emb = latent, rotary_emb
        hidden, heads = config.hidden_size, config.num_heads
        width = latent.nope_dim + latent.rope_dim
        bias = config.attention_bias
        self.num_heads = parallel.shard_size(heads, "attention heads")
        if latent.q_rank is None:
            self.q_proj = ColumnParallelLinear(
                hidden, heads * width, parallel=parallel, dtype=dtype
            )
        else:
            self.q_a_proj = ColumnParallelLinear(
                hidden, latent.q_rank, bias=bias, parallel=_WHOLE, dtype=dtype
            )
            self.q_a_layernorm = RMSNorm(latent.q_rank, _NORM_EPS, dtype=dtype)
            self.q_b_proj = ColumnParallelLinear(
                latent.q_rank, heads * width, parallel=parallel, dtype=dtype
            )
        self.kv_a_proj_with_mqa = ColumnParallelLinear(
            hidden, latent.row_width, bias=bias, parallel=_WHOLE, dtype=dtype
        )
        self.kv_a_layernorm = RMSNorm(latent.kv_rank, _NORM_EPS, dtype=dtype)
        self.kv_b_proj = LatentUpProjection(
            heads, latent.nope_dim, latent.v_dim, latent.kv_rank, parallel=parallel, dtype=dtype
        )
        self.o_proj = RowParallelLinear(
            heads * latent.v_dim,
            hidden,
            bias=config.attention_output_bias,
            parallel=parallel,
            dtype=dtype,
        )
        self.attn = RadixAttention(
            self.num_heads,
            latent.row_width,
            width**-0.5 * config.rope.softmax_scaling,
            1,
            layer_id,
            v_head_dim=latent.kv_rank,
            values_in_keys=True,
        )

    def forward(
        self, x: torch.Tensor, forward_batch: ForwardBatch, *, rows_pruned: bool
    ) -> torch.Tensor:
        """Attend from x [T, hidden]: [T, hidden], or [R, hidden] when `rows_pruned`."""
        positions, asked = forward_batch.positions, x
        # Keys first: the angles of all positions are at hand from the layer before.
        rows = self.kept_rows(x, positions)
        if rows_pruned:
            asked = take_rows(x, forward_batch.logits_rows)
            positions = take_rows(positions, forward_batch.logits_rows)
        q = self.queries(asked, positions)
        return self.attended(q, rows, forward_batch, rows_pruned=rows_pruned)

    def attended(
        self,
        q: torch.Tensor,
        rows: torch.Tensor,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> torch.Tensor:
        """Keep rows [T, C + P] of new tokens and attend with q [R, H * (C + P)]: [R, hidden]."""
        latents = rows[:, : self.latent.kv_rank]
        attended = self.attn(q, rows, latents, forward_batch, rows_pruned=rows_pruned)
        heads = attended.view(len(q), self.num_heads, self.latent.kv_rank)
        output: torch.Tensor = self.o_proj(self.kv_b_proj.values(heads))
        return output

    def kept_rows(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What is kept of tokens x [T, hidden] at int64 `positions` [T]: [T, C + P]."""
        both = self.kv_a_proj_with_mqa(x)
        latents, keys = both.split((self.latent.kv_rank, self.latent.rope_dim), -1)
        turned = self.rotary_emb.rotate(positions, keys.contiguous())
        return torch.cat((self.kv_a_layernorm(latents.contiguous()), turned), -1)

    def queries(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Queries of kept rows, from x [R, hidden] at int64 `positions` [R]: [R, H * (C + P)]."""
        if self.latent.q_rank is None:
            return self.turned(self.q_proj(x), positions)
        return self.turned(self.q_b_proj(self.query_latents(x)), positions)

    def query_latents(self, x: torch.Tensor) -> torch.Tensor:
        """What queries of x [R, hidden] are made of: [R, rank]."""
        latents: torch.Tensor = self.q_a_layernorm(self.q_a_proj(x))
        return latents

    def turned(self, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Heads q [R, H * (N + P)] as queries of kept rows: [R, H * (C + P)]."""
        widths = [self.latent.nope_dim, self.latent.rope_dim]
        still, turning = torch.split(q.view(len(q), self.num_heads, sum(widths)), widths, -1)
        turned = self.rotary_emb.rotate(positions, turning.flatten(1)).view(turning.shape)
        return torch.cat((self.kv_b_proj.queries(still), turned), -1).flatten(1)


def latent_rope(
    config: ModelConfig, latent: LatentConfig, dtype: torch.dtype, *, interleaved: bool
) -> RotaryEmbedding:
    """The rotation of the parts that turn."""
    length = config.max_position_embeddings
    return get_rope(latent.rope_dim, config.rope, length, dtype, interleaved=interleaved)


class DeepseekV2ForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    merged_projections: ClassVar[MergedProjections] = {
        "gate_up_proj": (("gate_proj", 0), ("up_proj", 1)),
    }

    def make_model(
        self,
        config: ModelConfig,
        options: DecoderOptions,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> LlamaModel:
        del options  # of attention that keeps heads
        latent = config.latent
        if latent is None:
            raise ValueError(f"{config.architecture} without latent attention")
        attentions = self.make_attentions(config, latent, parallel, dtype)
        layers = [
            LlamaDecoderLayer(
                config, attention, self.make_mlp(config, layer_id, parallel, dtype), dtype
            )
            for layer_id, attention in enumerate(attentions)
        ]
        return LlamaModel(config, layers, parallel, dtype)

    def make_attentions(
        self,
        config: ModelConfig,
        latent: LatentConfig,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> list[nn.Module]:
        """The attention of every layer, which all turn by one rotation."""
        rope = latent_rope(config, latent, dtype, interleaved=config.interleaved_rope)
        return [
            DeepseekV2Attention(config, latent, layer_id, rope, parallel, dtype)
            for layer_id in range(config.num_layers)
        ]


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """DeepSeek-V3 and R1, which differ from V2 in what their config says of experts alone."""
