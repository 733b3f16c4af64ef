"""Runs a draft head: layers on the model's hidden states that say what follows the next token.

At a token's place it reads the hidden state there and the token after it, so its K and V at that
place can only be made when that token is known. States wait here until then, by KV row. Called by
the worker on its own thread. See docs/speculative_decoding.md, Note [Draft heads].

Shape letters: T packed tokens, D drafted requests, h numbers of a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

import torch

from sglang.srt.model_executor.draft_model import moved_indexes
from sglang.srt.model_executor.forward_batch_info import DraftBatch, ForwardBatch, HiddenSpan
from sglang.srt.utils.device import DeviceRuntime


class HeadModel(Protocol):
    """What the draft heads of `sglang.srt.models` offer.

    `state_layers` are the layers of the model whose inputs it reads, side by side; empty: it reads
    what the model's output head does. `token_ids` int64 [V of the head] are the model's tokens that
    it says (None: all, by their numbers).
    """

    @property
    def state_layers(self) -> tuple[int, ...]: ...

    @property
    def token_ids(self) -> torch.Tensor | None: ...

    def __call__(self, forward_batch: ForwardBatch, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [R, h] of `logits_rows`, from tokens and `hidden` [T, *], which are the
        model's or those of this head: what the next token is drafted from."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, V of the head] of hidden states [R, h]."""


class StateStore:
    """Hidden states that were not read yet: by row, pieces in the order of positions.

    Invariant: pieces of a row do not overlap; the newest begin where the last ended or anew.
    """

    def __init__(self) -> None:
        self._pieces: dict[int, list[tuple[int, torch.Tensor]]] = {}

    def put(self, row: int, first: int, states: torch.Tensor) -> None:
        """Keep a copy of `states` [n, h] of a request's tokens from `first` on, in place of those
        that were there before."""
        kept = [(at, piece[: first - at]) for at, piece in self._pieces.get(row, ()) if at < first]
        self._pieces[row] = [*kept, (first, states.clone())]

    def take(self, spans: Iterable[HiddenSpan]) -> torch.Tensor:
        """The states of the spans, one after another; those before a span's end are then gone."""
        return torch.cat([piece for span in spans for piece in self._taken(span)])

    def _taken(self, span: HiddenSpan) -> list[torch.Tensor]:
        found, left = [], []
        for at, piece in self._pieces[span.row]:
            first, end = max(0, span.first - at), max(0, span.end - at)
            if len(piece[first:end]):
                found.append(piece[first:end])
            if end < len(piece):
                left.append((at + end, piece[end:].clone() if end else piece))
        self._pieces[span.row] = left
        return found

    def __repr__(self) -> str:
        return f"StateStore({sum(len(pieces) for pieces in self._pieces.values())} pieces)"


class DraftHead:
    """A head and the states that it has yet to read."""

    def __init__(self, model: HeadModel, runtime: DeviceRuntime) -> None:
        self._model = model
        self._runtime = runtime
        self._states = StateStore()

    def propose(
        self, work: DraftBatch, input_ids: torch.Tensor, before: Callable[[], None]
    ) -> torch.Tensor | None:
        """See `Drafter`."""
        if work.first is None or work.hidden is None:
            return None
        before()
        said, places, rows_ahead = moved_indexes(work, self._runtime)
        hidden = self._compute(work.first, self._states.take(work.hidden.first))
        table = input_ids.new_zeros((1 + len(work.ahead), len(hidden)))
        table[0] = self._likeliest(hidden)
        last = hidden
        for depth, (batch, rows) in enumerate(zip(work.ahead, rows_ahead, strict=True)):
            said_last = table[depth].index_select(0, rows)
            made = self._compute(batch, last.index_select(0, rows), said_last)
            table[depth + 1].index_copy_(0, rows, self._likeliest(made))
            last = last.index_copy(0, rows, made)
        drafted = table.view(-1).index_select(0, said)
        input_ids.index_copy_(0, places, drafted)
        return drafted

    def follow(self, work: DraftBatch, hidden: torch.Tensor | None) -> None:
        """See `Drafter`: keeps the step's states, and reads those of prompts."""
        spans = work.hidden
        if spans is None or hidden is None:
            return
        at = 0
        for span in spans.kept:
            count = span.end - span.first
            self._states.put(span.row, span.first, hidden[at : at + count])
            at += count
        if work.after is not None:
            self._compute(work.after, self._states.take(spans.after))

    def _compute(
        self, batch: ForwardBatch, hidden: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self._runtime.is_async:
            batch, _ = batch.moved(self._runtime)
        if input_ids is not None:
            batch = replace(batch, input_ids=input_ids)
        return self._model(batch, hidden)

    def _likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [D] of hidden states [D, h]."""
        if not len(hidden):
            return torch.empty(0, dtype=torch.int64, device=hidden.device)
        said = self._model.logits(hidden).float().argmax(-1)
        known = self._model.token_ids
        return said if known is None else known.index_select(0, said)
