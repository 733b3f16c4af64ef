"""Where a step's states come from and go to, and in which chunks its prompts are computed.

Made from lengths and block tables once a step, for all layers of linear attention. A request's
state stands in the page of its last token: a step reads the page of the token before its first and
writes that of its last; where it passes a page border on its way, the state there goes to the page
before the border, for whoever shares that prefix. See docs/kv_segments.md, Note [Recurrent state].

    tokens       | ... n) [n ........... border) [border .... m)
    page of          ^ source               ^ border's      ^ target

Legend: T packed rows, B requests, N of them that compute one token, E that compute several, W
inputs that the convolution keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, BlockTableView

Int64Array = npt.NDArray[np.int64]

CHUNK_TOKENS = 64
NO_PAGE = 0
# Tokens whose chunks are solved at a time: of more, what is made on the way leaves the caches.
_BLOCK_TOKENS = 512


class StatePages(NamedTuple):
    """Pages of one request, NO_PAGE for none; `border` tokens of the step come before the border.

    Without a source the state is zero.
    """

    source: int
    border_page: int
    border: int
    target: int

    @classmethod
    def of(cls, table: BlockTableView, start: int, end: int, page_size: int) -> StatePages:
        """For the tokens [start, end) of a request; InvariantError when a page is missing."""
        ids, first = table.page_ids, table.first_position // page_size

        def page_of(position: int) -> int:
            place = position // page_size - first
            page = int(ids[place]) if 0 <= place < len(ids) else NO_PAGE
            if page == NO_PAGE:
                raise InvariantError(f"no page for the state after position {position}")
            return page

        source = page_of(start - 1) if start else NO_PAGE
        border = (end - 1) // page_size * page_size
        passes = border > start
        return cls(
            source,
            page_of(border - 1) if passes else NO_PAGE,
            border - start if passes else 0,
            page_of(end - 1),
        )


@dataclass(frozen=True, slots=True)
class SingleTokens:
    """N requests that compute one token, at packed `rows`; int64 [N] each, `fresh` bool [N].

    `pages` are (source, target) of each, for who goes request by request.
    """

    rows: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    fresh: torch.Tensor
    any_fresh: bool
    pages: tuple[tuple[int, int], ...]


class ChunkBlock(NamedTuple):
    """Chunks that are solved together: `rows` int64 [N, C] of extend rows, `valid` bool [N, C].

    `known` int64 are the places of valid ones among N * C, `known_rows` their rows.
    `steps` say how the states go through them: (chunks, requests, those of the requests whose
    states are then at their border, int64, or None). The first ones of the requests go on longest.
    """

    rows: torch.Tensor
    valid: torch.Tensor
    known: torch.Tensor
    known_rows: torch.Tensor
    steps: tuple[tuple[slice, int, torch.Tensor | None], ...]


@dataclass(frozen=True, slots=True)
class Extends:
    """E requests that compute several tokens, those with the most chunks first.

    `rows` int64 [T'] are their packed rows, ascending; the tensors below speak of extend rows,
    [0, T'). With the inputs that each request's convolution kept put before its own, `places` [T']
    is where a row then stands, `kept_places` [E, W] where the kept ones do, `tails` [E, W] and
    `border_tails` [E, W] which inputs are to be kept at the end and at the border.
    """

    rows: torch.Tensor
    source: torch.Tensor  # [E]
    target: torch.Tensor  # [E]
    border_pages: torch.Tensor  # [E]
    fresh: torch.Tensor  # bool [E]
    blocks: tuple[ChunkBlock, ...]
    places: torch.Tensor
    kept_places: torch.Tensor
    tails: torch.Tensor
    border_tails: torch.Tensor


@dataclass(frozen=True, slots=True)
class StatePlan:
    """A step's states; None where no request computes one token, or several."""

    singles: SingleTokens | None
    extends: Extends | None


def plan_states(
    geometry: BatchGeometry, group: int, conv_tokens: int, device: torch.device
) -> StatePlan:
    """The plan of one step; `group` is the one of states, W is `conv_tokens`."""
    tables = geometry.block_tables[group]
    starts, ends = geometry.extend_prefix_lens.tolist(), geometry.seq_lens.tolist()
    size = geometry.page_size
    pages = [
        StatePages.of(table, start, end, size)
        for table, start, end in zip(tables, starts, ends, strict=True)
    ]
    lens = geometry.extend_seq_lens
    one = np.flatnonzero(lens == 1)
    several = np.flatnonzero(lens > 1)
    return StatePlan(
        _singles(geometry, pages, one, device) if len(one) else None,
        _extends(geometry, pages, several, conv_tokens, device) if len(several) else None,
    )


def _singles(
    geometry: BatchGeometry, pages: list[StatePages], chosen: Int64Array, device: torch.device
) -> SingleTokens:
    pairs = tuple((pages[b].source, pages[b].target) for b in chosen.tolist())
    both = np.array(pairs, np.int64)
    fresh = both[:, 0] == NO_PAGE
    return SingleTokens(
        _there(geometry.q_starts[chosen], device),
        _there(both[:, 0], device),
        _there(both[:, 1], device),
        torch.from_numpy(fresh).to(device),
        bool(fresh.any()),
        pairs,
    )


def _extends(
    geometry: BatchGeometry,
    pages: list[StatePages],
    chosen: Int64Array,
    conv_tokens: int,
    device: torch.device,
) -> Extends:
    lens = geometry.extend_seq_lens[chosen]
    borders = np.array([pages[b].border for b in chosen.tolist()], np.int64)
    longest = int(np.maximum(borders, lens - borders).max())
    chunk = min(CHUNK_TOKENS, 1 << (longest - 1).bit_length())
    head_chunks = -(-borders // chunk)
    num_chunks = head_chunks + -(-(lens - borders) // chunk)
    order = np.argsort(-num_chunks, kind="stable")
    firsts = np.cumsum(lens) - lens  # in extend rows, which follow the batch's order
    starts = geometry.q_starts[chosen]
    rows = np.arange(int(lens.sum())) + np.repeat(starts - firsts, lens)
    # Convolution: each request's kept inputs, then its own, one request after another.
    begins = firsts + conv_tokens * np.arange(len(lens))
    back = np.arange(conv_tokens)
    own = [pages[b] for b in chosen[order].tolist()]
    blocks = _blocks(
        lens[order], borders[order], firsts[order], num_chunks[order], head_chunks[order], chunk
    )
    return Extends(
        rows=_there(rows, device),
        source=_there(np.array([one.source for one in own]), device),
        target=_there(np.array([one.target for one in own]), device),
        border_pages=_there(np.array([one.border_page for one in own]), device),
        fresh=torch.tensor([one.source == NO_PAGE for one in own]).to(device),
        blocks=tuple(
            ChunkBlock(
                _there(at, device),
                torch.from_numpy(valid).to(device),
                _there(np.flatnonzero(valid), device),
                _there(at[valid], device),
                tuple((p, n, None if s is None else _there(s, device)) for p, n, s in steps),
            )
            for at, valid, steps in blocks
        ),
        places=_there(
            np.arange(len(rows)) + np.repeat(conv_tokens * (1 + np.arange(len(lens))), lens), device
        ),
        kept_places=_there(begins[order][:, None] + back, device),
        tails=_there((begins + lens)[order][:, None] + back, device),
        border_tails=_there((begins + borders)[order][:, None] + back, device),
    )


_Steps = list[tuple[slice, int, Int64Array | None]]


def _blocks(
    lens: Int64Array,
    borders: Int64Array,
    firsts: Int64Array,
    num_chunks: Int64Array,
    head_chunks: Int64Array,
    chunk: int,
) -> Iterator[tuple[Int64Array, npt.NDArray[np.bool_], _Steps]]:
    """Rows, validity and steps of each block; arrays are by request, most chunks first."""
    at: list[Int64Array] = []
    valid: list[npt.NDArray[np.bool_]] = []
    steps: _Steps = []
    inside = np.arange(chunk)
    held = 0
    for number in range(int(num_chunks[0])):
        active = int((num_chunks > number).sum())
        heads = head_chunks[:active]
        in_head = number < heads
        first = np.where(in_head, number * chunk, borders[:active] + (number - heads) * chunk)
        end = np.where(in_head, borders[:active], lens[:active])
        offsets = first[:, None] + inside
        known = offsets < end[:, None]
        at.append(np.where(known, firsts[:active, None] + offsets, firsts[:active, None]))
        valid.append(known)
        here = np.flatnonzero((heads == number + 1) & (borders[:active] > 0))
        steps.append((slice(held, held + active), active, here if len(here) else None))
        held += active
        if held * chunk >= _BLOCK_TOKENS or number + 1 == num_chunks[0]:
            yield np.concatenate(at), np.concatenate(valid), steps
            at, valid, steps, held = [], [], [], 0


def _there(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(device)
