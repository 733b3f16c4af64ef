"""The token embedding and the output head, split over ranks by vocabulary.

Each rank holds `ceil(vocab / tp_size)` rows; the last ranks' missing rows are zero and never
chosen. Models build both, the loader fills them, `LogitsProcessor` calls the head.
"""

from __future__ import annotations

import torch

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.quantization.matrix import numbers_like
from sglang.srt.layers.quantization.rounding import Rounding
from sglang.srt.layers.rows import take_rows
from sglang.srt.layers.scaled import scaled
from sglang.srt.layers.weights import (
    LoadedWeight,
    WeightOwner,
    copy_checked,
    frozen_parameter,
    give_memory,
    narrow_rows,
)


class _VocabShard(WeightOwner):
    """Rows [first, first + rows_here) of a [num_embeddings, hidden] table."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, parallel: ParallelState, dtype: torch.dtype
    ) -> None:
        rows = -(-num_embeddings // parallel.tp_size)
        super().__init__(rows, embedding_dim, dtype)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self._parallel = parallel
        self._first = parallel.tp_rank * rows
        self._filled = max(0, min(rows, num_embeddings - self._first))

    def weight_loader(self, param_name: str, loaded: LoadedWeight) -> None:
        """Copy this rank's rows of the whole table; ValueError for a wrong name or shape."""
        if param_name != "weight":
            raise ValueError(f"{type(self).__name__} has no parameter {param_name!r}")
        if tuple(loaded.shape) != (self.num_embeddings, self.embedding_dim):
            raise ValueError(
                f"weight: the checkpoint has shape {tuple(loaded.shape)}, "
                f"the model needs {(self.num_embeddings, self.embedding_dim)}"
            )
        if self._filled < len(self.weight):
            if not isinstance(loaded, torch.Tensor):
                loaded = numbers_like(loaded, self.weight)
            give_memory(self.weight)
            self.weight.data[self._filled :].zero_()
            self._rows_loaded += len(self.weight) - self._filled
        self.load_rows(0, narrow_rows(loaded, self._first, self._filled), "weight")


class VocabParallelEmbedding(_VocabShard):
    """Token ids [T] -> embeddings [T, embedding_dim]; ids must be in [0, num_embeddings)."""

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
            return self._look_up(input_ids)
        local = input_ids - self._first
        foreign = (local < 0) | (local >= self._filled)
        part = self._look_up(local.masked_fill(foreign, 0))
        return self._parallel.all_reduce(part.masked_fill(foreign.unsqueeze(-1), 0))

    def _look_up(self, rows: torch.Tensor) -> torch.Tensor:
        if self.quantized is not None:
            return self.quantized.take(rows, self.weight.dtype)
        return take_rows(self.weight, rows)


class ParallelLMHead(_VocabShard):
    """Hidden rows [R, embedding_dim] -> logits [R, num_embeddings] in the weight's dtype.

    `tied_to` shares the embedding's rows instead of owning some. Logits are multiplied by
    `logit_factor`, a `bias` is added; then a `logit_cap` c > 0 turns a logit s into
    c * tanh(s / c), computed and given in float32.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        parallel: ParallelState,
        dtype: torch.dtype,
        tied_to: VocabParallelEmbedding | None = None,
        logit_factor: float = 1.0,
        logit_cap: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, parallel, dtype)
        self.bias = frozen_parameter(num_embeddings, dtype=dtype) if bias else None
        self.logit_factor = logit_factor
        self.logit_cap = logit_cap
        # In a tuple: the embedding's module belongs to the model, not to the head.
        self._table: tuple[WeightOwner, ...] = ()
        if tied_to is not None:
            self.weight = tied_to.weight
            self._table = (tied_to,)

    def quantize(self, rounding: Rounding) -> None:
        """See `WeightOwner.quantize`; a tied head leaves it to the embedding."""
        if not self._table:
            super().quantize(rounding)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.uncapped(hidden)
        return logits if self.logit_cap == 0.0 else self.cap(logits.float())

    def uncapped(self, hidden: torch.Tensor) -> torch.Tensor:
        """`forward` before the cap."""
        table = self._table[0] if self._table else self
        if self.logit_factor != 1.0:
            hidden = scaled(hidden, self.logit_factor)  # a row is shorter than its logits
        logits = table.product(hidden)
        if self._parallel.tp_size > 1:
            logits = self._parallel.all_gather(logits, -1)[..., : self.num_embeddings]
        return logits if self.bias is None else logits + self.bias

    def weight_loader(self, param_name: str, loaded: LoadedWeight) -> None:
        """See `_VocabShard`; every rank has the whole bias."""
        if param_name == "bias" and self.bias is not None and isinstance(loaded, torch.Tensor):
            copy_checked(self.bias.data, loaded, param_name)
        else:
            super().weight_loader(param_name, loaded)

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 `logits` with the cap, if there is one. Side effect: they are changed."""
        if self.logit_cap == 0.0:
            return logits
        return logits.div_(self.logit_cap).tanh_().mul_(self.logit_cap)
