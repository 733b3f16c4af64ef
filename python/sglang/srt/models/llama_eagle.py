"""EAGLE's and EAGLE-3's draft heads: one Llama layer on a model's hidden states.

Both read the embedding e of the token behind a place and a state of the place. EAGLE's state h is
what the model's output head reads, and so is what it makes:

    x = W [e; h],    a = x + attention(x),    h' = a + mlp(norm(a))

EAGLE-3's first state is made of what goes into three of the model's layers; its own output head
says tokens of a smaller vocabulary:

    g = W [low; mid; high],    a = g + attention([norm(e); norm(g)]),    g' = a + mlp(norm(a))

and logits come of norm(g'). Embeddings are the model's, as is EAGLE's output head. Sources: arXiv
2401.15077, 2503.01840; for the three layers vllm-project/vllm pull request 16937. Not compared with
published weights.

Shape letters: T packed tokens, R rows whose states are wanted, h hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.rows import take_rows
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.layers.weights import LoadedWeight
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.causal_lm import LoadedModel, MergedProjections
from sglang.srt.models.llama import DecoderOptions, LlamaAttention, LlamaForCausalLM, LlamaMLP

# Of checkpoints that have a copy of the model's, or say what follows from the rest.
_COPIES = frozenset({"embed_tokens.weight", "t2d"})
# Of later heads, which compute otherwise.
_STRANGE = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")


class EagleLayer(nn.Module):
    """Attention and MLP over a stream that begins with what the head made of its inputs.

    `width` numbers go into attention.
    """

    def __init__(
        self,
        config: ModelConfig,
        width: int,
        max_positions: int,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        options = DecoderOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            mlp_bias=config.mlp_bias,
        )
        rotary_emb = get_rope(config.head_dim, config.rope, max_positions, dtype)
        self.self_attn = LlamaAttention(config, options, 0, rotary_emb, parallel, dtype)
        if width != config.hidden_size:
            self.self_attn.qkv_proj = QKVParallelLinear(
                width,
                config.head_dim,
                config.num_heads,
                config.num_kv_heads,
                v_head_dim=config.v_head_dim,
                bias=options.qkv_bias,
                parallel=parallel,
                dtype=dtype,
            )
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype=dtype)
        self.mlp = LlamaMLP(hidden, config.intermediate_size, options.mlp_bias, parallel, dtype)

    def forward(
        self, x: torch.Tensor, stream: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """The stream [R, h] behind the layer, of inputs x [T, width] and its beginning [T, h]."""
        rows = forward_batch.logits_rows
        prune = len(rows) < forward_batch.num_tokens
        attended = self.self_attn(x, forward_batch, rows_pruned=prune)
        residual = take_rows(stream, rows) if prune else stream
        normed, residual = self.post_attention_layernorm(attended, residual.float())
        forward_batch.progress.tick()
        made: torch.Tensor = self.mlp(normed) + residual
        return made.to(x.dtype)


class EagleHead(LoadedModel, ABC):
    """What both heads have in common, a `HeadModel`; `config` is that of the head.

    Parameters are uninitialised until `load_weights`. Raises ValueError when head and model don't
    go together, or the heads can't be divided over the ranks.
    """

    merged_projections: ClassVar[MergedProjections] = LlamaForCausalLM.merged_projections
    state_layers: tuple[int, ...]
    token_ids: torch.Tensor | None

    def __init__(self, config: ModelConfig, target: LlamaForCausalLM) -> None:
        super().__init__()
        if config.num_layers != 1:
            raise ValueError(f"{config.path}: a head of {config.num_layers} layers is not served")
        for key in _STRANGE:
            if config.raw.get(key):
                raise ValueError(f"{config.path}: a head with {key} is not served")
        if config.hidden_size != target.config.hidden_size:
            raise ValueError(
                f"{config.path}: a head for states of {config.hidden_size} numbers; the model's "
                f"have {target.config.hidden_size}"
            )
        self.config = config
        # In a tuple: its modules are loaded, and counted, with the model.
        self._target = (target,)

    @property
    def target(self) -> LlamaForCausalLM:
        """The model that the head drafts for."""
        return self._target[0]

    @abstractmethod
    def forward(self, forward_batch: ForwardBatch, hidden: torch.Tensor) -> torch.Tensor:
        """See `HeadModel`."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `HeadModel`."""

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """See `LoadedModel`; names may begin with `model.`, as some writers have them."""
        super().load_weights((name.removeprefix("model."), tensor) for name, tensor in weights)

    def _may_be_ignored(self, name: str, tensor: LoadedWeight) -> bool:
        return name in _COPIES or super()._may_be_ignored(name, tensor)


class LlamaForCausalLMEagle(EagleHead):
    """EAGLE and EAGLE-2, whose trees are chains here."""

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelState,
        dtype: torch.dtype,
        target: LlamaForCausalLM,
    ) -> None:
        super().__init__(config, target)
        self.state_layers, self.token_ids = (), None
        hidden = config.hidden_size
        self.fc = ColumnParallelLinear(
            2 * hidden,
            hidden,
            bias=bool(config.raw.get("bias", False)),
            parallel=ParallelState(),
            dtype=dtype,
        )
        positions = target.config.max_position_embeddings
        self.layers = nn.ModuleList([EagleLayer(config, hidden, positions, parallel, dtype)])

    def forward(self, forward_batch: ForwardBatch, hidden: torch.Tensor) -> torch.Tensor:
        """See `HeadModel`."""
        embedded = self.target.model.embed(forward_batch.input_ids)
        x = self.fc(torch.cat((embedded, hidden), -1))
        made: torch.Tensor = self.layers[0](x, x, forward_batch)
        return made

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `HeadModel`."""
        logits: torch.Tensor = self.target.lm_head(hidden)
        return logits

    def _may_be_ignored(self, name: str, tensor: LoadedWeight) -> bool:
        return name == "lm_head.weight" or super()._may_be_ignored(name, tensor)


class Eagle3Layer(EagleLayer):
    """A layer with norms for both inputs of attention."""

    def __init__(
        self, config: ModelConfig, max_positions: int, parallel: ParallelState, dtype: torch.dtype
    ) -> None:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        super().__init__(config, 2 * hidden, max_positions, parallel, dtype)
        self.input_layernorm = RMSNorm(hidden, eps, dtype=dtype)
        self.hidden_norm = RMSNorm(hidden, eps, dtype=dtype)


class LlamaForCausalLMEagle3(EagleHead):
    """EAGLE-3: `d2t` [V of the head] is how far the model's token numbers lie behind its own."""

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelState,
        dtype: torch.dtype,
        target: LlamaForCausalLM,
    ) -> None:
        super().__init__(config, target)
        hidden = config.hidden_size
        vocab = int(config.raw.get("draft_vocab_size") or config.vocab_size)
        self.state_layers = _state_layers(config, target.config.num_layers)
        self.fc = ColumnParallelLinear(
            len(self.state_layers) * hidden, hidden, parallel=ParallelState(), dtype=dtype
        )
        positions = target.config.max_position_embeddings
        self.midlayer = Eagle3Layer(config, positions, parallel, dtype)
        self.norm = RMSNorm(hidden, config.rms_norm_eps, dtype=dtype)
        self.lm_head = ParallelLMHead(vocab, hidden, parallel=parallel, dtype=dtype)
        self.token_ids = None

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """See `EagleHead`; `d2t` is what `token_ids` come of."""
        super().load_weights(pair for pair in weights if not self._is_map(*pair))
        small, own = self.lm_head.num_embeddings, self.target.config.vocab_size
        if self.token_ids is None and small != own:
            raise ValueError(
                f"{self.config.path}: no d2t says which {small} tokens of {own} it has"
            )

    def _is_map(self, name: str, tensor: LoadedWeight) -> bool:
        """Whether it is `d2t`. Side effect: then `token_ids` are known."""
        if name.removeprefix("model.") != "d2t" or not isinstance(tensor, torch.Tensor):
            return False
        small, own = self.lm_head.num_embeddings, self.target.config.vocab_size
        ahead = tensor.to(self.lm_head.weight.device, torch.int64)
        if ahead.shape != (small,):
            raise ValueError(f"weight d2t: shape {tuple(ahead.shape)} for {small} tokens")
        known = ahead + torch.arange(small, device=ahead.device)
        if int(known.min()) < 0 or int(known.max()) >= own:
            raise ValueError(f"weight d2t leads to tokens that are none of {own}")
        self.token_ids = known
        return True

    def forward(self, forward_batch: ForwardBatch, hidden: torch.Tensor) -> torch.Tensor:
        """See `HeadModel`."""
        embedded = self.target.model.embed(forward_batch.input_ids)
        if hidden.shape[-1] != self.config.hidden_size:
            hidden = self.fc(hidden)
        layer = self.midlayer
        both = (layer.input_layernorm(embedded), layer.hidden_norm(hidden))
        made: torch.Tensor = layer(torch.cat(both, -1), hidden, forward_batch)
        return made

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `HeadModel`."""
        logits: torch.Tensor = self.lm_head(self.norm(hidden))
        return logits


def _state_layers(config: ModelConfig, num_layers: int) -> tuple[int, ...]:
    """The model's layers whose inputs the head reads; ValueError where it has no such layers."""
    told = config.raw.get("eagle_config") or {}
    layers = told.get("eagle_aux_hidden_state_layer_ids") or (2, num_layers // 2, num_layers - 3)
    if sorted(set(layers)) != list(layers) or not 0 <= min(layers) <= max(layers) < num_layers:
        raise ValueError(
            f"{config.path}: a head on what goes into layers {', '.join(map(str, layers))} of "
            f"{num_layers}"
        )
    return tuple(layers)
