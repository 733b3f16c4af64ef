"""The scheduler of one rank: one straight line of values per step.

    receive -> admit -> candidates -> pages -> ForwardBatch -> worker -> results -> outputs

It holds requests and their leases, never slots; decisions come from `schedule_policy`, pages
from `KVMemory`, effects of a step from `scheduler_results`. Overlap is the same line with a
queue of one step between the worker and the results.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from sglang.srt.errors import InvariantError
from sglang.srt.managers.draft_policy import DraftPolicy
from sglang.srt.managers.generation_result import GenerationBatchResult
from sglang.srt.managers.io_struct import (
    AbortReq,
    ControlReply,
    FinishReason,
    StopStringHit,
    TokenizedGenerateReqInput,
    ToScheduler,
    VocabularyReq,
)
from sglang.srt.managers.priority_policy import choose_displaced
from sglang.srt.managers.schedule_batch import (
    MAX_RETRACTIONS,
    Req,
    ReqState,
    ScheduleBatch,
)
from sglang.srt.managers.schedule_policy import (
    ChunkSizer,
    choose_victim,
    pages_expected,
    step_candidates,
)
from sglang.srt.managers.scheduler_admission import Admission, WaitingQueue
from sglang.srt.managers.scheduler_arrivals import Arrivals
from sglang.srt.managers.scheduler_canary import SchedulerCanary
from sglang.srt.managers.scheduler_control import SchedulerControl
from sglang.srt.managers.scheduler_grammars import GrammarQueue
from sglang.srt.managers.scheduler_limits import (
    GrammarVerdict,
    SchedulerChannel,
    SchedulerLimits,
    StepTime,
    TurnInputs,
    TurnSource,
    Worker,
)
from sglang.srt.managers.scheduler_lora import SchedulerAdapters
from sglang.srt.managers.scheduler_output import OutputCollector
from sglang.srt.managers.scheduler_placement import StepPlacer
from sglang.srt.managers.scheduler_progress import PrefillProgressLog
from sglang.srt.managers.scheduler_ranks import OwnTurns
from sglang.srt.managers.scheduler_results import process_result
from sglang.srt.managers.scheduler_stats import SchedulerCounters, log_step
from sglang.srt.mem_cache.allocation import KVMemory, KVPlacement
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.utils.progress import Progress

logger = logging.getLogger(__name__)

# While idle the loop looks up this often for its clocks (idle release); a message wakes it at once.
IDLE_POLL_MS = 100
# Requests wait but nothing can run (growth pauses after a refused map): look again this soon.
STALLED_POLL_MS = 5
STEP_TARGET_S = 0.5
ALONE_STEP_TARGET_S = 1.0  # of a prompt that nobody else waits on, yet

BatchMaker = Callable[[ScheduleBatch, KVPlacement], ForwardBatch]


@dataclass(frozen=True, slots=True)
class _StepInFlight:
    batch: ScheduleBatch
    info: SamplingBatchInfo
    future: Future[GenerationBatchResult]


class Scheduler:
    """Decides, allocates, launches and collects; one instance per rank, one thread.

    `make_batch` builds the compute side's view of a batch, `clock` gives monotonic seconds, `turns`
    (None: this rank is alone) what turns are decided from, `grammars` (None: constraints are not
    served) holds requests until theirs is compiled. All collaborators are passed in, so a
    test runs it turn by turn with stand-ins.
    """

    def __init__(
        self,
        *,
        memory: KVMemory,
        worker: Worker,
        make_batch: BatchMaker,
        channel: SchedulerChannel,
        limits: SchedulerLimits,
        progress: Progress,
        clock: Callable[[], float],
        canary: SchedulerCanary | None = None,
        turns: TurnSource | None = None,
        grammars: GrammarQueue | None = None,
        adapters: SchedulerAdapters | None = None,
    ) -> None:
        self._turns = turns or OwnTurns(channel, clock)
        self._memory = memory
        self._worker = worker
        self._make_batch = make_batch
        self._channel = channel
        self._limits = limits
        self._progress = progress
        self._clock = clock
        self._canary = canary
        self._adapters = adapters or SchedulerAdapters()
        self._control = SchedulerControl(self, memory, canary, self._adapters)
        self._admission = Admission(memory, limits, self._adapters)
        self._placer = StepPlacer(memory, drafts=limits.drafts is not None)
        self._chunks = ChunkSizer(
            limits.chunk_tokens,
            limits.page_size,
            STEP_TARGET_S,
            ALONE_STEP_TARGET_S,
            adaptive=limits.adaptive_chunk,
        )
        self._drafting = DraftPolicy(limits.drafts)
        self._arrivals = Arrivals(self._adapters, self._drafting, limits.random_seed)
        self._grammars = GrammarQueue(None) if grammars is None else grammars
        self._waiting = WaitingQueue()
        self._running: dict[str, Req] = {}  # with a lease, by rid, in order of admission
        self._by_rid: dict[str, Req] = {}  # all that have not finished
        self._inflight: deque[_StepInFlight] = deque()
        self._drops: list[int] = []  # rows that the sampler may forget
        self._outputs = OutputCollector(limits.stream_interval)
        self.prefills = PrefillProgressLog(channel.send_progress)
        self._num_steps = 0
        self._stalled = False  # the last turn had nothing to compute
        self.counters = SchedulerCounters()

    # ---- what others read ----

    @property
    def context_length(self) -> int:
        """The effective context: no request grows beyond it."""
        return self._limits.context_length

    @property
    def limits(self) -> SchedulerLimits:
        """The numbers at this moment; the context moves with the budget."""
        return self._limits

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._grammars)

    @property
    def busy(self) -> bool:
        """True while a request is queued or running, or a step is under way."""
        return bool(self._by_rid or self._inflight)

    def requests(self) -> Sequence[Req]:
        """All requests that have not finished, in arrival order."""
        return sorted(self._by_rid.values(), key=lambda req: req.arrival)

    # ---- one turn ----

    def turn(self) -> None:
        """Receive, launch at most one step, collect what is due, tell the news."""
        if len(self._grammars):
            self._turns.note_grammars(self._grammars.decided(self._clock()))
        inputs = self._turns.next(self._poll_ms())
        began = self._clock()
        self._take(inputs)
        launched = self._launch_next()
        awaited = bool(self._inflight)
        while len(self._inflight) > (1 if launched and self._limits.overlap else 0):
            self._collect()
        if launched:
            self.counters.note_step(self._clock() - began)
        self._stalled = not launched and not awaited
        self._memory.on_step_boundary(inputs.now, self._pages_expected())
        self._progress.tick()
        self._flush_outputs()

    def _poll_ms(self) -> int:
        """How long to wait for a first message: not at all while there is work to go on with."""
        if not self.busy and not self._control.active:
            return IDLE_POLL_MS
        return STALLED_POLL_MS if self._stalled else 0

    def drain(self) -> None:
        """Collect every step under way, so that nothing on the device is in motion."""
        while self._inflight:
            self._collect()

    def set_context_length(self, context_length: int) -> None:
        """Let no request grow beyond this many tokens from now on."""
        self._limits = replace(self._limits, context_length=context_length)
        self._admission.set_limits(self._limits)

    # ---- messages ----

    def _take(self, inputs: TurnInputs) -> None:
        """Take what has come; a message and the frame with its prompt are gone after this."""
        for time in inputs.step_times:
            self._chunks.observe(time.num_prefill_tokens, time.seconds)
            self._drafting.observe(time)
        for message in inputs.messages:
            self._dispatch(message, inputs.now)
        inputs.messages.clear()
        for verdict in inputs.grammars:
            self._judge(verdict)
        self._reply(self._control.step(inputs.now))

    def _dispatch(self, message: ToScheduler, now: float) -> None:
        if isinstance(message, TokenizedGenerateReqInput):
            self._add_request(message, now)
        elif isinstance(message, VocabularyReq):
            self._grammars.set_vocabulary(message)
        elif isinstance(message, AbortReq):
            self._abort(message)
        elif isinstance(message, StopStringHit):
            req = self._by_rid.get(message.rid)
            if req is not None:
                self._end(req, FinishReason("stop"))
        else:
            self._reply(self._control.answer(message, now))

    def _judge(self, verdict: GrammarVerdict) -> None:
        """Let a request that waited for its grammar go on, or end it."""
        if verdict.error:
            req = self._by_rid.get(verdict.rid)
            if req is not None:
                self.end_by_abort(req, verdict.error, verdict.status)
            return
        req = self._grammars.take(verdict.rid)
        if req is not None:
            self._waiting.add(req)

    def _add_request(self, message: TokenizedGenerateReqInput, now: float) -> None:
        num_tokens = message.input_ids.nbytes // 4
        if message.rid in self._by_rid:
            # The text side keeps ids unique; answering here would give one id two final outputs.
            logger.error("Ignored a second request with the id %s", message.rid)
            return
        rules = self._limits.priorities
        urgency = None if rules is None else rules.urgency(message.priority)
        reason = self._arrivals.refusal(message, self._limits) or self._make_way(urgency or 0)
        if reason is not None:
            self.counters.num_refused += 1
            self._outputs.refuse(message.rid, num_tokens, reason)
            return
        req = self._arrivals.make(message, urgency)
        self.counters.num_requests += 1
        self.counters.prompt_tokens += num_tokens
        self._by_rid[req.rid] = req
        if self._grammars.add(req, now):
            self._waiting.add(req)

    def _make_way(self, urgency: int) -> FinishReason | None:
        """Why the queue can't take a newcomer; from a full one somebody less urgent has to go."""
        full = self._limits.queue_refusal(self.num_waiting)
        if full is None:
            return None
        waiting = (req for req in self._by_rid.values() if req.is_waiting)
        displaced = choose_displaced(waiting, urgency)
        if displaced is None:
            return full
        self.end_by_abort(
            displaced, f"{full.message} A more urgent one took this one's place.", 503
        )
        return None

    def _abort(self, message: AbortReq) -> None:
        wanted = self.requests() if message.abort_all else [self._by_rid.get(message.rid)]
        for req in wanted:
            if req is not None:
                self.end_by_abort(req, message.message, 499)

    def end_by_abort(self, req: Req, text: str, status: int) -> None:
        """Give a request its final output, an abort, unless it is ending already."""
        if self._end(req, FinishReason("abort", message=text, status_code=status)):
            self.counters.num_aborted += 1

    def _end(self, req: Req, reason: FinishReason) -> bool:
        """End a request from outside a step, in whatever state; False when it ended before."""
        waiting = req.is_waiting
        if not req.finish(reason):
            return False
        if waiting and not self._grammars.discard(req):
            self._waiting.remove(req)
        self._outputs.note(req)
        self._settle(req)
        return True

    # ---- deciding and launching ----

    def _launch_next(self) -> bool:
        """Put together the next step and submit it; False when there is nothing to compute, or not
        before results have come."""
        drafts = self._limits.drafts is not None
        if drafts and any(step.batch.has_drafts for step in self._inflight):
            return False  # how far their requests will be is not known
        self._admit()
        while victims := self._preempted():
            # Pages are given back once no forward names them; results may also make room.
            if self._inflight:
                self.drain()
                self._admit()
                victims = self._preempted()
            for req in victims:
                self._retract(req, forced=True)
                self.counters.num_preemptions += 1
            self._admit()
        while True:
            decodes, extends = step_candidates(
                self._running.values(),
                self._chunks,
                context_length=self._limits.context_length,
                page_size=self._limits.page_size,
            )
            if not decodes and not extends:
                return False
            drafted = self._drafting.with_drafts(
                decodes, self._limits.context_length, ahead=bool(self._inflight)
            )
            if drafted is None:
                return False
            placed = self._placer.place(drafted, extends)
            if placed is not None:
                items, placement = placed
                self._num_steps += 1
                changes = self._adapters.take_changes()
                items = self._drafting.followed(items)
                self._submit(ScheduleBatch(self._num_steps, items, changes), placement)
                return True
            if self._inflight:
                # Results under way may end requests and free pages; nobody is retracted before.
                self.drain()
            else:
                self._relieve()

    def _admit(self) -> None:
        for req in self._admission.admit(self._waiting, list(self._running.values())):
            self._running[req.rid] = req
            self.counters.note_admission(req)
            self.prefills.admitted(req, self._clock())

    def _preempted(self) -> list[Req]:
        """Who has to give up its place for the next in the queue; nobody while a budget moves."""
        if self._control.active:
            return []
        return self._admission.plan_preemption(self._waiting, list(self._running.values()))

    def _submit(self, batch: ScheduleBatch, placement: KVPlacement) -> None:
        info = SamplingBatchInfo.from_schedule_batch(batch, self._drops)
        self._drops = []
        if self._canary is not None:
            self._canary.before_forward(batch)
        forward_batch = self._make_batch(batch, placement)
        for item in batch.items:
            item.launch()
        self._memory.note_launched(batch.step)
        for slots in placement.out_cache_loc:
            self._turns.note_decided(slots)
        future = self._worker.submit(forward_batch, info)
        self._inflight.append(_StepInFlight(batch, info, future))
        self._drafting.index_prompts(batch.items)  # while the step is computed

    def _relieve(self) -> None:
        """No pages for anyone's next step: retract a victim, or end the only one there is."""
        running = [req for req in self._running.values() if not req.is_ending]
        victim = choose_victim(running)
        # A budget on its way down makes scarcity that is nobody's fault and passes.
        patient = self._control.active
        if victim is not None and (patient or victim.num_own_retractions < MAX_RETRACTIONS):
            self._retract(victim, forced=False)
            return
        if victim is None and not running:
            raise InvariantError("no pages are left although nobody runs")
        req = victim if victim is not None else running[0]
        need = req.known + req.num_pending + 1
        text = (
            f"Out of KV memory: the request needs {need} tokens now, the pool can hold "
            f"{self._memory.capacity_tokens} and could map no more."
        )
        self.end_by_abort(req, text, 503)

    def retract_one(self) -> bool:
        """Take the place of the running request that loses least, the last one's too.

        For a budget that shrinks, with the queue drained. False: nobody runs.
        """
        running = [req for req in self._running.values() if not req.is_ending]
        victim = choose_victim(running) or (running[0] if running else None)
        if victim is not None:
            self._retract(victim, forced=True)
        return victim is not None

    def _retract(self, req: Req, *, forced: bool) -> None:
        lease = req.kv
        if lease is None:
            raise InvariantError(f"{req!r} is retracted without memory")
        computed = req.num_shareable
        self._memory.close(lease, req.tokens.view(0, computed), computed)
        self._drops.append(lease.row)
        req.retract(forced=forced)
        self.prefills.gone(req)
        del self._running[req.rid]
        self._waiting.add(req)
        self.counters.num_retractions += 1
        logger.info("Retracted %r", req)

    # ---- collecting ----

    def _collect(self) -> None:
        """Take the oldest step's result and let its requests move on."""
        step = self._inflight.popleft()
        result = step.future.result()
        self._memory.note_completed(step.batch.step)
        counts = process_result(
            step.batch, step.info, result, self._memory, self._limits.context_length
        )
        self._turns.note_step(StepTime.of(step.batch, result))
        self._turns.note_decided(result.token_ids)
        self.counters.note_result(*counts)
        self.prefills.computed(step.batch.items, self._clock())
        for item in step.batch.items:
            self._outputs.note(item.req)
            self._settle(item.req)
        if step.batch.step % self._limits.log_interval_steps == 0:
            log_step(step.batch, self.num_running, self.num_waiting, self._memory)

    def _settle(self, req: Req) -> None:
        """Give everything back once a request is ending and no forward names it any more."""
        if not req.is_ending or req.num_inflight or req.state is ReqState.FINISHED:
            return
        if req.kv is not None:
            computed = req.num_shareable
            self._memory.close(req.kv, req.tokens.view(0, computed), computed)
            self._drops.append(req.kv.row)
            req.kv = None
            del self._running[req.rid]
        self.prefills.gone(req)
        req.move(ReqState.FINISHED)
        del self._by_rid[req.rid]

    def _pages_expected(self) -> tuple[int, ...]:
        limits = self._limits
        pages = pages_expected(self._running.values(), limits.chunk_tokens, limits.page_size)
        return (pages,) * len(limits.window_pages)

    def _reply(self, replies: Sequence[ControlReply]) -> None:
        for reply in replies:
            self._channel.send_reply(reply)

    def _flush_outputs(self) -> None:
        outputs = self._outputs.take()
        if outputs is not None:
            self._channel.send_outputs(outputs)
