"""DeepSeek-V3's layer of multi-token prediction, as a draft head.

From the model's hidden state h of token i, as its output head reads it, and the embedding e of
token i + 1 it makes what the same head reads to say token i + 2:

    norm(layer(W [enorm(e); hnorm(h)]))

The layer has the form of the model's own; embedding and output head are the model's. To draft on,
h is what was made. Sources: arXiv 2412.19437, section 2.2; README_WEIGHTS of the checkpoint;
for the order of e and h, and the norms that h has been through, sgl-project/sglang issue 6423 and
ROCm/ATOM pull request 1764. Not compared with the published weights.

Shape letters: T packed tokens, R rows whose states are wanted, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import ColumnParallelLinear
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.causal_lm import LoadedModel, MergedProjections
from sglang.srt.models.deepseek_v2 import DeepseekV2Attention, DeepseekV2ForCausalLM, latent_rope
from sglang.srt.models.llama import LlamaDecoderLayer, LlamaMLP
from sglang.srt.models.mixture import Mixture

# The model's own, of which checkpoints have a copy here.
_COPIES = ("embed_tokens.", "shared_head.head.")


class _SharedHead(nn.Module):
    """The norm before the model's output head."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)


class NextTokenLayer(LlamaDecoderLayer):
    """A decoder layer with what is before and behind it."""

    def __init__(
        self, config: ModelConfig, self_attn: nn.Module, mlp: nn.Module, dtype: torch.dtype
    ) -> None:
        super().__init__(config, self_attn, mlp, dtype)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps, dtype=dtype)
        self.hnorm = RMSNorm(hidden, eps, dtype=dtype)
        self.eh_proj = ColumnParallelLinear(
            2 * hidden, hidden, parallel=ParallelState(), dtype=dtype
        )
        self.shared_head = _SharedHead(config, dtype)

    def predict(
        self, embedded: torch.Tensor, hidden: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """What the output head reads, [R, h], from embeddings and states [T, h]."""
        joined = torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1)
        prune = len(forward_batch.logits_rows) < forward_batch.num_tokens
        x, residual = self(self.eh_proj(joined), None, forward_batch, rows_pruned=prune)
        forward_batch.progress.tick()
        normed: torch.Tensor = self.shared_head.norm(x, residual)[0]
        return normed


class _Behind(nn.Module):
    """A layer under the number that checkpoints give it."""

    def __init__(self, number: str, layer: NextTokenLayer) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({number: layer})


class DeepseekNextN(LoadedModel):
    """The first layer behind the last one of `target`, whose embedding and output head it shares.

    Parameters are uninitialised until `load_weights`. Raises ValueError when the heads can't be
    divided over the ranks.
    """

    merged_projections: ClassVar[MergedProjections] = DeepseekV2ForCausalLM.merged_projections
    state_layers: ClassVar[tuple[int, ...]] = ()
    token_ids: ClassVar[torch.Tensor | None] = None

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelState,
        dtype: torch.dtype,
        target: DeepseekV2ForCausalLM,
    ) -> None:
        super().__init__()
        latent = config.latent
        if latent is None:
            raise ValueError(f"{config.architecture} without latent attention")
        self.config = config
        # In a tuple: its modules are loaded, and counted, with the model.
        self._target = (target,)
        rotary_emb = latent_rope(config, latent, dtype, interleaved=config.interleaved_rope)
        attention = DeepseekV2Attention(config, latent, 0, rotary_emb, parallel, dtype)
        mlp: nn.Module
        if config.moe is None:
            mlp = LlamaMLP(config.hidden_size, config.intermediate_size, False, parallel, dtype)
        else:
            mlp = Mixture(config, config.moe, DeepseekV2ForCausalLM.mixture, parallel, dtype)
        self._number = str(config.num_layers)
        self.model = _Behind(self._number, NextTokenLayer(config, attention, mlp, dtype))

    def forward(self, forward_batch: ForwardBatch, hidden: torch.Tensor) -> torch.Tensor:
        """See `HeadModel`."""
        (target,), layer = self._target, self.model.layers[self._number]
        assert isinstance(layer, NextTokenLayer)
        return layer.predict(target.model.embed(forward_batch.input_ids), hidden, forward_batch)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `HeadModel`."""
        (target,) = self._target
        logits: torch.Tensor = target.lm_head(hidden)
        return logits

    @staticmethod
    def wanted_of(config: ModelConfig) -> Callable[[str], bool]:
        """Says by name which tensors of the model's checkpoint are this layer's own."""
        prefix = f"model.layers.{config.num_layers}."
        copies = tuple(prefix + name for name in _COPIES)
        return lambda name: name.startswith(prefix) and not name.startswith(copies)
