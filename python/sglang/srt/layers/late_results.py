"""What a step on a device tells when it has come to the host: one tensor each, copied late.

`DeviceSampler` makes that of the sampled tokens, `LogitsProcessor` that of the prompts' log
probabilities; the worker copies them behind an event and reads them when that has come. So log
probabilities cost no wait of their own.

Legend: B rows to sample, V vocabulary, M rows that want log probabilities, K the most tokens that
one of them wants, N rows of a block of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.layers.logprobs import LogprobBlock, pack_logprobs, topk_without_waiting
from sglang.srt.managers.io_struct import LogprobArrays
from sglang.srt.model_executor.forward_batch_info import LogprobSpec
from sglang.srt.utils.device import DeviceRuntime

Int64Array = npt.NDArray[np.int64]


class Wanted(NamedTuple):
    """A row of a step that wants log probabilities, and what its logits are divided by."""

    row: int
    spec: LogprobSpec
    temperature: float


class StepTold(NamedTuple):
    """A step's `token_ids` int64 [B], log probabilities by row, and the rows that were invalid."""

    token_ids: Int64Array
    logprobs: list[LogprobArrays | None]
    invalid_rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LateResults:
    """`values` int64 [n] on the device are all that `read` needs of it.

    The tokens, a 1 for each invalid row, then of the M `wanted` rows: the token's own log
    probability, `top_num` ids and theirs, and the named ones one row after another. Numbers of
    float32 travel as their bits. `known` are the log probabilities that were made on the host.
    """

    values: torch.Tensor
    num_rows: int
    wanted: tuple[Wanted, ...] = ()
    top_num: int = 0
    known: Mapping[int, LogprobArrays] = field(default_factory=dict)

    def read(self, values: Int64Array) -> StepTold:
        """The results from a copy of `values` on the host."""
        rows, count, width = self.num_rows, len(self.wanted), self.top_num
        token_ids, invalid, rest = np.split(values, [rows, 2 * rows])
        own, top_ids, top, picked = np.split(
            rest, [count, count * (1 + width), count * (1 + 2 * width)]
        )
        top_ids, top = top_ids.reshape(count, width), top.reshape(count, width)
        logprobs: list[LogprobArrays | None] = [self.known.get(row) for row in range(rows)]
        first = 0
        for i, (row, spec, _) in enumerate(self.wanted):
            end, num = first + len(spec.picked_ids), min(spec.top_num, width)
            block = LogprobBlock(
                own=_floats(own[i : i + 1]),
                top_ids=top_ids[i : i + 1, :num].astype(np.int32),
                top=_floats(top[i : i + 1, :num]),
                picked=_floats(picked[None, first:end]),
            )
            tokens = token_ids[row : row + 1].astype(np.int32)
            logprobs[row] = pack_logprobs(tokens, [block], spec.picked_ids)
            first = end
        return StepTold(token_ids, logprobs, tuple(np.flatnonzero(invalid).tolist()))


class PromptRows(NamedTuple):
    """N rows of request `request`, the `top_num` largest of each; in order within a request."""

    request: int
    spec: LogprobSpec
    num_rows: int
    top_num: int

    @property
    def num_values(self) -> int:
        """Numbers of a row: its own, ids and numbers of the largest, and the named ones."""
        return self.num_rows * (1 + 2 * self.top_num + len(self.spec.picked_ids))


@dataclass(frozen=True, slots=True)
class LatePrompts:
    """`values` int32 [n] on the device hold the log probabilities of all `blocks`, one by one.

    A block has its rows' own numbers [N], ids [N, K] and numbers [N, K] of the largest, and the
    named ones [N, M]; numbers of float32 as their bits.
    """

    values: torch.Tensor
    num_requests: int
    blocks: tuple[PromptRows, ...]

    def read(self, values: npt.NDArray[np.int32]) -> list[LogprobArrays | None]:
        """Each request's log probabilities from a copy of `values` on the host."""
        found: dict[int, list[LogprobBlock]] = {}
        specs: dict[int, LogprobSpec] = {}
        first = 0
        for rows in self.blocks:
            block = values[first : first + rows.num_values]
            first += rows.num_values
            count, width = rows.num_rows, rows.num_rows * rows.top_num
            own, top_ids, top, picked = np.split(block, [count, count + width, count + 2 * width])
            specs[rows.request] = rows.spec
            found.setdefault(rows.request, []).append(
                LogprobBlock(
                    own=own.view(np.float32),
                    top_ids=top_ids.reshape(count, rows.top_num),
                    top=top.view(np.float32).reshape(count, rows.top_num),
                    picked=picked.view(np.float32).reshape(count, len(rows.spec.picked_ids)),
                )
            )
        told: list[LogprobArrays | None] = [None] * self.num_requests
        for request, blocks in found.items():
            spec = specs[request]
            told[request] = pack_logprobs(spec.input_targets, blocks, spec.picked_ids)
        return told


def reduce_late(
    logits: torch.Tensor, targets: torch.Tensor, top_num: int, picked_ids: torch.Tensor
) -> torch.Tensor:
    """`reduce_logits` as int32 [n] on the logits' device, see `LatePrompts`; waits for nothing.

    Arguments as there; `top_num` is at most V, NaN ranks anywhere.
    """
    total = torch.logsumexp(logits, -1, keepdim=True)
    own = logits.gather(-1, targets.unsqueeze(-1)) - total
    top, top_ids = topk_without_waiting(logits, top_num)
    picked = logits.index_select(-1, picked_ids) - total
    parts = (own, top_ids.to(torch.int32), top - total, picked)
    return torch.cat([part.flatten().view(torch.int32) for part in parts])


def gather_results(
    runtime: DeviceRuntime,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    invalid: torch.Tensor,
    wanted: Sequence[Wanted],
    known: Mapping[int, LogprobArrays],
) -> LateResults:
    """Results of a step: `tokens` int64 [B], `invalid` bool [B], and what is `wanted` of `logits`.

    `logits` float32 [B, V] are those that tokens were chosen from, without NaN. Waits for nothing.
    """
    parts = [tokens, invalid.to(torch.int64)]
    top_num = 0
    if wanted:
        top_num = min(max(one.spec.top_num for one in wanted), logits.shape[-1])
        parts += _log_probabilities(runtime, logits, tokens, wanted, top_num)
    return LateResults(torch.cat(parts), len(tokens), tuple(wanted), top_num, known)


def _log_probabilities(
    runtime: DeviceRuntime,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    wanted: Sequence[Wanted],
    top_num: int,
) -> list[torch.Tensor]:
    """Own, top ids, top and named ones, as `LateResults.values` has them."""
    picked_ids = [one.spec.picked_ids.astype(np.int64) for one in wanted]
    owners = np.repeat(np.arange(len(wanted)), [len(ids) for ids in picked_ids])
    rows, heat, at, ids = runtime.move(
        [
            torch.tensor([one.row for one in wanted]),
            torch.tensor([one.temperature for one in wanted], dtype=torch.float32),
            torch.from_numpy(owners),
            torch.from_numpy(np.concatenate(picked_ids)),
        ]
    )
    some = logits.index_select(0, rows)
    some = (some - some.amax(-1, keepdim=True)) / heat.unsqueeze(-1)
    total = torch.logsumexp(some, -1, keepdim=True)
    own = some.gather(-1, tokens.index_select(0, rows).unsqueeze(-1)) - total
    top, top_ids = topk_without_waiting(some, top_num)
    picked = some[at, ids] - total.squeeze(-1).index_select(0, at)
    return [_bits(own), top_ids.flatten(), _bits(top - total), _bits(picked)]


def _bits(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.flatten().view(torch.int32).to(torch.int64)


def _floats(bits: Int64Array) -> npt.NDArray[np.float32]:
    return bits.astype(np.int32).view(np.float32)
