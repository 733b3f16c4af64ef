"""A scheduler run turn by turn: real memory on real mappings, a worker whose model is a checksum.

The worker writes every input token and its position into K and V of the slots it was given, and
samples the checksum of what it reads back through the block tables. A wrong page, a lost copy, a
prefix shared wrongly or a token computed twice changes the answer, so equal answers prove the
memory, not only the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch

from sglang.srt.distributed.communicator import Communicator
from sglang.srt.errors import BackingError
from sglang.srt.managers.generation_result import GenerationBatchResult
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchProgressOut,
    BatchTokenIDOut,
    ControlReply,
    ControlReq,
    FinishReason,
    PrefillProgress,
    TokenizedGenerateReqInput,
    TokenOut,
    ToScheduler,
    int32_buffer,
)
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_canary import SchedulerCanary
from sglang.srt.managers.scheduler_limits import SchedulerLimits
from sglang.srt.managers.scheduler_ranks import make_turns
from sglang.srt.mem_cache.allocation import KVMemory, KVPlacement
from sglang.srt.mem_cache.canary_perturb import Perturbation
from sglang.srt.mem_cache.capacity import request_page_bounds
from sglang.srt.mem_cache.kv_events import EventSink
from sglang.srt.mem_cache.kv_layout import GroupId, KVCacheSpec, KVGroupSpec, SegmentId
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.rank_agreement import RankAgreement
from sglang.srt.mem_cache.segment_backing import SegmentBacking
from sglang.srt.mem_cache.window_rule import WindowRule, window_rules
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.progress import Progress
from srt.mem_cache.memory_driver import FULL, PoisonedBacking, Window

VOCAB = 997
TURN_S = 0.01  # what a turn takes by the test's clock


def next_token(tokens: Sequence[int], first_position: int = 0) -> int:
    """The checksum model: depends on every token that it sees and its place."""
    ids = np.asarray(tokens, np.int64)
    places = np.arange(1, len(ids) + 1) + first_position
    return int((ids * (places % 89 + 1)).sum() % VOCAB)


def expected_output(
    prompt: Sequence[int], count: int, rules: Sequence[WindowRule | None] = (None,)
) -> list[int]:
    """What a request must generate, whatever happened to its memory."""
    tokens = list(prompt)
    for _ in range(count):
        last = len(tokens) - 1
        starts = [0 if rule is None else rule.visible_start(last) for rule in rules]
        tokens.append(next_token(tokens[min(starts) :], min(starts)))
    return tokens[len(prompt) :]


class NoPlan:
    """Stands in for an attention backend."""

    def plan(self, geometry: BatchGeometry) -> int:
        return len(geometry.seq_lens)


class ChecksumWorker:
    """Computes when asked for the result, in order, as the real worker's thread would."""

    def __init__(self, pool: MHATokenToKVPool, rows: int) -> None:
        self._pool = pool
        self._rules = window_rules(pool.spec)
        self._relay = np.zeros(rows + 2, np.int64)
        self.max_tokens_in_step = 0
        self.step_time: Callable[[], float] = lambda: 0.001
        self.steps: list[tuple[int, ...]] = []  # tokens per request of every step

    def submit(
        self, forward_batch: ForwardBatch, info: SamplingBatchInfo
    ) -> Future[GenerationBatchResult]:
        future: Future[GenerationBatchResult] = LazyFuture(
            lambda: self._forward(forward_batch, info)
        )
        return future

    def _forward(self, batch: ForwardBatch, info: SamplingBatchInfo) -> GenerationBatchResult:
        geometry = batch.geometry
        self.steps.append(tuple(geometry.extend_seq_lens.tolist()))
        self.max_tokens_in_step = max(self.max_tokens_in_step, batch.num_tokens)
        if len(batch.relay_at):
            batch.input_ids[torch.from_numpy(batch.relay_at)] = torch.from_numpy(
                self._relay[batch.relay_rows]
            )
        k = batch.input_ids.to(torch.float32).reshape(-1, 1, 1)
        v = batch.positions.to(torch.float32).reshape(-1, 1, 1)
        for layer in range(self._pool.spec.num_layers):
            group = self._pool.group_of_layer(layer)
            self._pool.set_kv_buffer(layer, batch.out_cache_loc[group], k + layer, v)
        sampled = [
            self._sample(geometry, request, ahead)
            for request, count in enumerate(info.sample_counts)
            for ahead in range(1 - count, 1)
        ]
        token_ids = np.array(sampled, np.int64)
        self._relay[np.asarray(info.rows, np.int64)] = token_ids
        return GenerationBatchResult(
            token_ids, [None] * len(sampled), [None] * batch.batch_size, self.step_time()
        )

    def _sample(self, geometry: BatchGeometry, request: int, ahead: int) -> int:
        """The checksum of what the layer that sees most may see from a request's last token, or
        from one before that (`ahead` is negative).

        Every layer's tokens are checked to be at their positions and to agree with the others.
        """
        seq_len = int(geometry.seq_lens[request]) + ahead
        longest: list[int] = []
        seen: list[list[int]] = []
        for layer in range(self._pool.spec.num_layers):
            group = self._pool.group_of_layer(layer)
            rule, table = self._rules[group], geometry.block_tables[group][request]
            # Every query of the step reads, the first one farthest back.
            earliest, first = int(geometry.extend_prefix_lens[request]), 0
            if rule is not None:
                assert table.first_position <= rule.visible_start(earliest)
                first = rule.visible_start(seq_len - 1)
                earliest = rule.visible_start(earliest)
            else:
                assert table.first_position == 0
                earliest = 0
            slots = (
                table.page_ids.astype(np.int64)[:, None] * geometry.page_size
                + np.arange(geometry.page_size)
            ).reshape(-1)[: seq_len - table.first_position]
            runs = np.concatenate([np.arange(start, start + n) for start, n in table.runs])
            assert np.array_equal(runs[: len(slots)], slots)
            index = torch.from_numpy(slots[earliest - table.first_position :])
            keys = (self._pool.get_key_buffer(layer)[index, 0, 0] - layer).long().tolist()
            places = self._pool.get_value_buffer(layer)[index, 0, 0].long().tolist()
            assert places == list(range(earliest, seq_len))
            seen.append(keys)
            if len(keys) - (first - earliest) > len(longest):
                longest = keys[first - earliest :]
        for keys in seen:
            assert keys[-len(longest) :] == longest[-len(keys) :]
        return next_token(longest, seq_len - len(longest))


class LazyFuture(Future[GenerationBatchResult]):
    """Runs its function when the result is asked for: a step that takes as long as it may."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self._function = function

    def result(self, timeout: float | None = None) -> GenerationBatchResult:
        if not self.done():
            self.set_result(self._function())  # type: ignore[operator]
        return super().result(timeout)


@dataclass
class FakeChannel:
    """Messages in, messages out, in memory."""

    inbox: list[ToScheduler] = field(default_factory=list)
    outs: list[TokenOut] = field(default_factory=list)
    replies: list[ControlReply] = field(default_factory=list)
    progress: list[PrefillProgress] = field(default_factory=list)

    def receive(self, timeout_ms: int) -> Sequence[ToScheduler]:
        assert timeout_ms >= 0
        taken, self.inbox = self.inbox, []
        return taken

    def send_outputs(self, outputs: BatchTokenIDOut) -> None:
        self.outs.extend(outputs.outs)

    def send_reply(self, reply: ControlReply) -> None:
        self.replies.append(reply)

    def send_progress(self, progress: BatchProgressOut) -> None:
        self.progress.extend(progress.news)


class Harness:
    """One scheduler with its stand-ins and a clock that the test moves.

    `control`: it is one of several ranks; its own inbox and clock count on rank 0 alone.
    """

    def __init__(
        self,
        memory: KVMemory,
        *,
        page_size: int,
        canary: str = "off",
        perturb: str | None = None,
        control: Communicator | None = None,
        **limits: object,
    ) -> None:
        self.now = 0.0
        self._num_asked = 0
        self.memory = memory
        self.channel = FakeChannel()
        self.worker = ChecksumWorker(memory.kv_pool, rows=4096)
        values: dict[str, object] = {
            "context_length": 1 << 20,
            "context_length_requested": 1 << 20,
            "max_running_requests": 64,
            "chunk_tokens": 64,
            "adaptive_chunk": False,
            "policy": "fcfs",
            "stream_interval": 1,
            "overlap": True,
            "random_seed": 1,
        }
        values.update(limits)
        watcher = None
        if canary != "off":
            values["overlap"] = False
            full, groups = canary == "full", memory.spec.num_groups
            damage = None if perturb is None else Perturbation.parse(perturb, groups, full=full)
            watcher = SchedulerCanary(memory.watch(full=full), damage)

        bounds = request_page_bounds(memory.spec, int(values["chunk_tokens"]))  # type: ignore[call-overload]
        values.setdefault("window_pages", bounds)
        self.limits = SchedulerLimits(page_size=page_size, **values)  # type: ignore[arg-type]
        progress = Progress()

        def make_batch(batch: ScheduleBatch, placement: KVPlacement) -> ForwardBatch:
            return ForwardBatch.from_schedule_batch(
                batch,
                placement,
                pool=memory.kv_pool,
                backend=NoPlan(),
                page_size=page_size,
                progress=progress,
            )

        self.scheduler = Scheduler(
            memory=memory,
            worker=self.worker,
            make_batch=make_batch,
            channel=self.channel,
            limits=self.limits,
            progress=progress,
            clock=lambda: self.now,
            canary=watcher,
            turns=make_turns(self.channel, lambda: self.now, control),
        )

    def send(self, rid: str, prompt: Sequence[int], max_new: int = 8, **kwargs: object) -> None:
        """Queue a generate request for the next turn; `params` may replace sampling fields."""
        params = {"max_new_tokens": max_new, **kwargs.pop("params", {})}  # type: ignore[dict-item]
        self.channel.inbox.append(
            TokenizedGenerateReqInput(
                rid=rid,
                input_ids=memoryview(int32_buffer(np.asarray(prompt, np.int32))),
                sampling_params=SamplingParams(**params),  # type: ignore[arg-type]
                stream=True,
                **kwargs,  # type: ignore[arg-type]
            )
        )

    def abort(self, rid: str = "", *, abort_all: bool = False) -> None:
        self.channel.inbox.append(AbortReq(rid, abort_all))

    def ask(self, op: str, **args: object) -> int:
        """Queue a control request for the next turn; returns its number."""
        self._num_asked += 1
        self.channel.inbox.append(ControlReq(seq=self._num_asked, op=op, args=args))
        return self._num_asked

    def reply(self, seq: int) -> ControlReply | None:
        """The one answer to a control request, None when it is not there yet."""
        found = [reply for reply in self.channel.replies if reply.seq == seq]
        assert len(found) <= 1, f"request {seq} was answered {len(found)} times"
        return found[0] if found else None

    def control(self, op: str, **args: object) -> ControlReply:
        """Ask and run turns until the answer is there."""
        seq = self.ask(op, **args)
        for _ in range(2000):
            self.turn()
            reply = self.reply(seq)
            if reply is not None:
                return reply
            self.settle()
        raise AssertionError(f"{op} was not answered")

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.scheduler.turn()
            self.now += TURN_S

    def run(self, max_turns: int = 20_000) -> None:
        """Turn until nothing is left to do; a scheduler that loops fails here."""
        for _ in range(max_turns):
            self.turn()
            if not self.scheduler.busy and not self.channel.inbox:
                return
        raise AssertionError(f"still busy: {self.scheduler.requests()}")

    def settle(self) -> None:
        """Let the mapping thread finish what it has begun, and take it over."""
        self.scheduler.drain()  # an unmap may wait for a forward
        for ticket in self.memory.manager.pending():
            self.memory.manager.wait(ticket)
        self.memory.ladder.settle_finished()

    def output(self, rid: str) -> list[int]:
        """All ids told of a request so far."""
        ids: list[int] = []
        for out in self.channel.outs:
            if out.rid == rid:
                ids.extend(np.frombuffer(out.output_ids, "<i4").tolist())
        return ids

    def final(self, rid: str) -> FinishReason:
        """Why a request ended; there must be exactly one final output and nothing after it."""
        news = [out for out in self.channel.outs if out.rid == rid]
        ends = [out.finish_reason for out in news if out.finish_reason is not None]
        assert len(ends) == 1, f"{rid} has {len(ends)} final outputs"
        assert news[-1].finish_reason is not None
        return ends[0]

    def retractions(self, rid: str) -> int:
        return max(out.num_retractions for out in self.channel.outs if out.rid == rid)


class FlakyBacking:
    """A backing whose maps fail when `fails(number)` says so; numbers count from 1."""

    def __init__(self, inner: SegmentBacking, fails: Callable[[int], bool]) -> None:
        self._inner = inner
        self._fails = fails
        self.num_maps = 0

    def map(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        self.num_maps += 1
        if self._fails(self.num_maps):
            raise BackingError(f"map {self.num_maps} was told to fail")
        self._inner.map(group, segments)

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


def make_memory(
    *,
    page_size: int,
    pages_per_segment: int = 64,
    segments: int = 64,
    groups: int = 1,
    windows: Sequence[Window] = (),
    chunk_tokens: int = 64,
    idle_release_s: float = 30.0,
    prefix_idle_s: float = 300.0,
    fail_maps: Callable[[int], bool] | None = None,
    rows: int = 64,
    eviction_policy: str = "lru",
    event_sink: EventSink | None = None,
    reserve: int = 0,
    backing: SegmentBacking | None = None,
    ranks: RankAgreement | None = None,
    disk_segments: int = 0,
) -> KVMemory:
    """Real memory on tiny mmap segments: two layers, one head, two floats wide.

    The budget holds `segments` segments in each group, the disk `disk_segments`. `windows`: kind
    and window of one or two groups (empty: `groups` full ones).
    """
    windows = windows or (FULL,) * groups
    layers: tuple[tuple[int, ...], ...] = ((0, 1),) if len(windows) == 1 else ((0,), (1,))
    spec = KVCacheSpec(
        groups=tuple(
            KVGroupSpec(some, kind, window)
            for some, (kind, window) in zip(layers, windows, strict=True)
        ),
        kv_heads=1,
        head_dim=1,
        v_head_dim=1,
        dtype="float32",
        page_size=page_size,
    )
    segment_bytes = pages_per_segment * page_size * spec.bytes_per_token
    backing = backing or PoisonedBacking()
    if fail_maps is not None:
        backing = FlakyBacking(backing, fail_maps)
    return KVMemory.create(
        spec,
        backing,
        budget_bytes=segments * segment_bytes,
        machine_bytes=2 * segments * segment_bytes,
        lower_budget_bytes=disk_segments * segment_bytes,
        slots_per_segment=pages_per_segment * page_size,
        reserve_segments=reserve,
        idle_release_s=idle_release_s,
        prefix_idle_s=prefix_idle_s,
        max_cached_tokens=None,
        max_requests=rows,
        eviction_policy=eviction_policy,
        event_sink=event_sink,
        prefill_chunk=chunk_tokens,
        ranks=ranks,
    )
