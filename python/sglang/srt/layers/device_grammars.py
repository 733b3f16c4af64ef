"""Grammars of rows that are sampled on a device which runs behind the host.

What may follow depends on the token before, which the device has and the host awaits. So the step's
forward is launched first; then the host waits for the tokens of the step before, which is over by
then or soon will be, and makes the masks while the device computes. Only sampling waits for them.

Used by `DeviceSampler`, from its thread. Not yet run on hardware; tested on a CPU.

Legend: K rows with a grammar, V vocabulary, W = ceil(V / 8) bytes of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from sglang.srt.constrained.grammar import TokenMatcher
from sglang.srt.layers.sampling_row import SamplingRow
from sglang.srt.utils.device import DeviceRuntime, HostCopy


class DeviceGrammars:
    """Hides what the grammars of a step's rows do not allow, and tells them what was sampled."""

    def __init__(self, runtime: DeviceRuntime) -> None:
        self._runtime = runtime
        self._awaited: tuple[list[TokenMatcher], HostCopy] | None = None

    def settle(self) -> None:
        """Let the grammars go on with what the step before sampled; waits for that step."""
        if self._awaited is None:
            return
        (matchers, copy), self._awaited = self._awaited, None
        for matcher, token in zip(matchers, copy.wait().tolist(), strict=True):
            matcher.accept(token)

    def hide(self, logits: torch.Tensor, rows: Mapping[int, SamplingRow], stops: set[int]) -> None:
        """Make impossible in float32 `logits` [B, V], in place, what `rows` by place may not say.

        `stops` are the places where stop tokens are hidden, too, as far as the grammar allows.
        """
        places: list[int] = []
        masks: list[np.ndarray] = []
        for place, state in rows.items():
            assert state.matcher is not None
            hidden = state.matcher.hidden(state.params.stop_token_ids if place in stops else None)
            if hidden is not None:
                places.append(place)
                masks.append(np.packbits(hidden, bitorder="little"))
        if not places:
            return
        at, packed, shifts = self._runtime.move(
            [
                torch.tensor(places),
                torch.from_numpy(np.stack(masks)),
                torch.arange(8, dtype=torch.uint8),
            ]
        )
        bits = (packed.unsqueeze(-1) >> shifts).bitwise_and_(1).flatten(1)
        some = logits.index_select(0, at)
        some.masked_fill_(bits[:, : logits.shape[1]].bool(), -float("inf"))
        logits.index_copy_(0, at, some)

    def await_tokens(self, tokens: torch.Tensor, rows: Mapping[int, SamplingRow]) -> None:
        """Begin to fetch what was sampled for `rows` by place, of int64 `tokens` [B]."""
        matchers = [state.matcher for state in rows.values() if state.matcher is not None]
        if not matchers:
            return
        (at,) = self._runtime.move([torch.tensor(list(rows))])
        self._awaited = (matchers, self._runtime.fetch(tokens.index_select(0, at)))
