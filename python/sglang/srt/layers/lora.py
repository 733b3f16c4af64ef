"""What LoRA adapters add to the products of a linear layer: each row its own adapter's, or nothing.

y = W x + B A x (arXiv 2106.09685); B holds the scale. Adapters lie in a fixed number of places,
side by side, so that none moves while a step computes. Rows are grouped by place: a step makes two
products for each adapter in it, however many rows there are. A recorded step, which may not depend
on who is where, makes the products of all places for every row and keeps each row's own. Under
tensor parallelism A or B is cut as the weight is, and the ranks' parts are summed where theirs are.

Shape letters: N places, P projections of a layer, r largest rank, K inputs, M outputs, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.layers.products import linear

Int64Array = npt.NDArray[np.int64]
Factors = tuple[torch.Tensor, torch.Tensor]
Mover = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class AdapterPart(NamedTuple):
    """Where a projection lies in a linear layer of this rank, and what of it is here.

    Outputs [first, first + rows) of the layer are outputs [source_first, source_first + rows) of
    the projection's `source_rows`; its inputs here are [column_first, column_first + columns) of
    `source_columns`.
    """

    first: int
    rows: int
    source_first: int
    source_rows: int
    column_first: int
    columns: int
    source_columns: int


class RowGroup(NamedTuple):
    """Rows of a step that have the adapter in `place`; `rows` None: all of them."""

    place: int
    rows: slice | torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The rows of a step by their adapters.

    `tokens` groups its `num_tokens` packed tokens, `wanted` the `num_wanted` rows whose logits are
    wanted, which is what is left of them in the last layer.
    """

    num_tokens: int
    tokens: tuple[RowGroup, ...]
    num_wanted: int
    wanted: tuple[RowGroup, ...]

    @classmethod
    def of_step(
        cls, places: Int64Array, lens: Int64Array, wanted: Int64Array, move: Mover
    ) -> AdapterRows:
        """From each sequence's place [B] (-1: no adapter) and tokens [B], and the wanted rows.

        `move` takes tensors to the device, all at once.
        """
        tokens = np.repeat(places, lens)
        both = (_groups(tokens), _groups(tokens[wanted]))
        scattered = [one.rows for groups in both for one in groups]
        moved = iter(move([rows for rows in scattered if isinstance(rows, torch.Tensor)]))
        of_tokens, of_wanted = (
            tuple(
                group._replace(rows=next(moved)) if isinstance(group.rows, torch.Tensor) else group
                for group in groups
            )
            for groups in both
        )
        return cls(len(tokens), of_tokens, len(wanted), of_wanted)

    def groups_of(self, num_rows: int) -> tuple[RowGroup, ...]:
        """The groups of a layer's rows: all tokens, or those that are wanted."""
        if num_rows == self.num_tokens:
            return self.tokens
        if num_rows != self.num_wanted:
            raise InvariantError(
                f"{num_rows} rows are neither a step's {self.num_tokens} nor its {self.num_wanted}"
            )
        return self.wanted


def _groups(places: Int64Array) -> tuple[RowGroup, ...]:
    groups = []
    for place in np.unique(places).tolist():
        if place < 0:
            continue
        at = np.flatnonzero(places == place)
        rows: slice | torch.Tensor | None = None
        if len(at) < len(places):
            first, last = int(at[0]), int(at[-1]) + 1
            is_run = last - first == len(at)
            rows = slice(first, last) if is_run else torch.from_numpy(at)
        groups.append(RowGroup(place, rows))
    return tuple(groups)


@dataclass(frozen=True, slots=True)
class AdapterMask:
    """The places of a step's rows as a tensor that may be written anew for each step.

    `own` [R, N] is one where a row has the adapter in a place, else zero.
    """

    own: torch.Tensor


class AdapterStep:
    """What all layers of a model look up while a step computes; set by the thread that computes."""

    def __init__(self) -> None:
        self.rows: AdapterRows | AdapterMask | None = None  # None: no row has an adapter


class LinearAdapters:
    """The places of one linear layer, all empty at first.

    `parts` are its projections that adapters may change, by shard, `num_outputs` all its outputs
    here. An adapter's A lie one below the other, and its B beside each other with zeros where the
    outputs are another projection's: one product each, whatever a layer has merged.
    """

    def __init__(
        self,
        parts: Mapping[int | str | None, AdapterPart],
        num_outputs: int,
        num_places: int,
        rank: int,
        like: torch.Tensor,
        step: AdapterStep,
    ) -> None:
        """Room for adapters up to `rank`, of the type and on the device of `like`."""
        self._parts = tuple(parts.items())
        self._rank = rank
        self._step = step
        width, ranks = self._parts[0][1].columns, len(parts) * rank
        self._a = like.new_zeros(num_places, ranks, width)  # [N, P * r, K]
        self._b = like.new_zeros(num_outputs, num_places, ranks)  # [M, N, P * r]

    @property
    def nbytes(self) -> int:
        """Bytes of all places."""
        return int(self._a.nbytes + self._b.nbytes)

    def put(self, place: int, factors: Mapping[int | str | None, Factors]) -> None:
        """Let a place hold an adapter's A [k, K] and B [m, k] by shard, and nothing else."""
        self._a[place].zero_()
        self._b[:, place].zero_()
        for i, (shard, part) in enumerate(self._parts):
            if shard in factors:
                a, b = factors[shard]
                low = i * self._rank
                self._a[place, low : low + len(a)].copy_(a)
                self._b[part.first : part.first + part.rows, place, low : low + len(a)].copy_(b)

    def as_bias(
        self, x: torch.Tensor, bias: torch.Tensor | None, first: int, last: int | None
    ) -> torch.Tensor | None:
        """What one row x [1, K] gets beside its outputs [first, last), as their bias [m].

        `bias` is added to it. None: there are more rows, or this one has no adapter.
        """
        rows = self._step.rows
        if not isinstance(rows, AdapterRows) or len(x) != 1:
            return None
        groups = rows.groups_of(1)
        if not groups:
            return None
        place = groups[0].place
        low = linear(x, self._a[place])
        return linear(low, self._b[first:last, place], bias).view(-1)

    def add_to(self, output: torch.Tensor, x: torch.Tensor, first: int) -> None:
        """Add to `output` [R, m], the layer's outputs from `first` on of x [R, K], in its place."""
        rows = self._step.rows
        if rows is None:
            return
        b = self._b[first : first + output.shape[1]]
        if isinstance(rows, AdapterMask):
            low = linear(x, self._a.flatten(0, 1)).view(*rows.own.shape, -1)
            output += linear((low * rows.own.unsqueeze(-1)).flatten(1), b.flatten(1))
            return
        for place, group in rows.groups_of(len(x)):
            low = linear(x if group is None else x[group], self._a[place])
            high = linear(low, b[:, place])
            if isinstance(group, torch.Tensor):
                output.index_add_(0, group, high)
            elif group is None:
                output += high
            else:
                output[group] += high
