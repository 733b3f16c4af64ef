"""BERT and RoBERTa: encoders, in which every token of a prompt sees every other.

A prompt is computed whole in one step and nothing of it is kept: no K or V goes to the pool, so the
batch's slots and tables stay unused.

Shape letters: T packed tokens, R rows that are pooled, H heads, D head dim. Source: arXiv
1810.04805, 1907.11692, 1911.02116.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.model_traits import EncoderConfig
from sglang.srt.configs.pooling_config import PoolingConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.errors import InvariantError
from sglang.srt.layers.layernorm import LayerNorm
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.pooler import HeadLinear, Pooler
from sglang.srt.layers.prompt_attention import PromptGroup, attend_prompts, plan_groups
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.layers.weights import LoadedWeight, copy_checked, frozen_parameter
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.causal_lm import MergedProjections
from sglang.srt.models.pooled import PooledModel

Groups = tuple[PromptGroup, ...]

_PREFIXES = ("bert.", "roberta.")
# Of checkpoints of other tasks, and buffers that older versions of transformers saved.
_PASSED_OVER = ("cls.", "lm_head.", "embeddings.position_ids", "embeddings.token_type_ids")


class _Replicated(nn.Module):
    """Parameters that are whole on every rank."""

    def weight_loader(self, param_name: str, loaded: LoadedWeight) -> None:
        """Copy a whole parameter; ValueError for a wrong shape or kind."""
        if not isinstance(loaded, torch.Tensor):
            raise ValueError(f"{param_name}: quantised numbers don't belong here")
        copy_checked(self.get_parameter(param_name).data, loaded, param_name)


class _Table(_Replicated):
    """Rows int64 [T] -> [T, hidden]."""

    def __init__(self, num_rows: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = frozen_parameter(num_rows, hidden, dtype=dtype)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.weight.index_select(0, rows)


class BertEmbeddings(nn.Module):
    """What a token is, where it stands and which of two texts it belongs to, added up."""

    def __init__(
        self,
        config: ModelConfig,
        encoder: EncoderConfig,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size, hidden, parallel=parallel, dtype=dtype
        )
        self.position_embeddings = _Table(encoder.num_positions, hidden, dtype)
        self.token_type_embeddings = _Table(encoder.num_token_types, hidden, dtype)
        self.LayerNorm = LayerNorm(hidden, encoder.norm_eps, dtype=dtype)
        self._first_position = encoder.first_position
        self._num_types = encoder.num_token_types

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, is_second: torch.Tensor
    ) -> torch.Tensor:
        """int64 [T], int64 [T] from 0 and bool [T] -> [T, hidden]."""
        types = is_second.long().clamp_(max=self._num_types - 1)
        x = self.word_embeddings(input_ids).float()
        x += self.position_embeddings(positions + self._first_position)
        x += self.token_type_embeddings(types)
        normed: torch.Tensor = self.LayerNorm(x)
        return normed


class BertSelfAttention(nn.Module):
    """Attention over all tokens of a prompt."""

    def __init__(self, config: ModelConfig, parallel: ParallelState, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_heads,
            config.num_heads,
            bias=True,
            parallel=parallel,
            dtype=dtype,
        )

    def forward(self, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        """x [T, hidden] -> [T, H * D]."""
        heads = self.qkv(x).view(len(x), -1, self.head_dim)
        q, k, v = heads.chunk(3, 1)
        return attend_prompts(q, k, v, groups).flatten(1)


class _Output(nn.Module):
    """A projection back to the residual stream, and the norm behind the addition."""

    def __init__(
        self, width: int, hidden: int, eps: float, parallel: ParallelState, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dense = RowParallelLinear(width, hidden, bias=True, parallel=parallel, dtype=dtype)
        self.LayerNorm = LayerNorm(hidden, eps, dtype=dtype)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.LayerNorm(self.dense(x).float() + residual)
        return added


class BertLayer(nn.Module):
    """Attention and MLP, a norm behind each; the names of modules are the checkpoints'."""

    def __init__(
        self,
        config: ModelConfig,
        encoder: EncoderConfig,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        hidden, width, eps = config.hidden_size, config.intermediate_size, encoder.norm_eps
        self.attention = nn.ModuleDict(
            {
                "self": BertSelfAttention(config, parallel, dtype),
                "output": _Output(config.q_size, hidden, eps, parallel, dtype),
            }
        )
        self.intermediate = nn.ModuleDict(
            {
                "dense": ColumnParallelLinear(
                    hidden, width, bias=True, parallel=parallel, dtype=dtype
                )
            }
        )
        self.output = _Output(width, hidden, eps, parallel, dtype)

    def forward(self, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]."""
        x = self.attention["output"](self.attention["self"](x, groups), x)
        found: torch.Tensor = self.output(F.gelu(self.intermediate["dense"](x)), x)
        return found


class BertEncoder(nn.Module):
    """The layers, under the name that checkpoints give them."""

    def __init__(
        self,
        config: ModelConfig,
        encoder: EncoderConfig,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            BertLayer(config, encoder, parallel, dtype) for _ in range(config.num_layers)
        )


class BertHead(nn.Module):
    """A classifier's two layers: vectors [P, hidden] -> logits [P, labels] in float32."""

    def __init__(self, hidden: int, num_labels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = HeadLinear(hidden, hidden, bias=True, dtype=dtype)
        self.out = HeadLinear(hidden, num_labels, bias=True, dtype=dtype)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(torch.tanh(self.dense(vectors)))
        return logits


class BertModel(PooledModel):
    """The whole encoder. Parameters are uninitialised until `load_weights`.

    Raises ValueError when the heads can't be divided over the ranks.
    """

    merged_projections: ClassVar[MergedProjections] = {
        "qkv": (("query", "q"), ("key", "k"), ("value", "v")),
    }

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelState,
        dtype: torch.dtype,
        pooling: PoolingConfig,
    ) -> None:
        encoder = config.encoder
        if encoder is None:
            raise InvariantError(f"{config.architecture} is no encoder")
        head = None
        if pooling.labels is not None:
            head = BertHead(config.hidden_size, len(pooling.labels), dtype)
        super().__init__(config, Pooler(head))
        self.embeddings = BertEmbeddings(config, encoder, parallel, dtype)
        self.encoder = BertEncoder(config, encoder, parallel, dtype)
        self.head = head

    def forward(self, forward_batch: ForwardBatch) -> torch.Tensor:
        """Hidden states [R, hidden] of the rows that are pooled; nothing is stored."""
        geometry, pooled = forward_batch.geometry, forward_batch.pooled
        if pooled is None or geometry.extend_prefix_lens.any():
            raise InvariantError("an encoder computes whole prompts, to be pooled")
        positions = forward_batch.positions
        lens = geometry.extend_seq_lens
        second_from = torch.from_numpy(pooled.second_from.repeat(lens)).to(positions.device)
        is_second = positions >= second_from
        x: torch.Tensor = self.embeddings(forward_batch.input_ids, positions, is_second)
        groups = plan_groups(lens.tolist(), positions.device)
        for layer in self.encoder.layer:
            x = layer(x, groups)
            forward_batch.progress.tick()
        return x.index_select(0, forward_batch.logits_rows)

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """See `CausalLM.load_weights`."""
        super().load_weights(self._renamed(weights))

    def _renamed(
        self, weights: Iterable[tuple[str, LoadedWeight]]
    ) -> Iterator[tuple[str, LoadedWeight]]:
        """What the model has a place for, by the names that it has here."""
        has_head = self.head is not None
        for name, tensor in weights:
            for prefix in _PREFIXES:
                name = name.removeprefix(prefix)
            # The oldest checkpoints have TensorFlow's names.
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
            name = name.replace("LayerNorm.beta", "LayerNorm.bias")
            if name.startswith(("pooler.dense.", "classifier.")):
                if not has_head:
                    continue
                # BERT's first layer is its pooler's, RoBERTa's one of the classifier itself.
                leaf = name.rpartition(".")[2]
                name = f"head.{'dense' if '.dense.' in name else 'out'}.{leaf}"
            if not name.startswith(_PASSED_OVER):
                yield name, tensor
