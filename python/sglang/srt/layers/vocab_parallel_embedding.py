"""The token embedding and the output head, split over ranks by vocabulary.

Each rank holds `ceil(vocab / tp_size)` rows; the last ranks' missing rows are zero and never
chosen. Models build both, the loader fills them, `LogitsProcessor` calls the head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.linear import copy_checked, frozen_parameter
from sglang.srt.layers.products import linear


class _VocabShard(nn.Module):
    """Rows [first, first + rows_here) of a [num_embeddings, hidden] table."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, parallel: ParallelState, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self._parallel = parallel
        rows = -(-num_embeddings // parallel.tp_size)
        self._first = parallel.tp_rank * rows
        self._filled = max(0, min(rows, num_embeddings - self._first))
        self.weight = frozen_parameter(rows, embedding_dim, dtype=dtype)

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """Copy this rank's rows of the whole table; ValueError for a wrong name or shape."""
        if param_name != "weight":
            raise ValueError(f"{type(self).__name__} has no parameter {param_name!r}")
        if tuple(loaded.shape) != (self.num_embeddings, self.embedding_dim):
            raise ValueError(
                f"weight: the checkpoint has shape {tuple(loaded.shape)}, "
                f"the model needs {(self.num_embeddings, self.embedding_dim)}"
            )
        here = self.weight.data
        copy_checked(here[: self._filled], loaded.narrow(0, self._first, self._filled), "weight")
        here[self._filled :].zero_()


class VocabParallelEmbedding(_VocabShard):
    """Token ids [*] -> embeddings [*, embedding_dim]; ids must be in [0, num_embeddings)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, parallel, dtype)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self._parallel.tp_size == 1:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self._first
        foreign = (local < 0) | (local >= self._filled)
        part = F.embedding(local.masked_fill(foreign, 0), self.weight)
        return self._parallel.all_reduce(part.masked_fill(foreign.unsqueeze(-1), 0))


class ParallelLMHead(_VocabShard):
    """Hidden rows [R, embedding_dim] -> logits [R, num_embeddings] in the weight's dtype.

    `tied_to` shares the embedding's rows instead of owning some. `logit_cap` c > 0 turns a logit s
    into c * tanh(s / c), computed and given in float32.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        parallel: ParallelState,
        dtype: torch.dtype,
        tied_to: VocabParallelEmbedding | None = None,
        logit_cap: float = 0.0,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, parallel, dtype)
        self.logit_cap = logit_cap
        if tied_to is not None:
            self.weight = tied_to.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = linear(hidden, self.weight)
        if self._parallel.tp_size > 1:
            logits = self._parallel.all_gather(logits, -1)[..., : self.num_embeddings]
        if self.logit_cap == 0.0:
            return logits
        return logits.float().div_(self.logit_cap).tanh_().mul_(self.logit_cap)
