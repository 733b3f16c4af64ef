"""Llama, and the pre-norm decoder that its relatives share.

`LlamaForCausalLM` builds the decoder from `DecoderOptions`; the other families are the same class
with other options. In the last layer only the rows whose logits are wanted go through queries,
attention and MLP; the rest of a prefill chunk needs only its K and V there.

Shape letters: T packed new tokens, R rows whose logits are wanted, H query heads, G kv heads,
D head dim. Source: arXiv 2302.13971, 2407.21783.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.head_norm import HeadsNorm
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import RotaryEmbedding, get_rope
from sglang.srt.layers.rows import take_rows
from sglang.srt.layers.scaled import scaled
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.causal_lm import CausalLM, MergedProjections


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """Where the families differ.

    `windows[l]` is layer l's sliding window and `chunks[l]` its attention chunk, in tokens or None
    for neither; an empty tuple means that no layer has one. `qk_norm` normalises every head by the
    same weight, `heads_norm` is another way to normalise those of a token (None: there is none).
    `scaling` (None: head_dim ** -0.5) and `logit_cap` are those of `RadixAttention`.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    heads_norm: type[HeadsNorm] | None = None
    windows: tuple[int | None, ...] = ()
    chunks: tuple[int | None, ...] = ()
    scaling: float | None = None
    logit_cap: float = 0.0

    def window(self, layer_id: int) -> int | None:
        return self.windows[layer_id] if self.windows else None

    def chunk(self, layer_id: int) -> int | None:
        return self.chunks[layer_id] if self.chunks else None


class LlamaMLP(nn.Module):
    """down(act(gate(x)) * up(x)); `activation` maps gate and up together, None is `SiluAndMul`."""

    def __init__(
        self,
        hidden: int,
        width: int,
        bias: bool,
        parallel: ParallelState,
        dtype: torch.dtype,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, (width, width), bias=bias, parallel=parallel, dtype=dtype
        )
        self.down_proj = RowParallelLinear(width, hidden, bias=bias, parallel=parallel, dtype=dtype)
        self.act_fn = SiluAndMul() if activation is None else activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = self.act_fn(self.gate_up_proj(x))
        output: torch.Tensor = self.down_proj(gated)
        return output


class LlamaAttention(nn.Module):
    """Self-attention with grouped kv heads; `rotary_emb` None: nothing turns by its position."""

    norm_class: ClassVar[type[RMSNorm]] = RMSNorm
    rotates_last: ClassVar[bool] = True  # nothing happens to heads between rotation and store

    def __init__(
        self,
        config: ModelConfig,
        options: DecoderOptions,
        layer_id: int,
        rotary_emb: RotaryEmbedding | None,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_heads,
            config.num_kv_heads,
            v_head_dim=config.v_head_dim,
            bias=options.qkv_bias,
            parallel=parallel,
            dtype=dtype,
        )
        self.o_proj = RowParallelLinear(
            config.num_heads * config.v_head_dim,
            config.hidden_size,
            bias=options.output_bias,
            parallel=parallel,
            dtype=dtype,
        )
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if options.qk_norm:
            self.q_norm = self.norm_class(config.head_dim, config.rms_norm_eps, dtype=dtype)
            self.k_norm = self.norm_class(config.head_dim, config.rms_norm_eps, dtype=dtype)
        elif options.heads_norm is not None:
            self.q_norm, self.k_norm = (
                options.heads_norm(heads, config.head_dim, config.rms_norm_eps, parallel, dtype)
                for heads in (config.num_heads, config.num_kv_heads)
            )
        self.rotary_emb = rotary_emb
        self.attn = RadixAttention(
            self.qkv_proj.num_heads,
            config.head_dim,
            config.head_dim**-0.5 if options.scaling is None else options.scaling,
            self.qkv_proj.num_kv_heads,
            layer_id,
            sliding_window=options.window(layer_id),
            attention_chunk=options.chunk(layer_id),
            v_head_dim=config.v_head_dim,
            logit_cap=options.logit_cap,
        )

    def forward(
        self, x: torch.Tensor, forward_batch: ForwardBatch, *, rows_pruned: bool
    ) -> torch.Tensor:
        """Attend from x [T, hidden]: [T, hidden], or [R, hidden] when `rows_pruned`."""
        positions, rotation = forward_batch.positions, None
        if not rows_pruned and self.rotates_last and forward_batch.attn_backend.rotates:
            q, k, v = self.qkv_proj.split(self.qkv_proj(x))
            q, k = self._norm_heads(q, self.q_norm), self._norm_heads(k, self.k_norm)
            if self.rotary_emb is not None:
                rotation = self.rotary_emb.rotation(positions)
        elif not rows_pruned:
            q, k, v = self.place(self.qkv_proj(x), positions)
        else:
            rows = forward_batch.logits_rows
            q = self.qkv_proj.queries(take_rows(x, rows))
            k, v = self.qkv_proj.keys_values(x)
            # Keys first: the angles of all positions are at hand from the layer before.
            k = self.place_keys(k, positions)
            q = self.place_queries(q, take_rows(positions, rows))
        attended = self.attn(q, k, v, forward_batch, rows_pruned=rows_pruned, rotation=rotation)
        output: torch.Tensor = self.o_proj(attended)
        return output

    def place(
        self, qkv: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of the projections' output, q and k placed at int64 `positions` [T]."""
        q, k, v = self.qkv_proj.split(qkv)
        if self.q_norm is not None or self.k_norm is not None:
            return self.place_queries(q, positions), self.place_keys(k, positions), v
        if self.rotary_emb is None:
            return q, k, v
        heads = self.rotary_emb.rotate(positions, qkv[:, : q.shape[1] + k.shape[1]])
        return heads[:, : q.shape[1]], heads[:, q.shape[1] :], v

    def place_queries(self, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """q [*, H*D] normalised and turned to its positions int64 [*]."""
        q = self._norm_heads(q, self.q_norm)
        return q if self.rotary_emb is None else self.rotary_emb.rotate(positions, q)

    def place_keys(self, k: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As `place_queries`, for k [*, G*D]."""
        k = self._norm_heads(k, self.k_norm)
        return k if self.rotary_emb is None else self.rotary_emb.rotate(positions, k)

    def _norm_heads(self, x: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
        """Normalise the heads of x [*, heads * D]; as it is when the family has no such norm."""
        if norm is None:
            return x
        if isinstance(norm, HeadsNorm):
            return norm.over_heads(x)
        num_heads = x.shape[1] // self.head_dim
        normed: torch.Tensor = norm(x.view(-1, num_heads, self.head_dim))
        return normed.flatten(1)


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm, each added to the residual stream.

    Checkpoints call the MLP `mlp_name`.
    """

    mlp_name: ClassVar[str] = "mlp"

    def __init__(
        self, config: ModelConfig, self_attn: nn.Module, mlp: nn.Module, dtype: torch.dtype
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = self_attn
        self.add_module(self.mlp_name, mlp)
        self.input_layernorm = RMSNorm(hidden, eps, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype=dtype)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, residual), both to be added up by the next norm; [R, hidden] when pruned.

        The residual stream is float32; the first layer's x is its beginning.
        """
        if residual is None:
            x, residual = self.input_layernorm.begin(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, forward_batch, rows_pruned=rows_pruned)
        if rows_pruned:
            residual = take_rows(residual, forward_batch.logits_rows)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.get_submodule(self.mlp_name)(x), residual


class LlamaModel(nn.Module):
    """Embedding, decoder layers and the final norm. Embeddings are `embed_factor` times as large
    as the checkpoint's."""

    def __init__(
        self,
        config: ModelConfig,
        layers: Iterable[nn.Module],
        parallel: ParallelState,
        dtype: torch.dtype,
        *,
        norm_class: type[RMSNorm] = RMSNorm,
        embed_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, parallel=parallel, dtype=dtype
        )
        self.layers = nn.ModuleList(layers)
        self.norm = norm_class(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.embed_factor = embed_factor

    def forward(
        self, forward_batch: ForwardBatch, embedded: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states [R, hidden] of the wanted rows.

        `embedded` [T, hidden] is what the layers get in place of the tokens' embeddings.
        """
        x = self.embed(forward_batch.input_ids) if embedded is None else embedded
        residual: torch.Tensor | None = None
        # Ascending rows without repeats: as many as tokens means every token, in order.
        prune = len(forward_batch.logits_rows) < forward_batch.num_tokens
        last = len(self.layers) - 1
        states = forward_batch.layer_states
        for layer_id, layer in enumerate(self.layers):
            if states is not None and layer_id in states.layers:
                states.note(x, residual)
            x, residual = layer(x, residual, forward_batch, rows_pruned=prune and layer_id == last)
            forward_batch.progress.tick()
        normed: torch.Tensor = self.norm(x, residual)[0]
        return normed

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What the layers get for tokens int64 [T]: [T, hidden]."""
        embedded: torch.Tensor = self.embed_tokens(input_ids)
        return embedded if self.embed_factor == 1.0 else scaled(embedded, self.embed_factor)


class LlamaForCausalLM(CausalLM):
    """The whole model. `options` None: what `config` says of a Llama.

    Parameters are uninitialised until `load_weights`. Raises ValueError when the heads can't be
    divided over the ranks.
    """

    attention_class: ClassVar[type[LlamaAttention]] = LlamaAttention
    merged_projections: ClassVar[MergedProjections] = {
        "qkv_proj": (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")),
        "gate_up_proj": (("gate_proj", 0), ("up_proj", 1)),
    }

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelState,
        dtype: torch.dtype,
        options: DecoderOptions | None = None,
    ) -> None:
        super().__init__()
        if options is None:
            options = DecoderOptions(
                qkv_bias=config.attention_bias,
                output_bias=config.attention_output_bias,
                mlp_bias=config.mlp_bias,
            )
        self.config = config
        self.options = options
        self.model = self.make_model(config, options, parallel, dtype)
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            parallel=parallel,
            dtype=dtype,
            tied_to=self.model.embed_tokens if config.tie_word_embeddings else None,
            logit_factor=config.logit_factor,
            logit_cap=config.final_logit_cap,
            bias=config.head_bias,
        )

    def make_model(
        self,
        config: ModelConfig,
        options: DecoderOptions,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> LlamaModel:
        """The decoder; families whose layers differ build it from their own."""
        # One module for all layers: it computes the angles of a batch once.
        rotary_emb = get_rope(
            config.head_dim,
            config.rope,
            config.max_position_embeddings,
            dtype,
            interleaved=config.interleaved_rope,
        )
        layers = [
            LlamaDecoderLayer(
                config,
                self.attention_class(config, options, layer_id, rotary_emb, parallel, dtype),
                self.make_mlp(config, layer_id, parallel, dtype),
                dtype,
            )
            for layer_id in range(config.num_layers)
        ]
        return LlamaModel(config, layers, parallel, dtype)

    def make_mlp(
        self, config: ModelConfig, layer_id: int, parallel: ParallelState, dtype: torch.dtype
    ) -> nn.Module:
        """What follows attention in layer `layer_id`."""
        del layer_id  # here all are alike
        width, bias = config.intermediate_size, self.options.mlp_bias
        return LlamaMLP(config.hidden_size, width, bias, parallel, dtype)

    def forward(self, forward_batch: ForwardBatch) -> torch.Tensor:
        """See `CausalLM.forward`."""
        hidden: torch.Tensor = self.model(forward_batch)
        return hidden
