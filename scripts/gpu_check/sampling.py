"""Stage 1: the device's sampler against the host's, number by number.

Both get the same logits for the same requests over a few steps. Tokens that no random number
chooses must be the same ones. A draw may differ where the two round a sum of probabilities apart,
so another token counts as right when the random number lies next to what it stands for in float64.
Log probabilities, of prompts too, are compared as numbers.

Legend: B requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from gpu_check.records import Journal
from gpu_check.setting import Setting
from sglang.srt.layers.device_sampler import DeviceSampler
from sglang.srt.layers.late_results import LatePrompts, PromptRows, StepTold, reduce_late
from sglang.srt.layers.logprobs import pack_logprobs, reduce_logits
from sglang.srt.layers.sampler import Sampler, uniform
from sglang.srt.managers.io_struct import LogprobArrays
from sglang.srt.model_executor.forward_batch_info import LogprobSpec
from sglang.srt.sampling.sampling_params import SamplingParams

# Sums of float32 probabilities in float64: how far apart two orders of them may be.
_DRAW_TOLERANCE: Final = 1e-4
_LOGPROB_TOLERANCE: Final = 1e-4
_STEPS: Final = 3
_NO_IDS: Final = np.empty(0, np.int32)

PENALTIES: Final[dict[str, Any]] = {
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.7,
    "presence_penalty": -0.4,
}
KINDS: Final[dict[str, dict[str, Any]]] = {
    "greedy": {"temperature": 0.0},
    "penalties": {"temperature": 0.0, **PENALTIES},
    "logit_bias": {"temperature": 0.0, "logit_bias": {3: 9.0, 5: -4.0, 11: 1e6}},
    "min_new_tokens": {"temperature": 0.0, "stop_token_ids": tuple(range(40)), "min_new_tokens": 9},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 0.9, "top_k": 12},
    "top_p": {"temperature": 1.1, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "all filters": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.02, **PENALTIES},
    "penalties without a place": {"temperature": 0.0, **PENALTIES},
}


@dataclass(frozen=True)
class Draw:
    """A token that was drawn from float32 `logits` [V], all edits done, at a position."""

    logits: torch.Tensor
    params: SamplingParams
    u: float
    token: int

    def distance(self) -> float:
        """How far `u` is from what the token stands for, as a share of all that may be drawn."""
        params = self.params
        probs = (self.logits.double() / params.temperature).softmax(-1)
        weights, ids = probs.sort(descending=True, stable=True)
        passes = torch.ones_like(weights, dtype=torch.bool)
        if params.top_k > 0:
            passes[params.top_k :] = False
        if params.top_p < 1.0:
            passes &= weights.cumsum(-1) - weights < params.top_p
        passes[0] = True
        weights = torch.where(passes & (weights >= params.min_p * weights[0]), weights, 0.0)
        if params.top_p >= 1.0 and not 0 < params.top_k < len(probs):  # drawn in the order of ids
            weights, ids = torch.zeros_like(probs).scatter_(0, ids, weights), torch.arange(len(ids))
        ends = weights.cumsum(-1)
        place = int((ids == self.token).nonzero())
        begin, end = float(ends[place] - weights[place]), float(ends[place])
        drawn = self.u * float(ends[-1])
        return max(begin - drawn, drawn - end, 0.0) / float(ends[-1])


def check_sampling(setting: Setting, journal: Journal) -> None:
    """Every kind of request, then log probabilities of sampled tokens and of prompts."""
    num_rows, vocab = (3, 97) if setting.is_dry else (8, 128_256)
    for name, fields in KINDS.items():
        counted = 0 if name == "penalties without a place" else num_rows
        try:
            others, distance = _compare(
                setting, SamplingParams(**fields), num_rows, vocab, counted=counted
            )
        except Exception as reason:  # noqa: BLE001  one kind that breaks is one finding
            journal.fail(f"sampler {name}", f"{type(reason).__name__}: {reason}")
            continue
        holds = distance <= _DRAW_TOLERANCE
        values = {"tokens": num_rows * _STEPS, "other_tokens": others, "distance": distance}
        journal.judge(f"sampler {name}", holds, f"above {_DRAW_TOLERANCE:g}", **values)
    for name, check in (("sampled", _sampled_logprobs), ("of prompts", _prompt_logprobs)):
        what = f"log probabilities {name}"
        try:
            error = check(setting, num_rows, vocab)
        except Exception as reason:  # noqa: BLE001
            journal.fail(what, f"{type(reason).__name__}: {reason}")
            continue
        reason_of = f"above {_LOGPROB_TOLERANCE:g}"
        journal.judge(what, error <= _LOGPROB_TOLERANCE, reason_of, max_error=error)


class _Pair:
    """The two samplers with the same requests, and what each says of a step."""

    def __init__(
        self, setting: Setting, params: SamplingParams, num_rows: int, vocab: int, counted: int
    ) -> None:
        self._setting = setting
        self._rows = range(num_rows)
        self._hides = params.min_new_tokens > 0
        self.host = Sampler()
        self.device = DeviceSampler(setting.runtime, counted_rows=counted)
        rng = np.random.default_rng(1)
        for row in self._rows:
            prompt, output = (rng.integers(0, vocab, n).astype(np.int32) for n in (40, 9))
            for sampler in (self.host, self.device):
                sampler.admit(row, params, row, prompt, output)

    def step(
        self, logits: torch.Tensor, position: int, specs: Sequence[LogprobSpec | None]
    ) -> tuple[StepTold, StepTold]:
        """What host and device choose from `logits` [B, V]; those are left as the host has them."""
        runtime, count = self._setting.runtime, len(self._rows)
        asked = (self._rows, [position] * count, [self._hides] * count, specs)
        with runtime.computing(), torch.inference_mode():
            (there,) = runtime.move([logits.clone()])
            late = self.device.sample(there, *asked).late
            if late is None:
                raise RuntimeError("the device's sampler told nothing late")
            told = late.read(runtime.fetch(late.values).wait())
        out = self.host.sample(logits, *asked)
        return StepTold(out.token_ids.numpy(), out.logprobs, out.invalid_rows), told


def _compare(
    setting: Setting, params: SamplingParams, num_rows: int, vocab: int, *, counted: int
) -> tuple[int, float]:
    """Tokens that differ, and the largest distance of one; infinite where none may differ.

    A request whose token differed is not looked at any more: its penalties count other tokens.
    """
    pair = _Pair(setting, params, num_rows, vocab, counted)
    others: set[int] = set()
    largest = 0.0
    for step in range(_STEPS):
        logits = _logits(step, num_rows, vocab)
        if step == 1 and params.greedy:
            logits[0, 4], logits[1, 7] = float("nan"), float("inf")
        host, device = pair.step(logits, 50 + step, [None] * num_rows)
        if host.invalid_rows != device.invalid_rows:
            raise RuntimeError(
                f"invalid rows {device.invalid_rows}, on the host {host.invalid_rows}"
            )
        for row in np.flatnonzero(host.token_ids != device.token_ids).tolist():
            if row in others:
                continue
            others.add(row)
            draw = Draw(logits[row], params, uniform(row, 50 + step), int(device.token_ids[row]))
            largest = max(largest, float("inf") if params.greedy else draw.distance())
    return len(others), largest


def _logits(seed: int, num_rows: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab, generator=generator) * 3.0


def _sampled_logprobs(setting: Setting, num_rows: int, vocab: int) -> float:
    """The largest distance between the two samplers' numbers."""
    params = SamplingParams(temperature=0.0, **PENALTIES)
    pair = _Pair(setting, params, num_rows, vocab, num_rows)
    specs = [
        LogprobSpec(0, _NO_IDS, True, row, np.array([7, 1], np.int32)) for row in range(num_rows)
    ]
    host, device = pair.step(_logits(9, num_rows, vocab), 50, specs)
    pairs = zip(host.logprobs, device.logprobs, strict=True)
    return max(distance_of(one, other) for one, other in pairs)


def _prompt_logprobs(setting: Setting, num_rows: int, vocab: int) -> float:
    """The largest distance between what device and host make of a prompt's logits."""
    runtime = setting.runtime
    logits = _logits(5, num_rows, vocab)
    logits[0] = logits[0].round()  # equal numbers stand by their ids
    targets = torch.arange(num_rows)
    spec = LogprobSpec(0, targets.numpy().astype(np.int32), False, 5, np.array([7, 1], np.int32))
    picked = torch.from_numpy(spec.picked_ids.astype(np.int64))
    host = pack_logprobs(
        spec.input_targets,
        [reduce_logits(logits, targets, spec.top_num, picked)],
        spec.picked_ids,
    )
    with runtime.computing(), torch.inference_mode():
        there = runtime.move([logits, targets, picked])
        values = reduce_late(there[0], there[1], spec.top_num, there[2])
        late = LatePrompts(values, 1, (PromptRows(0, spec, num_rows, spec.top_num),))
        (device,) = late.read(runtime.fetch(late.values).wait())
    return distance_of(host, device)


def distance_of(one: LogprobArrays | None, other: LogprobArrays | None) -> float:
    """The largest distance of two answers' numbers; infinite where they name other tokens."""
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    if (one.token_ids, one.picked_ids) != (other.token_ids, other.picked_ids):
        return float("inf")
    largest = 0.0
    for name in ("logprobs", "top_logprobs", "picked_logprobs"):
        first, second = (np.frombuffer(getattr(x, name), "<f4") for x in (one, other))
        if first.shape != second.shape:
            return float("inf")
        largest = max(largest, float(np.abs(first - second).max(initial=0.0)))
    return largest if one.top_ids == other.top_ids else float("inf")
