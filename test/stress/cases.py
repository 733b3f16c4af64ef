"""From a seed to a case: an engine's flags and a schedule of requests and control calls. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.sampling.sampling_params import ReasoningFirst
from stress.worlds import CONTEXT, END, FAMILIES, STATEFUL, VOCAB, Ask

Follow = Callable[[Ask], list[int]]

REGEXES = (r"[a-z]{3}-[0-9]{4}", r"([a-z]+ )+", r"(yes|no|[A-Z]{6})")
REASONING = ReasoningFirst("<", "</x>", inside=True)


@dataclass(frozen=True)
class Event:
    """Something that comes before turn `turn`: `kind` and what it needs."""

    turn: int
    kind: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """All that a run is made of. `options` are the runner's, `flags` the engine's."""

    seed: int
    family: str
    flags: dict[str, Any]
    options: dict[str, Any]
    events: tuple[Event, ...]

    def told(self) -> dict[str, Any]:
        """The case for a report; prompts by their length."""
        events = [
            f"{e.turn}: {e.kind} { ({k: _short(v) for k, v in e.args.items()}) }"
            for e in self.events
        ]
        return {**self.__dict__, "events": events}


def _short(value: Any) -> Any:
    if isinstance(value, Ask):
        extra = {"adapter": value.adapter, "start": value.start, "top": value.top}
        extra = {name: one for name, one in extra.items() if one}
        return f"<{len(value.prompt)} tokens {dict(value.params)} {extra}>"
    return value


def draw_case(seed: int, follow: Follow | None = None, **fixed: Any) -> Case:
    """The case of a seed. `fixed` may set `family`, and `flags` that win over those drawn.

    `follow` says what a plain engine answers, for requests that go on from an answer; None: none
    do. The same arguments, the same case.
    """
    dice = random.Random(seed)
    family = dice.choice(sorted(FAMILIES))
    family = fixed.get("family", family)
    flags, options = _flags(dice, family)
    flags.update(fixed.get("flags", {}))
    options.update(fixed.get("options", {}))
    events = _Schedule(dice, family, flags, options, follow).events()
    return Case(seed, family, flags, options, events)


def _flags(dice: random.Random, family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    page = dice.choice((1, 4, 16, 16, 64))
    flags: dict[str, Any] = {"page_size": page}
    flags["kv_segment_size"] = dice.choice((16, 64, 64, 128, 256))
    flags["chunked_prefill_size"] = dice.choice((page * dice.randint(1, 4), 48, 64, 128, -1))
    flags["kv_backing"] = dice.choice(("mmap", "mmap", "mmap", "segment_table", "static"))
    if dice.random() < 0.6:
        flags["max_total_tokens"] = dice.choice((192, 256, 320, 384, 512))
    if dice.random() < 0.5:
        flags["speculative_algorithm"] = "NGRAM"
        flags["speculative_num_draft_tokens"] = dice.choice((1, 3, 8))
        flags["speculative_ngram_min_match_window_size"] = dice.choice((1, 2))
    flags["disable_overlap_schedule"] = dice.random() < 0.3
    if dice.random() < 0.15:
        flags["disable_radix_cache"] = True
    else:
        flags["schedule_policy"] = dice.choice(("fcfs", "fcfs", "lpm"))
        flags["radix_eviction_policy"] = dice.choice(("lru", "lfu", "fifo", "priority"))
        if dice.random() < 0.2:
            flags["max_cached_tokens"] = dice.choice((0, 64, 200))
    if dice.random() < 0.4:
        flags["max_running_requests"] = dice.choice((1, 2, 3, 5))
    if dice.random() < 0.15:
        flags["max_queued_requests"] = dice.choice((1, 3))
    if dice.random() < 0.3:
        flags["attention_backend"] = "torch_native"
    if dice.random() < 0.3:
        flags["enable_priority_scheduling"] = True
        flags["priority_scheduling_preemption_threshold"] = dice.choice((0, 2))
    if dice.random() < 0.12 and flags["kv_backing"] != "segment_table":
        flags["kv_canary"] = dice.choice(("chain", "full"))
    if dice.random() < 0.3:
        flags["max_loras_per_batch"] = dice.choice((1, 2))
    if dice.random() < 0.1:
        flags["disable_cuda_graph"] = True
    flags["stream_interval"] = dice.choice((1, 1, 4))
    flags["kv_idle_release_seconds"] = dice.choice((0.05, 1.0, 30.0))
    flags["prefix_cache_idle_seconds"] = dice.choice((0.2, 5.0, 300.0, -1.0))
    options: dict[str, Any] = {
        "clip": dice.choice((2, 2, 16, 4096)),
        "wrong_guesses": dice.choice((None, 0.0, 0.2, 0.6)),
        "failing_maps": dice.choice((0.0, 0.0, 0.0, 0.1, 0.4)),
        "worker": dice.choice(("late", "late", "late", "early", "threads")),
        "disk": dice.random() < 0.4,
        "ranks": dice.choice((1, 1, 1, 1, 2)),
        "device": dice.random() < 0.12,
    }
    if options["device"]:
        options |= {"ranks": 1, "disk": False, "failing_maps": 0.0}
        flags["kv_memory_budget"] = dice.choice((200, 300, 8000)) << 10
        flags.pop("max_total_tokens", None)
        flags["disable_cuda_graph"] = dice.random() < 0.7
        flags.pop("kv_canary", None)
    elif dice.random() < 0.1:
        latent = family.startswith("deepseek")
        flags["kv_cache_dtype"] = "fp8_e4m3" if latent else dice.choice(("fp8_e4m3", "int8"))
    if flags["kv_backing"] != "mmap" or options["ranks"] > 1:
        options["disk"] = False
    if options["disk"] or (not options["device"] and dice.random() < 0.2):
        # What a budget in bytes holds depends on the family: a hundred tokens to five hundred.
        flags.pop("max_total_tokens", None)
        flags["kv_memory_budget"] = dice.choice((130, 200, 300)) << 10
    if flags["kv_backing"] == "static":
        options["failing_maps"] = 0.0
    if options["ranks"] > 1 and dice.random() < 0.5:
        flags["kv_parallel_size"] = 2
    if FAMILIES[family][2] == ():
        flags.pop("max_loras_per_batch", None)
    if family in STATEFUL:
        _leave_out_of_states(dice, flags)
    return flags, options


def _leave_out_of_states(dice: random.Random, flags: dict[str, Any]) -> None:
    """What models with recurrent states refuse."""
    for name in [*flags]:
        if name.startswith("speculative_") or name == "kv_canary":
            del flags[name]
    if flags.pop("max_total_tokens", None) is not None:
        flags["kv_memory_budget"] = dice.choice((200, 300, 500)) << 10


class _Schedule:
    """Draws events; knows the requests so far, to share their prompts and to go on from them."""

    def __init__(
        self,
        dice: random.Random,
        family: str,
        flags: dict[str, Any],
        options: dict[str, Any],
        follow: Follow | None,
    ) -> None:
        self._dice = dice
        self._flags = flags
        self._follow = follow
        self._num_adapters = 3 if FAMILIES[family][2] else 0
        self._asks: list[Ask] = []
        self._rids: list[str] = []
        self._texts = [self._text(200) for _ in range(2)]
        self._mood = {
            "greedy": dice.choice((0.5, 1.0)),
            "grammars": dice.choice((0.0, 0.0, 0.3)),
            "adapters": dice.choice((0.0, 0.5)) if self._num_adapters else 0.0,
            "logprobs": dice.choice((0.1, 0.5)),
            "control": dice.choice((0.0, 0.1, 0.35)),
        }

    def events(self) -> tuple[Event, ...]:
        dice, turn = self._dice, 0
        made: list[Event] = []
        pace = dice.choice((0, 0, 1, 4, 12))
        for _ in range(dice.choice((4, 8, 16, 30))):
            turn += dice.randint(0, pace) + (40 if dice.random() < 0.06 else 0)
            kind = self._kind()
            made.append(Event(turn, kind, self._args(kind)))
        return tuple(made)

    def _kind(self) -> str:
        if not self._rids or self._dice.random() > self._mood["control"] + 0.1:
            return "ask"
        kinds = ["abort", "abort", "stop_hit", "audit", "flush", "compact", "budget", "budget"]
        kinds += ["budget", "wait", "wait", "info", "abort_all"]
        if self._num_adapters:
            kinds += ["unload", "load"]
        return self._dice.choice(kinds)

    def _args(self, kind: str) -> dict[str, Any]:
        dice = self._dice
        if kind == "ask":
            return self._request()
        if kind in ("abort", "stop_hit"):
            return {"rid": dice.choice(self._rids[-4:])}
        if kind == "wait":
            return {"seconds": dice.choice((0.1, 2.0, 40.0, 400.0))}
        if kind == "budget":
            return {"part": dice.choice((0.0, 0.1, 0.3, 0.5, 0.75, 1.0, 1.5))}
        if kind in ("load", "unload"):
            return {"adapter": dice.randint(1, self._num_adapters)}
        return {}

    def _text(self, length: int) -> tuple[int, ...]:
        if self._dice.random() < 0.4:  # repeats itself, as drafts like it
            motif = [self._dice.randrange(VOCAB) for _ in range(self._dice.randint(1, 9))]
            return tuple((motif * length)[:length])
        return tuple(self._dice.randrange(VOCAB) for _ in range(length))

    def _prompt(self) -> tuple[int, ...]:
        dice = self._dice
        kind = dice.random()
        if self._asks and kind < 0.15:
            return dice.choice(self._asks).prompt
        if self._asks and kind < 0.4 and self._follow is not None:
            before = dice.choice(self._asks)
            answer = self._follow(before)
            text = before.prompt + tuple(answer[: dice.choice((len(answer), 3))])
            if len(text) < CONTEXT - 60:
                return text + self._text(dice.choice((0, 1, 5, 20)))
        if kind < 0.7:
            shared = dice.choice(self._texts)[
                : dice.choice((15, 16, 17, 63, 64, 65, 100, 129, 200))
            ]
            return shared + self._text(dice.choice((0, 1, 9, 30)))
        return self._text(dice.choice((1, 2, 15, 16, 40, 64, 90, 150, 260)))

    def _request(self) -> dict[str, Any]:
        dice, mood = self._dice, self._mood
        prompt = self._prompt() or (1,)
        most = dice.choice((0, 1, 2, 8, 8, 20, 20, 40, 90, 200))
        params: dict[str, Any] = {"max_new_tokens": most, "temperature": 0.0}
        if dice.random() > mood["greedy"]:
            params |= {"temperature": dice.choice((0.6, 1.0, 2.0))}
            params |= {"sampling_seed": dice.randrange(1000)}
            params |= {"top_p": dice.choice((1.0, 0.8)), "top_k": dice.choice((-1, 5, 40))}
            params |= {"min_p": dice.choice((0.0, 0.0, 0.05))}
        if dice.random() < 0.2:
            params |= {"frequency_penalty": 0.7, "presence_penalty": dice.choice((0.0, 0.5))}
        if dice.random() < 0.1:
            params |= {"repetition_penalty": 1.3}
        if dice.random() < 0.15:
            params |= {"stop_token_ids": tuple(dice.randrange(VOCAB) for _ in range(40))}
            params |= {"min_new_tokens": min(most, dice.choice((0, 3)))}
        if dice.random() < 0.1:
            params |= {"logit_bias": {dice.randrange(VOCAB): dice.choice((-100.0, 6.0))}}
        if dice.random() < mood["grammars"] and most:
            params |= {"regex": dice.choice(REGEXES), "stop_token_ids": (END,)}
            if dice.random() < 0.4:
                params |= {"reasoning": REASONING, "max_thinking_tokens": dice.choice((0, 3, 9))}
        fields: dict[str, Any] = {}
        if dice.random() < mood["logprobs"]:
            start = dice.choice((0, len(prompt) // 2, len(prompt) - 1, len(prompt)))
            fields = {"logprobs": True, "start": start, "top": dice.choice((0, 2))}
            fields |= {"picked": dice.choice(((), (3, 200)))}
        adapter = dice.randint(0, self._num_adapters) if dice.random() < mood["adapters"] else 0
        ask = Ask(prompt, tuple(params.items()), adapter, **fields)
        self._asks.append(ask)
        self._rids.append(f"r{len(self._rids)}")
        return {"rid": self._rids[-1], "ask": ask, "beside": self._beside()}

    def _beside(self) -> dict[str, Any]:
        """What changes no token."""
        dice = self._dice
        beside: dict[str, Any] = {"stream": dice.random() < 0.5}
        if dice.random() < 0.15:
            beside["extra_key"] = dice.choice(("one", "two"))
        if dice.random() < 0.5 and "enable_priority_scheduling" in self._flags:
            beside["priority"] = dice.randint(0, 4)
        if dice.random() < 0.2:
            beside["include_progress"] = True
        return beside
