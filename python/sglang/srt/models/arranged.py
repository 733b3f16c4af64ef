"""A decoder whose layers are arranged by tables: where norms stand, which layers turn, factors.

Families that differ from Llama in these alone are `ArrangedForCausalLM` with other class variables;
everything else they are comes from `ModelConfig`.

Shape letters: T packed new tokens, R rows whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import ClassVar

import torch
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.activation import GatedActivation, GeluTanhAndMul, SiluAndMul
from sglang.srt.layers.head_norm import HeadsNorm, WideHeadNorm
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.residual import ResidualSum, begin_residual
from sglang.srt.layers.rotary_embedding import RotaryEmbedding, get_rope
from sglang.srt.layers.rows import take_rows
from sglang.srt.layers.scaled import scaled
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.llama import (
    DecoderOptions,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
)

_GATES: dict[str, type[GatedActivation]] = {
    "silu": SiluAndMul,
    "gelu_pytorch_tanh": GeluTanhAndMul,
}


@dataclass(frozen=True, slots=True)
class NormPlaces:
    """What checkpoints call the norms of a layer; None: there is none at that place.

    Those before attention and MLP normalise what these read, those after what they give, before it
    is added to the residual stream.
    """

    before_attention: str | None = None
    after_attention: str | None = None
    before_mlp: str | None = None
    after_mlp: str | None = None


PRE_NORMS = NormPlaces(before_attention="input_layernorm", before_mlp="post_attention_layernorm")
POST_NORMS = NormPlaces(
    after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm"
)
SANDWICH_NORMS = NormPlaces(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


class ArrangedDecoderLayer(nn.Module):
    """Attention and MLP between the norms of `places`, each added to the residual stream.

    `side_by_side`: the MLP reads what attention reads, not the stream after it.
    """

    def __init__(
        self,
        config: ModelConfig,
        self_attn: nn.Module,
        mlp: nn.Module,
        places: NormPlaces,
        dtype: torch.dtype,
        *,
        norm_class: type[RMSNorm] = RMSNorm,
        side_by_side: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        hidden, eps = config.hidden_size, config.rms_norm_eps
        norms: list[RMSNorm | None] = []
        for name in astuple(places):
            norms.append(None if name is None else norm_class(hidden, eps, dtype=dtype))
            if name is not None:
                self.add_module(name, norms[-1])
        self._norms = tuple(norms)
        self._sum = ResidualSum(hidden, dtype=dtype)
        self._side_by_side = side_by_side
        self._factor = config.residual_factor

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LlamaDecoderLayer.forward`."""
        before_attention, after_attention, before_mlp, after_mlp = self._norms
        x, residual = self._enter(before_attention, x, residual)
        attended = self.self_attn(x, forward_batch, rows_pruned=rows_pruned)
        attended = self._leave(after_attention, attended)
        if rows_pruned:
            residual = take_rows(residual, forward_batch.logits_rows)
        if not self._side_by_side:
            x, residual = self._enter(before_mlp, attended, residual)
            return self._leave(after_mlp, self.mlp(x)), residual
        if rows_pruned:
            x = take_rows(x, forward_batch.logits_rows)
        return self._leave(after_mlp, self.mlp(x)), self._sum(attended, residual)[1]

    def _enter(
        self, norm: RMSNorm | None, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention or MLP reads, and the stream with x in it."""
        if residual is None:
            return (x, begin_residual(x)) if norm is None else norm.begin(x)
        if norm is not None:
            normed: tuple[torch.Tensor, torch.Tensor] = norm(x, residual)
            return normed
        both: tuple[torch.Tensor, torch.Tensor] = self._sum(x, residual)
        return both

    def _leave(self, norm: RMSNorm | None, x: torch.Tensor) -> torch.Tensor:
        """What is added to the stream of what attention or MLP gave."""
        if norm is not None:
            x = norm(x)
        return x if self._factor == 1.0 else scaled(x, self._factor)


class ArrangedForCausalLM(LlamaForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    norm_places: ClassVar[NormPlaces] = PRE_NORMS
    norm_class: ClassVar[type[RMSNorm]] = RMSNorm
    heads_norm: ClassVar[type[HeadsNorm]] = WideHeadNorm  # where the configuration has one
    side_by_side: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, parallel: ParallelState, dtype: torch.dtype) -> None:
        options = DecoderOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            mlp_bias=config.mlp_bias,
            qk_norm=config.qk_norm,
            heads_norm=self.heads_norm if config.heads_norm else None,
            windows=config.layer_windows,
            scaling=config.attention_scaling,
            logit_cap=config.attention_logit_cap,
        )
        super().__init__(config, parallel, dtype, options)

    def make_model(
        self,
        config: ModelConfig,
        options: DecoderOptions,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> LlamaModel:
        rotations = _rotations(config, dtype)
        layers = [
            ArrangedDecoderLayer(
                config,
                self.attention_class(config, options, layer_id, rotary_emb, parallel, dtype),
                self.make_mlp(config, layer_id, parallel, dtype),
                self.norm_places,
                dtype,
                norm_class=self.norm_class,
                side_by_side=self.side_by_side,
            )
            for layer_id, rotary_emb in enumerate(rotations)
        ]
        return LlamaModel(
            config,
            layers,
            parallel,
            dtype,
            norm_class=self.norm_class,
            embed_factor=self.embed_factor(config, dtype),
        )

    def embed_factor(self, config: ModelConfig, dtype: torch.dtype) -> float:
        """What embeddings are multiplied by."""
        del dtype  # of those who know the factor in it
        return config.embedding_factor

    def make_mlp(
        self, config: ModelConfig, layer_id: int, parallel: ParallelState, dtype: torch.dtype
    ) -> nn.Module:
        """What follows attention in layer `layer_id`."""
        del layer_id  # here all are alike
        gate = _GATES[config.hidden_act]()
        width, bias = config.intermediate_size, self.options.mlp_bias
        return LlamaMLP(config.hidden_size, width, bias, parallel, dtype, gate)


def _rotations(config: ModelConfig, dtype: torch.dtype) -> list[RotaryEmbedding | None]:
    """How every layer turns. A module serves all layers that turn alike: it keeps the angles of a
    batch."""
    wide, narrow = (
        get_rope(
            config.head_dim,
            rope,
            config.max_position_embeddings,
            dtype,
            interleaved=config.interleaved_rope,
        )
        for rope in (config.rope, config.window_rope or config.rope)
    )
    if config.window_rope is None:
        narrow = wide
    kinds = zip(config.layer_rope, config.layer_windows, strict=True)
    return [(wide if window is None else narrow) if turns else None for turns, window in kinds]
