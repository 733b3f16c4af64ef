"""What a request's vector is made of so far, while its prompt is computed chunk by chunk.

Plain arrays on the host: a chunk brings a vector as wide as the model, whatever its length. What
the device makes of hidden states is told in layers/pooler.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.managers.io_struct import PoolingSpec

Float32Array = npt.NDArray[np.float32]


class PoolingState:
    """One pooled request. `prompt_len` in tokens."""

    def __init__(self, spec: PoolingSpec, prompt_len: int) -> None:
        self.spec = spec
        self._prompt_len = prompt_len
        self._sum: Float32Array | None = None

    @property
    def needs_all_rows(self) -> bool:
        """Whether no prefix may come from the cache.

        A mean is over the hidden states of all tokens and "cls" is that of the first one, but the
        cache keeps K and V only: hidden states of a prefix that is hit would be missing. The last
        token is never part of a hit. Where tokens see what follows them nothing can be shared.
        """
        return self.spec.whole or self.spec.mode != "last"

    def rows(self, start: int, num_tokens: int) -> tuple[int, int]:
        """(first position, count) of what is pooled of a step's positions from `start` on."""
        end = start + num_tokens
        if self.spec.mode == "mean":
            return (start, num_tokens)
        if self.spec.mode == "cls":
            return (start, int(start == 0))
        return (end - 1, 1) if end == self._prompt_len else (start, 0)

    def add(self, vector: Float32Array) -> None:
        """Take what a step made of its rows: float32 [d], the sum of them."""
        self._sum = vector.copy() if self._sum is None else self._sum + vector

    def clear(self) -> None:
        """Forget everything: the prompt is computed again from its first token."""
        self._sum = None

    def vector(self) -> Float32Array:
        """The vector of the whole prompt, float32 [d]. Raises InvariantError before its end."""
        if self._sum is None:
            raise InvariantError("a prompt has ended and nothing of it was pooled")
        return self._sum / np.float32(self._prompt_len) if self.spec.mode == "mean" else self._sum
