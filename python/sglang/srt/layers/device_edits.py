"""Penalties, logit_bias and hidden stop tokens on a device that runs behind the host.

What penalties count is a row of a table there, one for each request that asks for them: the tokens
that the host knew when the request was admitted, and every token that a step samples, added on the
device before the host sees it. The table has a bounded number of rows; `DeviceSampler` leaves who
finds none to the host. Arithmetic and order are those of `SamplingRow.edit`.

Legend: B rows to sample, N of them with penalties, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch

from sglang.srt.layers.sampling_row import Int32Array, Int64Array, SamplingRow
from sglang.srt.utils.device import DeviceRuntime


class LogitEdits(NamedTuple):
    """What a step changes in its logits [B, V], as tensors on one device.

    `rows` int64 [N] have penalties: their `places` int64 [N] in the table, and `factors` float32
    [3, N] of repetition, frequency and presence. (`bias_rows`, `bias_ids`) get `bias` float32
    added, (`hidden_rows`, `hidden_ids`) are made impossible.
    """

    rows: torch.Tensor
    places: torch.Tensor
    factors: torch.Tensor
    bias_rows: torch.Tensor
    bias_ids: torch.Tensor
    bias: torch.Tensor
    hidden_rows: torch.Tensor
    hidden_ids: torch.Tensor


class CountTable:
    """What penalties count, for at most `num_places` requests at a time.

    `table` int32 [num_places, V] holds twice a token's count in the output, plus 1 where the prompt
    has it. Made on the device when the first such request is sampled; 4 bytes an entry.
    Invariants: a place is free, or one KV row's; what waits to be written has a row.
    """

    def __init__(self, num_places: int) -> None:
        self._free = list(reversed(range(num_places)))
        self._num_places = num_places
        self._places: dict[int, int] = {}  # by KV row
        self._new: dict[int, tuple[Int64Array, Int32Array]] = {}  # by place: ids, entries
        self._table = torch.empty(0, 0, dtype=torch.int32)

    def admit(self, row: int, state: SamplingRow) -> None:
        """Give a KV row a place while there is one; it is written by the next `settle`."""
        self.drop(row)
        if state.counts_tokens and self._free:
            place = self._places[row] = self._free.pop()
            self._new[place] = state.seen()

    def drop(self, row: int) -> None:
        """Free the row's place, if it has one."""
        place = self._places.pop(row, None)
        if place is not None:
            self._new.pop(place, None)
            self._free.append(place)

    def place(self, row: int) -> int | None:
        """Where the row's counts stand; None: nowhere."""
        return self._places.get(row)

    def settle(self, runtime: DeviceRuntime, vocab_size: int) -> None:
        """Write the counts of new rows into the table, which the first call makes."""
        if not self._table.numel():
            self._table = torch.zeros(
                self._num_places, vocab_size, dtype=torch.int32, device=runtime.device
            )
        if not self._new:
            return
        places = np.array(list(self._new), np.int64)
        lens = [len(ids) for ids, _ in self._new.values()]
        ids, entries = (np.concatenate(part) for part in zip(*self._new.values(), strict=True))
        self._new.clear()
        arrays = (places, np.repeat(places, lens), ids, entries)
        cleared, owners, tokens, values = runtime.move([torch.from_numpy(a) for a in arrays])
        self._table.index_fill_(0, cleared, 0)
        self._table.index_put_((owners, tokens), values)

    def penalise(self, logits: torch.Tensor, edits: LogitEdits) -> None:
        """Apply the penalties of `edits` to float32 `logits` [B, V], in place.

        Factors that are not asked for are 1 or 0, which changes no number.
        """
        if not len(edits.rows):
            return
        entries = self._table.index_select(0, edits.places)
        some = logits.index_select(0, edits.rows)
        repetition, frequency, presence = edits.factors.unsqueeze(-1)
        # At most five arrays of N x V are alive at once, fewer than what a sort takes.
        seen = torch.where(some > 0, some / repetition, some * repetition)
        some = torch.where(entries > 0, seen, some)
        del seen
        counts = entries.bitwise_right_shift_(1)  # a copy of the rows
        less = some - (frequency * counts).add_(presence)
        logits.index_copy_(0, edits.rows, torch.where(counts > 0, less, some))

    def add(self, edits: LogitEdits, tokens: torch.Tensor) -> None:
        """Count the sampled `tokens` int64 [B] of a step for the rows that have penalties."""
        if len(edits.rows):
            at = (edits.places, tokens.index_select(0, edits.rows))
            self._table.index_put_(at, self._table[at] + 2)


def plan_edits(
    states: Sequence[SamplingRow],
    places: Sequence[int | None],
    suppress_stop: Sequence[bool],
    left_out: Collection[int],
) -> LogitEdits | None:
    """The edits of a step's rows but those `left_out`, on the host; None: there are none.

    `places` are those of the rows in the table of counts.
    """
    here = [i for i in range(len(states)) if i not in left_out]
    counted = [i for i in here if places[i] is not None]
    biased = [i for i in here if len(states[i].bias_ids)]
    hiding = [i for i in here if suppress_stop[i] and len(states[i].stop_ids)]
    if not (counted or biased or hiding):
        return None
    params = [states[i].params for i in counted]
    factors = [
        [p.repetition_penalty for p in params],
        [p.frequency_penalty for p in params],
        [p.presence_penalty for p in params],
    ]
    return LogitEdits(
        torch.tensor(counted, dtype=torch.int64),
        torch.tensor([places[i] for i in counted], dtype=torch.int64),
        torch.tensor(factors, dtype=torch.float32),
        *_pairs(biased, [states[i].bias_ids for i in biased]),
        torch.cat([torch.empty(0), *(states[i].bias for i in biased)]),
        *_pairs(hiding, [states[i].stop_ids for i in hiding]),
    )


def _pairs(rows: Sequence[int], ids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row number as often as it has ids, and all ids; int64."""
    none = torch.empty(0, dtype=torch.int64)
    owners = [torch.full_like(some, row) for row, some in zip(rows, ids, strict=True)]
    return torch.cat([none, *owners]), torch.cat([none, *ids])


def add_bias_and_hide(logits: torch.Tensor, edits: LogitEdits) -> None:
    """Change float32 `logits` [B, V] in place: bias, then what is hidden; after penalties."""
    if len(edits.bias_rows):
        at = (edits.bias_rows, edits.bias_ids)
        logits.index_put_(at, logits[at] + edits.bias)
    if len(edits.hidden_rows):
        never = logits.new_full((), -float("inf"))
        logits.index_put_((edits.hidden_rows, edits.hidden_ids), never)
