"""Attention within whole prompts, in both directions, with nothing kept: what encoders need.

Prompts of about one length are computed together: a call for each of many short ones would cost
more than what it computes. Planned once a step, for all layers.

Legend: T packed tokens, H heads, D head dim, P prompts of a group, N tokens of its longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Prompts go together up to this many times the tokens of the shortest, or up to so many tokens.
_LONGEST = 1.25
_SHORT = 16


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Prompts side by side, each filled up with tokens that nobody sees.

    `rows` int64 [P, N] are packed tokens; `seen` bool [P, 1, 1, N] says which are a prompt's own,
    None: all.
    """

    rows: torch.Tensor
    seen: torch.Tensor | None


def plan_groups(lens: Sequence[int], device: torch.device) -> tuple[PromptGroup, ...]:
    """Groups of prompts of these lengths, packed one after another; all lengths are positive."""
    order = sorted(range(len(lens)), key=lambda prompt: lens[prompt])
    starts = torch.tensor([0, *lens]).cumsum(0)
    groups: list[list[int]] = []
    for prompt in order:
        most = max(_SHORT, _LONGEST * lens[groups[-1][0]]) if groups else 0
        if lens[prompt] <= most:
            groups[-1].append(prompt)
        else:
            groups.append([prompt])
    return tuple(_group(members, lens, starts, device) for members in groups)


def _group(
    members: list[int], lens: Sequence[int], starts: torch.Tensor, device: torch.device
) -> PromptGroup:
    own = torch.tensor([lens[prompt] for prompt in members]).unsqueeze(1)
    places = torch.arange(int(own.max())).unsqueeze(0)
    # What fills a prompt up is its last token again.
    rows = starts[torch.tensor(members)].unsqueeze(1) + torch.minimum(places, own - 1)
    seen = None if int(own.min()) == int(own.max()) else (places < own)[:, None, None, :]
    return PromptGroup(rows.to(device), None if seen is None else seen.to(device))


def attend_prompts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Sequence[PromptGroup]
) -> torch.Tensor:
    """q, k and v [T, H, D] -> [T, H, D]: every token attends to all of its own prompt."""
    out = torch.empty_like(q)
    for group in groups:
        shape = (*group.rows.shape, *q.shape[1:])
        rows = group.rows.flatten()
        q_side, k_side, v_side = (
            part.index_select(0, rows).view(shape).transpose(1, 2) for part in (q, k, v)
        )
        found = F.scaled_dot_product_attention(q_side, k_side, v_side, attn_mask=group.seen)
        # What fills up writes the same numbers as the token that it repeats.
        out.index_copy_(0, rows, found.transpose(1, 2).reshape(len(rows), *q.shape[1:]))
    return out
