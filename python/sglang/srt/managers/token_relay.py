"""The last sampled token of every KV row: from one step to the next, before the host has seen it.

The worker's thread asks for a step's batch with its tokens filled in, and notes what was sampled.
On the host a relay is an array; on a device that runs behind the host it stays there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.utils.device import DeviceRuntime


class TokenRelay(Protocol):
    """`HostRelay` and `DeviceRelay`; used from one thread."""

    def fill(self, batch: ForwardBatch, rows: Sequence[int]) -> ForwardBatch:
        """The batch where it is computed, its tokens `relay_at` filled in.

        `rows` are the KV rows that the step samples. Raises InvariantError for slots outside the
        pool where nobody looks at them any more.
        """

    def note(self, token_ids: torch.Tensor) -> None:
        """int64 [len(rows)] were sampled for the rows of the last `fill`."""


class HostRelay:
    """For a device that is the host: few operations, each a microsecond."""

    def __init__(self, num_rows: int) -> None:
        self._tokens = np.zeros(num_rows, np.int64)
        self._rows = np.empty(0, np.int64)

    def fill(self, batch: ForwardBatch, rows: Sequence[int]) -> ForwardBatch:
        """See `TokenRelay`."""
        self._rows = np.array(rows, np.int64)
        if len(batch.relay_at):
            batch.input_ids.numpy()[batch.relay_at] = self._tokens[batch.relay_rows]
        return batch

    def note(self, token_ids: torch.Tensor) -> None:
        """See `TokenRelay`."""
        self._tokens[self._rows] = token_ids.numpy()


class DeviceRelay:
    """For a device of its own: inputs go there in one transfer, sampled tokens stay there."""

    def __init__(self, runtime: DeviceRuntime, num_rows: int) -> None:
        self._runtime = runtime
        self._tokens = torch.zeros(num_rows, dtype=torch.int64, device=runtime.device)
        self._rows = torch.empty(0, dtype=torch.int64, device=runtime.device)

    def fill(self, batch: ForwardBatch, rows: Sequence[int]) -> ForwardBatch:
        """See `TokenRelay`."""
        sampled = torch.tensor(rows, dtype=torch.int64)
        batch, (self._rows, relay_at, relay_rows) = batch.moved(self._runtime, sampled)
        if len(relay_at):
            batch.input_ids.index_copy_(0, relay_at, self._tokens.index_select(0, relay_rows))
        return batch

    def note(self, token_ids: torch.Tensor) -> None:
        """See `TokenRelay`."""
        self._tokens.index_copy_(0, self._rows, token_ids)
