"""Compares what an engine said of a case's requests with what the plain engine says."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sglang.srt.managers.io_struct import FinishReason, TokenOut
from stress.cases import Case
from stress.worlds import Answer, Ask, World

TOLERANCE = 1e-3  # of log probabilities
NEAR_TIE = 2e-3  # of a logit: what sums in another order may change


class Finding(Exception):
    """Something that must not be: `kind` in a word or two, and what exactly."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass
class Counts:
    """What happened in a run, so that a report can say what was covered."""

    answers: int = 0
    tokens: int = 0
    near_ties: int = 0
    retractions: int = 0
    preemptions: int = 0
    drafted: int = 0
    cached: int = 0
    demoted: int = 0
    unmaps: int = 0
    ends: dict[str, int] = field(default_factory=dict)


@dataclass
class Record:
    """What a run has to be judged by: requests by id, and all news of them in order.

    `told` were aborted or ended by a stop string, `contexts` are the effective contexts that were
    ever in force.
    """

    asks: dict[str, Ask] = field(default_factory=dict)
    outs: list[TokenOut] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    contexts: set[int] = field(default_factory=set)
    budget_moved: bool = False


class Judge:
    """Compares what an engine said with the plain engine's answers."""

    def __init__(self, case: Case, world: World, record: Record, counts: Counts) -> None:
        self._case, self._world, self._record, self._counts = case, world, record, counts
        self._exact = "kv_cache_dtype" not in case.flags

    def check(self) -> None:
        """Every request's answer; raises the first Finding."""
        outs: dict[str, list[Any]] = {rid: [] for rid in self._record.asks}
        for out in self._record.outs:
            if out.rid not in outs:
                raise Finding("stranger", out.rid)
            outs[out.rid].append(out)
        for rid, ask in self._record.asks.items():
            try:
                answer = Answer.of(outs[rid])
            except AssertionError as error:
                raise Finding("news", f"{error}") from error
            if answer.reason is None:
                raise Finding("no final output", rid)
            kind = answer.reason.type
            if kind == "abort":
                kind = f"{kind} {answer.reason.status_code}"
            self._counts.ends[kind] = self._counts.ends.get(kind, 0) + 1
            self._counts.answers += 1
            self._counts.tokens += len(answer.ids)
            self._counts.cached += max((out.cached_tokens for out in outs[rid]), default=0)
            self._judge(rid, ask, answer, answer.reason)

    def _judge(self, rid: str, ask: Ask, answer: Answer, reason: FinishReason) -> None:
        where = f"{rid} {ask.adapter=} prompt={len(ask.prompt)} {dict(ask.params)} {reason}"
        if reason.type == "abort" and reason.status_code != 499:
            self._may_be_refused(rid, ask, reason, where)
            if not answer.ids:
                return
        plain = self._world.answer(ask)
        is_cut = self._is_cut(rid, ask, answer, reason, plain, where)
        same = self._compare_ids(answer, plain, is_cut, ask, where)
        if ask.logprobs and self._exact:
            self._compare_numbers(ask, answer, plain, same, reason, where)

    def _is_cut(
        self,
        rid: str,
        ask: Ask,
        answer: Answer,
        reason: FinishReason,
        plain: Answer,
        where: str,
    ) -> bool:
        """Whether the answer may be shorter than the plain one's; raises when its end is wrong."""
        assert plain.reason is not None
        if reason.type == "abort":
            if reason.status_code == 499 and rid not in self._record.told:
                raise Finding("aborted", where)
            return True
        if rid in self._record.told and reason == FinishReason("stop"):
            return True
        length = len(ask.prompt) + len(answer.ids)
        if reason.type == "length" and length in self._record.contexts:
            return True
        bounds = self._record.contexts
        if reason.type == "length" and self._record.budget_moved and length > min(bounds):
            return True
        ends = (reason.type, reason.matched) == (plain.reason.type, plain.reason.matched)
        if not ends and self._exact and answer.ids == plain.ids:
            raise Finding("reason", f"{where}, not {plain.reason}")
        return False

    def _may_be_refused(self, rid: str, ask: Ask, reason: FinishReason, where: str) -> None:
        text, length = reason.message, len(ask.prompt)
        flags = self._case.flags
        if reason.status_code == 400 and "exceeds the maximum" in text:
            if length + 1 > min(self._record.contexts):
                return
        elif reason.status_code == 400 and "adapter is not loaded" in text:
            if any(e.kind == "unload" for e in self._case.events):
                return
        elif reason.status_code == 503 and "queue is full" in text:
            if "max_queued_requests" in flags:
                return
        elif reason.status_code == 503 and "budget was lowered" in text:
            if self._record.budget_moved:
                return
        elif "Out of KV memory" in text and self._case.options["failing_maps"]:
            return
        raise Finding("refused request", where)

    def _compare_ids(
        self, answer: Answer, plain: Answer, is_cut: bool, ask: Ask, where: str
    ) -> int:
        """How many tokens are the same; raises where they may not differ."""
        pairs = list(zip(answer.ids, plain.ids, strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        if not self._exact:
            return same
        if same < len(pairs):
            if self._is_near_tie(ask, answer, same):
                self._counts.near_ties += 1
                return same
            text = f"{where}: token {same} is {answer.ids[same]}, not {plain.ids[same]}"
            raise Finding("tokens", text)
        if len(answer.ids) > len(plain.ids) or (not is_cut and len(answer.ids) < len(plain.ids)):
            text = f"{where}: {len(answer.ids)} tokens, not {len(plain.ids)} ({plain.reason})"
            raise Finding("length", text)
        return same

    def _is_near_tie(self, ask: Ask, answer: Answer, at: int) -> bool:
        """Whether the plain engine says the same token for a hair's breadth more of its logit."""
        params = dict(ask.params)
        token, bias = answer.ids[at], dict(params.get("logit_bias", {}))
        bias[token] = bias.get(token, 0.0) + NEAR_TIE
        nudged = replace(ask, params=tuple({**params, "logit_bias": bias}.items()))
        return self._world.answer(nudged).ids[: at + 1] == answer.ids[: at + 1]

    def _compare_numbers(
        self,
        ask: Ask,
        answer: Answer,
        plain: Answer,
        same: int,
        reason: FinishReason,
        where: str,
    ) -> None:
        rows = sum(part.num_rows for part in answer.given)
        if rows != len(answer.ids):
            raise Finding("logprobs", f"{where}: {rows} rows of {len(answer.ids)} tokens")
        if not rows and reason.type == "abort":
            return
        got, want = answer.numbers(), plain.numbers()
        if plain.ids:
            want["top"] = want["top"].reshape(len(plain.ids), -1)[:, : ask.top].reshape(-1)
        for name, one in got.items():
            width = len(one) // rows if rows else 0
            other = want[name]
            if rows and (width * rows != len(one) or width * len(plain.ids) != len(other)):
                raise Finding("logprobs", f"{where}: {name} {one.shape} {other.shape}")
            _same_numbers(one[: same * width], other[: same * width], f"{where}: {name}")
        if reason.type == "abort":
            return
        if answer.prompt is None or plain.prompt is None:
            raise Finding("prompt logprobs", f"{where}: {answer.prompt} {plain.prompt}")
        ids = (answer.prompt.num_rows, answer.prompt.token_ids)
        if ids != (plain.prompt.num_rows, plain.prompt.token_ids):
            raise Finding("prompt logprobs", f"{where}: other tokens")
        for name in ("logprobs", "picked_logprobs"):
            one = np.frombuffer(getattr(answer.prompt, name), "<f4")
            other = np.frombuffer(getattr(plain.prompt, name), "<f4")
            _same_numbers(one, other, f"{where}: prompt's {name}")
        if answer.prompt.num_rows:
            shape = (answer.prompt.num_rows, -1)
            one = np.frombuffer(answer.prompt.top_logprobs, "<f4")
            other = np.frombuffer(plain.prompt.top_logprobs, "<f4").reshape(shape)[:, : ask.top]
            _same_numbers(one, other.reshape(-1), f"{where}: prompt's top")


def _same_numbers(one: Any, other: Any, where: str) -> None:
    if one.shape != other.shape:
        raise Finding("logprobs", f"{where}: {one.shape} {other.shape}")
    if not np.allclose(one, other, atol=TOLERANCE, rtol=0, equal_nan=True):
        worst = np.nanmax(np.abs(np.where(np.isfinite(one), one, 0) - other))
        raise Finding("logprobs", f"{where} differ by {worst:.2e}")
