"""The gated delta rule: what a state becomes, and what queries read of it. Pure, in float32.

A head's state S is a matrix [K, V]. A token with key k, value v, decay a = exp(g) and strength b
makes of it, and reads with its query q:

    S' = a S + k u^T,  u = b (v - a S^T k)        o = S'^T q

Of C tokens after S0, with G the running sums of g, all u follow at once from one triangular system:

    (I + A) U = diag(b) V - diag(b exp G) K S0,   A[t, j] = b[t] exp(G[t] - G[j]) k[t].k[j], j < t

Sources: arXiv 2412.06464 (the rule), 2406.06484 (chunks as matrices).

Legend: N chunks or tokens of different requests, H heads, C tokens of a chunk, K and V widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tokens(NamedTuple):
    """What tokens bring, float32: `q`, `k` [*, K] and `v` [*, V], `g` and `b` [*].

    `g` <= 0 is the logarithm of the decay. A token with k = 0 and g = 0 changes no state.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    b: torch.Tensor


def step(tokens: Tokens, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """One token of N requests, [N, H, *] each: what their queries read, [N, H, V].

    Side effect: `target` [N, H, K, V] becomes the state after the tokens, `source` being the one
    before; both may be the same memory.
    """
    decay = tokens.g.exp().unsqueeze(-1)
    # One look at the state for both; the new token's part of what the query reads is added.
    both = torch.stack((tokens.k, tokens.q), -2) @ source
    known, read = both[..., 0, :], both[..., 1, :]
    update = tokens.b.unsqueeze(-1) * (tokens.v - decay * known)
    torch.mul(source, decay.unsqueeze(-1), out=target)
    target.addcmul_(tokens.k.unsqueeze(-1), update.unsqueeze(-2))
    meets = (tokens.q * tokens.k).sum(-1, keepdim=True)
    return decay * read + meets * update


class Chunks(NamedTuple):
    """N chunks, solved but for the states that they begin with.

    U = `values` - `keys` S0; what is read is `queries` S0 + `mixing` U; the state after is
    `decay` S0 + `writes` U.
    """

    values: torch.Tensor  # [N, H, C, V]
    keys: torch.Tensor  # [N, H, C, K]
    queries: torch.Tensor  # [N, H, C, K]
    mixing: torch.Tensor  # [N, H, C, C]
    writes: torch.Tensor  # [N, H, K, C]
    decay: torch.Tensor  # [N, H, 1, 1]


def solve(tokens: Tokens) -> Chunks:
    """What can be said of chunks before their states are known; `tokens` are [N, H, C, *].

    `q` and `k` may have fewer heads, each of which goes with as many neighbouring ones.
    """
    count = tokens.v.shape[1] // tokens.k.shape[1]
    sums = tokens.g.cumsum(-1)
    size = sums.shape[-1]
    apart = sums.unsqueeze(-1) - sums.unsqueeze(-2)
    later = torch.ones(size, size, dtype=torch.bool, device=sums.device).triu_(1)
    fading = apart.masked_fill_(later, -torch.inf).exp_()  # 0 for tokens to come
    keys_t = tokens.k.transpose(-1, -2)
    strength, grown = tokens.b.unsqueeze(-1), sums.exp().unsqueeze(-1)
    # Only what is below the diagonal counts; the diagonal is taken for ones.
    system = _spread(tokens.k @ keys_t, count).mul_(fading).mul_(strength)
    keys = _spread(tokens.k, count)
    sides = torch.cat((tokens.v * strength, keys * (strength * grown)), -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    width = tokens.v.shape[-1]
    last = sums[..., -1:]
    return Chunks(
        values=solved[..., :width],
        keys=solved[..., width:],
        queries=_spread(tokens.q, count).mul_(grown),
        mixing=_spread(tokens.q @ keys_t, count).mul_(fading),
        writes=keys.mul_((last - sums).exp().unsqueeze(-1)).transpose(-1, -2),
        decay=last.exp().unsqueeze(-1),
    )


def _spread(heads: torch.Tensor, count: int) -> torch.Tensor:
    """A copy of [N, J, *] for the `count` value heads that go with each: [N, J * count, *]."""
    return heads.repeat_interleave(count, 1)


def advance(chunks: Chunks, part: slice, state: torch.Tensor) -> torch.Tensor:
    """Chunks `part`, one of each of n requests: what their queries read, [n, H, C, V].

    Side effect: `state` [n, H, K, V] becomes the state after the chunks.
    """
    updates = chunks.values[part] - chunks.keys[part] @ state
    read = chunks.queries[part] @ state + chunks.mixing[part] @ updates
    state.mul_(chunks.decay[part]).add_(chunks.writes[part] @ updates)
    return read
