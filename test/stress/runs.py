"""A case on a real engine without sockets, turn by turn by a clock of its own, and what came of it.

Raises `Finding` where an answer differs from the plain engine's, a request has not exactly one end,
or something stays behind when all is over.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from gpu_check.host_driver import HostDriver, host_bytes
from sglang.srt.distributed.communicator import RankLinks
from sglang.srt.environ import Environ
from sglang.srt.errors import RankLostError
from sglang.srt.managers import scheduler_setup
from sglang.srt.managers.io_struct import AbortReq, ControlReq, StopStringHit
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_ranks import make_turns
from sglang.srt.managers.scheduler_setup import build_scheduler_parts
from sglang.srt.mem_cache.reclaim import minimum_budget
from sglang.srt.mem_cache.segment_backing import SegmentBacking
from sglang.srt.mem_cache.segment_backing.cuda_vmm_host import CudaVmmHostBacking
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.progress import Progress
from srt.distributed.thread_ranks import ThreadRanks
from srt.managers.draft_guesses import GuessingDrafts
from srt.managers.scheduler_harness import FakeChannel, FlakyBacking
from srt.utils.fake_device import LateRuntime
from stress.cases import Case, Event
from stress.judge import Counts, Finding, Judge, Record
from stress.worlds import InlineWorker, World, vocabulary, wait_for_grammars

TURN_S = 0.01
MAX_TURNS = 6000
BUDGET_BYTES = 8 << 20
# A device that is the host in disguise, with a host tier below it.
DEVICE_FLAGS: dict[str, Any] = {
    "device": "cuda",
    "attention_backend": "torch_native",
    "kv_backing": "cuda_vmm",
    "enable_hierarchical_cache": True,
    "cuda_graph_max_bs": 2,
    "kv_segment_reserve": 0,
}


class Rank:
    """One rank's engine; what it is sent, and its clock, count on rank 0 alone."""

    def __init__(self, case: Case, world: World, links: RankLinks | None, disk: str | None) -> None:
        self.case = case
        self.number = 0 if links is None else links.rank
        flags = {**world.flags, **case.flags}
        if links is not None:
            flags["tp_size"] = links.size // flags.get("kv_parallel_size", 1)
        runtime = None
        if case.options["device"]:
            runtime = LateRuntime()
            flags |= DEVICE_FLAGS
        if disk is not None:
            flags |= {"kv_disk_path": disk, "kv_disk_size": 4 << 20}
        args = ServerArgs.from_kwargs(
            model_path=world.path,
            dtype="float32",
            random_seed=5,
            **{"kv_memory_budget": BUDGET_BYTES, **flags},
        )
        progress = Progress()
        self.parts = build_scheduler_parts(args, Environ(), progress, links, runtime=runtime)
        self.memory = self.parts.memory
        self.channel = FakeChannel()
        self.now = time.monotonic()  # when the pool's clocks began
        control = None if links is None else links.control
        worker: Any = self.parts.worker
        if case.options["worker"] != "threads":
            worker = InlineWorker(worker, lazy=case.options["worker"] == "late")
        self.scheduler = Scheduler(
            memory=self.memory,
            worker=worker,
            make_batch=self.parts.make_batch,
            channel=self.channel,
            limits=self.parts.limits,
            progress=progress,
            clock=lambda: self.now,
            canary=self.parts.canary,
            grammars=self.parts.grammars,
            adapters=self.parts.adapters,
            turns=make_turns(self.channel, lambda: self.now, control),
        )
        self.budget = self.memory.manager.budget_bytes
        self.loaded = set(range(1, len(world.adapters) + 1))
        self.num_asked = 0
        self.record = Record(outs=self.channel.outs, contexts={self.scheduler.context_length})
        self.arriving: set[int] = set()  # adapters of what was sent since the last turn
        self.ops: dict[int, str] = {}
        self._note_contexts()
        self.send(vocabulary())

    def _note_contexts(self) -> None:
        """Note every context that was ever in effect, those of half a turn too."""
        set_length = self.scheduler.set_context_length

        def note(context_length: int) -> None:
            self.record.contexts.add(context_length)
            set_length(context_length)

        self.scheduler.set_context_length = note  # type: ignore[method-assign]

    def send(self, message: Any) -> None:
        if self.number == 0:
            self.channel.inbox.append(message)

    def control(self, op: str, **args: Any) -> int:
        self.num_asked += 1
        self.ops[self.num_asked] = op
        self.send(ControlReq(self.num_asked, op, args))
        return self.num_asked

    def turn(self) -> None:
        self.scheduler.turn()
        self.arriving.clear()
        self.now += TURN_S
        wait_for_grammars(self)  # type: ignore[arg-type]
        if self.scheduler._stalled:
            self.settle()

    def settle(self) -> None:
        """Let maps and unmaps under way come to their end."""
        self.scheduler.drain()
        for ticket in self.memory.manager.pending():
            self.memory.manager.wait(ticket)
        self.memory.ladder.settle_finished()

    def close(self) -> None:
        self.parts.worker.close()
        self.memory.close_pool()

    # ---- the schedule

    def play(self) -> None:
        """All events, then turns until nobody is left."""
        events, turn = list(self.case.events), 0
        for _ in range(MAX_TURNS):
            while events and events[0].turn <= turn:
                self.act(events.pop(0))
            self.turn()
            turn += 1
            if not self.scheduler.busy and not self.scheduler._control.active:
                if not events:
                    return
                turn = max(turn, events[0].turn)
        raise Finding("no end", f"{self.scheduler.requests()} {self.memory!r}")

    def act(self, event: Event) -> None:
        args = event.args
        if event.kind == "ask":
            self.record.asks[args["rid"]] = args["ask"]
            self.arriving.add(args["ask"].adapter)
            self.send(args["ask"].message(args["rid"], **args["beside"]))
        elif event.kind == "abort":
            self.record.told.add(args["rid"])
            self.send(AbortReq(args["rid"]))
        elif event.kind == "abort_all":
            self.record.told |= set(self.record.asks)
            self.send(AbortReq(abort_all=True))
        elif event.kind == "stop_hit":
            self.stop_by_text(args["rid"])
        elif event.kind == "wait":
            self.now += args["seconds"]
        elif event.kind == "budget":
            self.record.budget_moved = True
            least = minimum_budget(self.memory, self.scheduler.limits.chunk_tokens)
            value = int(least + args["part"] * max(0, self.budget - least))
            self.control("set_kv_budget", budget_bytes=value)
        else:
            ops = {"flush": "flush_cache", "compact": "compact_kv", "info": "server_info"}
            if event.kind not in ("load", "unload"):
                self.control(ops.get(event.kind, event.kind))
            else:
                self.load(args["adapter"], event.kind == "load")

    def stop_by_text(self, rid: str) -> None:
        """As the detokenizer does, which needs to have seen a token."""
        if any(out.rid == rid and out.output_ids for out in self.channel.outs):
            self.record.told.add(rid)
            self.send(StopStringHit(rid))

    def load(self, adapter: int, wanted: bool) -> None:
        """Load or unload; the text side asks neither twice, nor unloads what somebody uses."""
        using = {req.adapter_id for req in self.scheduler.requests()}
        if wanted == (adapter in self.loaded) or adapter in using | self.arriving:
            return
        self.loaded ^= {adapter}
        if wanted:
            path = self.case.options["adapters"][adapter - 1]
            self.control("load_lora_adapter", adapter_id=adapter, name="a", path=path, pinned=False)
        else:
            self.control("unload_lora_adapter", adapter_id=adapter)

    # ---- afterwards

    def finish(self) -> None:
        """Give everything back, and look whether it was all."""
        if self.memory.manager.backing.elastic:
            self.ask_and_wait("set_kv_budget", budget_bytes=self.budget)
        self.ask_and_wait("audit")
        self.ask_and_wait("flush_cache")
        for adapter in sorted(self.loaded):
            self.ask_and_wait("unload_lora_adapter", adapter_id=adapter)
        self.now += 1000.0
        for _ in range(3):
            self.turn()
            self.settle()
        self.memory.audit()
        self._check_idle()

    def ask_and_wait(self, op: str, **args: Any) -> None:
        self.control(op, **args)
        self.turn()
        for _ in range(200):
            if not self.scheduler._control.active:
                return
            self.turn()
            self.settle()
        raise Finding("no reply", op)

    def _check_idle(self) -> None:
        memory, manager = self.memory, self.memory.manager
        reserve = sum(
            layout.segment_bytes for layout in manager.layouts if not manager.backing.elastic
        )
        left = {
            "requests": len(self.scheduler.requests()),
            "running": self.scheduler.num_running,
            "waiting": self.scheduler.num_waiting,
            "leases": len(memory.leases),
            "rows": len(list(memory.rows.rows())),
            "cached": memory.cache.num_pages,
            "locked": memory.cache.num_locked_pages,
            "below": manager.lower_bytes,
            "pending": len(manager.pending()),
            "mapped": 0 if reserve else manager.mapped_bytes,
            "used": sum(a.index.num_used for a in memory.allocators),
            "budget": manager.budget_bytes - self.budget,
        }
        left = {name: number for name, number in left.items() if number}
        if left:
            raise Finding("left behind", f"{left} {memory!r}")

    def check_replies(self) -> None:
        seqs = sorted(reply.seq for reply in self.channel.replies)
        if self.number == 0 and seqs != sorted(self.ops):
            raise Finding("replies", f"{seqs} for {self.ops}")
        for reply in self.channel.replies:
            op = self.ops[reply.seq]
            expected = reply.success or op in ("set_kv_budget", "flush_cache", "compact_kv")
            if not expected:
                raise Finding("refused", f"{op}: {reply.message}")


def run_case(case: Case, world: World) -> Counts:
    """Run a case; raises Finding, or whatever an engine raises."""
    counts = Counts()
    case.options["adapters"] = world.adapters
    world.start()
    with contextlib.ExitStack() as stack:
        for change in _changes(case, world):
            stack.enter_context(change)
        disk = None
        if case.options["disk"]:
            disk = stack.enter_context(tempfile.TemporaryDirectory(prefix="stress"))
        ranks = _open_ranks(case, world, disk, stack)
        _on_all(ranks, lambda rank: rank.play())
        first = ranks[0][0]
        Judge(case, world, first.record, counts).check()
        _on_all(ranks, lambda rank: rank.finish())
        for rank, _ in ranks:
            rank.check_replies()
        done = first.scheduler.counters
        counts.retractions, counts.preemptions = done.num_retractions, done.num_preemptions
        counts.drafted = done.num_correct
        stats = first.memory.manager.stats()
        counts.demoted = sum(one.demote_count for one in stats)
        counts.unmaps = sum(one.unmap_count for one in stats)
    return counts


def _open_ranks(
    case: Case, world: World, disk: str | None, stack: contextlib.ExitStack
) -> list[tuple[Rank, ThreadRanks | None]]:
    size = case.options["ranks"]
    if size == 1:
        rank = Rank(case, world, None, disk)
        stack.callback(rank.close)
        return [(rank, None)]
    threads = ThreadRanks(size)
    stack.callback(threads.close)
    made = threads.run(lambda number: Rank(case, world, threads.links(number), disk))
    for rank in made:
        stack.callback(rank.close)
    return [(rank, threads) for rank in made]


def _on_all(ranks: list[tuple[Rank, ThreadRanks | None]], act: Callable[[Rank], None]) -> None:
    threads = ranks[0][1]
    if threads is None:
        act(ranks[0][0])
        return
    errors: list[Exception] = []

    def act_as(number: int) -> None:
        try:
            act(ranks[number][0])
        except Exception as error:
            errors.append(error)
            raise

    try:
        threads.run(act_as)
    except RankLostError:  # by another's failure, which is what counts
        raise next((e for e in errors if not isinstance(e, RankLostError)), errors[0]) from None


def _changes(case: Case, world: World) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """What is put in place of the real thing while a case runs."""
    options = case.options
    yield mock.patch("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", options["clip"])
    if options["device"]:
        for module in ("utils.native", "mem_cache.memory_pool"):
            yield mock.patch(f"sglang.srt.{module}.native_kernels", return_value=None)
        yield mock.patch("sglang.srt.layers.attention.torch_device_backend.RECORDED_TOKENS", 512)
        yield mock.patch("sglang.srt.managers.scheduler_setup.open_backing", _host_as_device)
    elif options["failing_maps"]:
        opened = scheduler_setup.open_backing

        def open_flaky(*args: Any, **kwargs: Any) -> SegmentBacking:
            dice = random.Random(case.seed)
            return FlakyBacking(  # type: ignore[return-value]
                opened(*args, **kwargs), lambda n: dice.random() < options["failing_maps"]
            )

        yield mock.patch("sglang.srt.managers.scheduler_setup.open_backing", open_flaky)
    if options["wrong_guesses"] is not None and "speculative_algorithm" in case.flags:
        asks = [event.args["ask"] for event in case.events if event.kind == "ask"]
        texts = [(*ask.prompt, *world.answer(ask).ids) for ask in asks if ask.adapter == 0]

        def follow(tokens: list[int], count: int) -> list[int]:
            known = tuple(tokens)
            text = next((t for t in texts if t[: len(known)] == known and len(t) > len(known)), ())
            found = list(text[len(known) : len(known) + count])
            return found + [1] * (count - len(found))

        def make(rules: Any, expected: int) -> GuessingDrafts:
            dice = random.Random(case.seed + expected)
            return GuessingDrafts(follow, dice, options["wrong_guesses"], 0.2)

        yield mock.patch("sglang.srt.managers.draft_policy.NgramDrafts", make)


def _host_as_device(*args: Any, **kwargs: Any) -> SegmentBacking:
    """A GPU's backing with its host tier, over a driver whose device is this machine's memory."""
    return CudaVmmHostBacking(
        HostDriver(), margin_bytes=0, host_margin_bytes=0, make_tensor=host_bytes
    )
