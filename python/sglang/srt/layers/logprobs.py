"""Log probabilities out of logits: the token's own, the largest, and those a user names.

Used on prompt rows by `LogitsProcessor` and on sampled rows by `Sampler`. Pure functions; the
result is packed as `LogprobArrays` for the way to the client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.managers.io_struct import LogprobArrays

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

Highest = tuple[torch.Tensor, torch.Tensor]
"""Each row's maximum float32 [N] and int64 [N], where it stands first; NaN for one with a NaN."""


@dataclass(frozen=True, slots=True)
class LogprobBlock:
    """Log probabilities of N rows: own [N], top ids and values [N, K], picked [N, M]."""

    own: Float32Array
    top_ids: Int32Array
    top: Float32Array
    picked: Float32Array


def reduce_logits(
    logits: torch.Tensor, targets: torch.Tensor, top_num: int, picked_ids: torch.Tensor
) -> LogprobBlock:
    """Log probabilities under softmax(logits), logits float32 [N, V], not modified.

    All three tensors lie on one device, whose work is waited for.

    `targets` int64 [N] are the tokens whose own probability is wanted, `picked_ids` int64 [M] those
    wanted of every row. At most V top entries; equal ones are ordered by id.
    """
    total = torch.logsumexp(logits, -1, keepdim=True)
    own = logits.gather(-1, targets.unsqueeze(-1)) - total
    top_num = min(top_num, logits.shape[-1])
    top, top_ids = stable_topk(logits, top_num)
    picked = logits[:, picked_ids] - total
    return LogprobBlock(
        own=own.squeeze(-1).cpu().numpy(),
        top_ids=top_ids.cpu().numpy().astype(np.int32),
        top=(top - total).cpu().numpy(),
        picked=picked.cpu().numpy(),
    )


def pack_logprobs(
    token_ids: Int32Array, blocks: Sequence[LogprobBlock], picked_ids: Int32Array
) -> LogprobArrays:
    """Put the blocks' rows one after another; `token_ids` int32 [N] are their own tokens."""
    own = np.concatenate([block.own for block in blocks])
    top_ids = np.concatenate([block.top_ids for block in blocks])
    return LogprobArrays(
        num_rows=len(own),
        token_ids=token_ids.astype("<i4").tobytes(),
        logprobs=own.astype("<f4").tobytes(),
        top_num=top_ids.shape[1],
        top_ids=top_ids.astype("<i4").tobytes(),
        top_logprobs=np.concatenate([block.top for block in blocks]).astype("<f4").tobytes(),
        picked_ids=picked_ids.astype("<i4").tobytes(),
        picked_logprobs=np.concatenate([block.picked for block in blocks]).astype("<f4").tobytes(),
    )


def stable_topk(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row of [N, V], descending, equal ones by ascending index.

    Exactly the head of a stable descending sort, at the price of a selection: torch.topk alone
    leaves open which of equal values it returns.
    """
    if k == 0:
        return values[:, :0], values.new_empty((values.shape[0], 0), dtype=torch.int64)
    top, ids = torch.topk(values, k, dim=-1)
    by_id = ids.argsort(-1)
    top, order = top.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, by_id).gather(-1, order)
    least = top[:, -1:]
    left_out = (values == least).sum(-1) > (top == least).sum(-1)
    for row in left_out.nonzero().flatten().tolist():
        candidates = (values[row] >= least[row]).nonzero().flatten()
        chosen = values[row][candidates].sort(descending=True, stable=True)[1][:k]
        ids[row] = candidates[chosen]
    return top, ids


def topk_without_waiting(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`stable_topk` of float32 [N, V] without NaN, by operations that look at no value.

    Numbers and places make one integer each, of which no two are equal: the number's bits, so
    turned that integers rank as they do, above the place counted from the end.
    """
    if k == 0:
        return values[:, :0], values.new_empty((len(values), 0), dtype=torch.int64)
    bits = (values + 0.0).view(torch.int32)  # -0 is 0 here
    ranked = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = values.shape[-1] - 1
    from_end = torch.arange(last, -1, -1, device=values.device)
    keys = (ranked.to(torch.int64) << 32).add_(from_end)
    ids = last - (torch.topk(keys, k, dim=-1).values & 0xFFFFFFFF)
    return values.gather(-1, ids), ids
