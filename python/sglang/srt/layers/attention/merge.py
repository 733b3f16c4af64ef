"""Partial attention over some of the keys, and the exact merge of such partial results.

Attention over a union of key sets is the average of the parts' outputs, weighted by the
exponentials of their log-sum-exps. Backends compute parts wherever keys lie together and merge
here, in float32 whatever the parts' dtype: a running bf16 merge of 1,280 parts loses a third of
the value. Pure functions plus one accumulator; nothing here knows slots, tables or positions.

Sources: online softmax, arXiv 1805.02867; FlashAttention, arXiv 2205.14135; the merge as a tree,
arXiv 2408.04093.

Legend: M queries, N keys, G kv heads, J query heads per kv head, D head dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from sglang.srt.layers.products import cpu_multiplies

# A finite floor for log-sum-exps: exp(-inf - floor) is 0, exp(-inf - -inf) would be NaN.
_LSE_FLOOR = -1e30
# Where a CPU has no instructions for 16-bit floats, keys and values are widened, so many at a time;
# for fewer query rows than these that costs more than it saves.
_WIDENED_KEYS = 1 << 15
_FEW_ROWS = 8

# Parts that are summed up before they join the others: a sum's error grows with its length.
_BLOCK = 64

Partial = tuple[torch.Tensor, torch.Tensor]


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> Partial:
    """Torch's fused CPU attention: q [B, H, M, D], k and v [B, H, N, D], any strides but the last.

    `causal` needs M == N: query m sees keys [0, m]. `mask` is float32 [M, N], added to the scores.
    Returns the output [B, H, M, D] in q's dtype and the log-sum-exp [B, H, M] float32 (natural
    logarithm, scale included; 0 for a row whose mask hides every key).
    """
    result = torch._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return cast(Partial, result)


def partial_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    logit_cap: float = 0.0,
) -> Partial:
    """Attention of q [M, G, J, D] over k [N, G, D] and v [N, G, E], K and V never copied per head.

    `causal` needs M == N; `mask` is float32 [M, N] of 0 and -inf; `logit_cap` c > 0 turns a score
    s into c * tanh(s / c). All of one dtype. Returns the output [G, M, J, E] and the log-sum-exp
    [G, M, J] float32, -inf where a query sees no key.
    """
    if logit_cap > 0.0 or v.shape[-1] != q.shape[-1]:  # what the fused kernel cannot do
        if causal:
            mask = band_mask(q.shape[0], k.shape[0], 0, None, q.device)
        return dense_attention(q, k, v, scale, mask, logit_cap)
    m, g, j, d = q.shape
    if m * j >= _FEW_ROWS and k.device.type == "cpu" and not cpu_multiplies(k.dtype):
        return _widened_attention(q, k, v, scale, causal, mask)
    if not causal and mask is None:
        # The group's queries become rows of one head, so K and V are read once per kv head.
        rows = q.permute(1, 0, 2, 3).reshape(1, g, m * j, d)
        keys, values = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
        out, lse = flash_attention(rows, keys, values, scale)
        return out.reshape(g, m, j, d), lse.reshape(g, m, j)
    n = k.shape[0]
    # Each kv head is a batch of J query heads that share K and V by a stride of 0.
    keys = k.transpose(0, 1).unsqueeze(1).expand(g, j, n, d)
    values = v.transpose(0, 1).unsqueeze(1).expand(g, j, n, d)
    out, lse = flash_attention(q.permute(1, 2, 0, 3), keys, values, scale, causal=causal, mask=mask)
    if mask is not None:
        blind = torch.isneginf(mask).all(-1)
        lse = lse.masked_fill(blind, float("-inf"))
    return out.transpose(1, 2), lse.transpose(1, 2)


def _widened_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
) -> Partial:
    """`partial_attention` of 16-bit floats computed in float32, the output rounded once."""
    wide, parts = q.float(), PartialSum()
    step = k.shape[0] if causal else _WIDENED_KEYS
    for n in range(0, k.shape[0], step):
        some = None if mask is None else mask[:, n : n + step]
        keys, values = k[n : n + step].float(), v[n : n + step].float()
        parts.add(partial_attention(wide, keys, values, scale, causal=causal, mask=some))
    out, lse = parts.result()
    return out.to(q.dtype), lse


def band_mask(
    num_queries: int, num_keys: int, offset: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """Float32 [num_queries, num_keys], 0 where visible and -inf elsewhere.

    Query m stands `offset` + m positions after key 0 and sees keys up to its own position and,
    with a window, at most `window` of them.
    """
    distance = (
        torch.arange(num_queries, device=device).unsqueeze(1)
        + offset
        - torch.arange(num_keys, device=device)
    )
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))


def merge_partials(parts: Sequence[Partial]) -> Partial:
    """Merge outputs [..., E] of any dtype with their log-sum-exps [...], all at once in float32.

    Returns the merged output and log-sum-exp, both float32; the order of parts matters only to
    rounding. Rows that no part saw come out as 0 and -inf.
    """
    out, lse = _merge(parts)
    return out, lse.float()


def apply_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> None:
    """Let a key without value, whose logit is `sinks` [H], join the softmax: scales `out` in place.

    `out` float32 [R, H, E] and `lse` float32 [R, H] are those over all other keys, whose share
    falls from 1 to exp(lse) / (exp(lse) + exp(sink)). Source: arXiv 2309.17453, section 3.
    """
    out.mul_(torch.sigmoid(lse - sinks.float()).unsqueeze(-1))


class PartialSum:
    """Collects partial results of the same queries and merges them in batches.

    At most `pending_bytes` of unmerged outputs (and one more) are held at a time.
    """

    def __init__(self, pending_bytes: int = 16 << 20) -> None:
        self._pending_bytes = pending_bytes
        self._parts: list[Partial] = []
        self._held = 0

    def add(self, part: Partial) -> None:
        """Take one more part; merges what is pending when the bound is reached."""
        self._parts.append(part)
        self._held += part[0].nbytes
        if self._held > self._pending_bytes and len(self._parts) > 1:
            merged = _merge(self._parts)
            self._parts = [merged]
            self._held = merged[0].nbytes

    def result(self) -> Partial:
        """Output and log-sum-exp over all parts: float32, or the only part's dtypes."""
        if len(self._parts) == 1:
            out, lse = self._parts[0]
            return out, lse.float()
        return merge_partials(self._parts)


def _merge(parts: Sequence[Partial]) -> Partial:
    """`merge_partials` with the log-sum-exp in float64, for merges that go on.

    Over 10M keys it is about 16, where float32 has steps of 1e-6: thousands of merges one after
    another would add such steps up.
    """
    lses = torch.stack([lse for _, lse in parts]).double()
    total = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - total.clamp(min=_LSE_FLOOR)).float().unsqueeze(-1)
    sums = [
        _weighted_sum(parts[first : first + _BLOCK], weights[first : first + _BLOCK])
        for first in range(0, len(parts), _BLOCK)
    ]
    for block in sums[1:]:
        sums[0].add_(block)
    return sums[0], total


def _weighted_sum(parts: Sequence[Partial], weights: torch.Tensor) -> torch.Tensor:
    result = parts[0][0] * weights[0]
    for (out, _), weight in zip(parts[1:], weights[1:], strict=True):
        result.addcmul_(out, weight)
    return result


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    logit_cap: float,
) -> Partial:
    """`partial_attention` through a score matrix [G, M * J, N] in float32; any E, any cap.

    `mask` None: every query sees every key. Runs on any device.
    """
    m, g, j, _ = q.shape
    rows = q.permute(1, 0, 2, 3).reshape(g, m * j, -1).float()
    scores = torch.bmm(rows, k.float().permute(1, 2, 0)).mul_(scale)
    if logit_cap > 0.0:
        scores.div_(logit_cap).tanh_().mul_(logit_cap)
    scores = scores.view(g, m, j, -1)
    if mask is not None:
        scores += mask.unsqueeze(1)
    lse = torch.logsumexp(scores, -1)
    weights = scores.sub_(lse.clamp(min=_LSE_FLOOR).unsqueeze(-1)).exp_()
    out = torch.bmm(weights.view(g, m * j, -1), v.float().transpose(0, 1))
    return out.view(g, m, j, -1).to(q.dtype), lse
