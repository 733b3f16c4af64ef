"""Running sequences: n is expanded, batches are merged, outputs are put together.

Between the API doors (which speak a format) and the TokenizerManager (which serves one sequence
at a time). All doors and the Engine share it, so a prompt with n = 4 means the same everywhere.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import msgspec
import numpy as np

from sglang.srt.entrypoints.event_stream import cancel_and_wait
from sglang.srt.entrypoints.model_kind import ModelKind
from sglang.srt.entrypoints.service import TextService
from sglang.srt.entrypoints.session_runner import SessionRunner
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import (
    GenerateDelta,
    GenerateRequest,
    IdArray,
    concat_logprobs,
)
from sglang.srt.managers.io_struct import FinishReason, LogprobArrays
from sglang.srt.sampling.sampling_params import MAX_SEED

# A single call may not start more sequences than this: each costs memory before it is admitted.
MAX_SEQUENCES = 1 << 16
MAX_N = 128

CLIENT_CLOSED = 499  # the status of an abort that the client itself asked for
ABORTED_BY_CLIENT = "Request aborted by the client"

Delta = tuple[int, GenerateDelta]


class SequenceObserver(Protocol):
    """Told of every sequence's life, for metrics; see managers/metrics.py."""

    def started(self) -> None:
        """A sequence was sent off."""
        ...

    def news(self, delta: GenerateDelta, new_tokens: int, seconds_since_last: float) -> None:
        """A delta came; the seconds count from the delta before, or from the start."""
        ...

    def ended(self, last: GenerateDelta | None, seconds: float) -> None:
        """The sequence ended; `last` is None when it was given up before its end."""
        ...


@dataclass(frozen=True)
class Call:
    """All sequences of one client call.

    `rid` is what the client may abort it by; `prompts` hold the requests before n is expanded.
    Sequence numbers run over prompts first, then over each prompt's n. Making one raises
    RequestError 400 when it asks for too many, before anything of that size exists.
    """

    rid: str
    prompts: tuple[GenerateRequest, ...]

    def __post_init__(self) -> None:
        counts = [prompt.sampling_params.n for prompt in self.prompts]
        for n in counts:
            if not 1 <= n <= MAX_N:
                raise RequestError(f"n must be in [1, {MAX_N}], got {n}.")
        if not 1 <= sum(counts) <= MAX_SEQUENCES:
            raise RequestError(
                f"The request asks for {sum(counts)} sequences; it may ask for 1 to "
                f"{MAX_SEQUENCES}."
            )

    @cached_property
    def prompt_indices(self) -> tuple[int, ...]:
        """The prompt's index of each sequence."""
        return tuple(i for i, p in enumerate(self.prompts) for _ in range(p.sampling_params.n))

    @cached_property
    def sequence_rids(self) -> tuple[str, ...]:
        """The id of each sequence: the prompt's own, numbered when n is above 1."""
        return tuple(
            prompt.rid if prompt.sampling_params.n == 1 else f"{prompt.rid}_{choice}"
            for prompt in self.prompts
            for choice in range(prompt.sampling_params.n)
        )

    @property
    def num_sequences(self) -> int:
        """Sequences after n is expanded."""
        return len(self.prompt_indices)


class SequenceOutput:
    """One sequence as far as it has come.

    Parts are joined only when somebody asks for the whole, and then kept joined, so a reply that
    is asked for once costs each token once.
    """

    def __init__(self) -> None:
        self.last: GenerateDelta | None = None
        self.input_logprobs: LogprobArrays | None = None
        self._texts: list[str] = []
        self._ids: list[IdArray] = []
        self._logprobs: list[LogprobArrays] = []

    def add(self, delta: GenerateDelta) -> None:
        """Append a delta."""
        self.last = delta
        self._texts.append(delta.text)
        self._ids.append(delta.output_ids)
        if delta.input_logprobs is not None:
            self.input_logprobs = delta.input_logprobs
        if delta.output_logprobs is not None:
            self._logprobs.append(delta.output_logprobs)

    @property
    def text(self) -> str:
        """All text so far."""
        if len(self._texts) > 1:
            self._texts = ["".join(self._texts)]
        return self._texts[0] if self._texts else ""

    @property
    def output_ids(self) -> IdArray:
        """All output ids so far, int32."""
        if len(self._ids) > 1:
            self._ids = [np.concatenate(self._ids)]
        return self._ids[0] if self._ids else np.empty(0, np.int32)

    @property
    def output_logprobs(self) -> LogprobArrays | None:
        """Log probabilities of all output ids so far, None when not asked for."""
        joined = concat_logprobs(self._logprobs)
        self._logprobs = [] if joined is None else [joined]
        return joined

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while it runs."""
        return self.last.finish_reason if self.last is not None else None


def abort_error(reason: FinishReason | None) -> RequestError | None:
    """The error behind an abort that the engine decided; None for all other ends.

    An abort by the client's own wish has no error status and is an ordinary end.
    """
    if reason is None or reason.type != "abort" or reason.status_code < 400:
        return None
    if reason.status_code == CLIENT_CLOSED:
        return None
    return RequestError(reason.message, reason.status_code, reason.err_type or None)


class SequenceRunner:
    """Starts sequences and hands out their deltas.

    It knows the sequences that it has not sent off yet (see `_merge`), so that an abort reaches
    them too.
    """

    def __init__(
        self,
        service: TextService,
        observer: SequenceObserver | None = None,
        kind: ModelKind | None = None,
    ) -> None:
        """`kind` None: the model generates."""
        self._service = service
        self._kind = kind or ModelKind(None)
        self._observer = observer
        self._held: dict[str, bool] = {}  # rid -> aborted meanwhile
        self.sessions = SessionRunner(service)

    async def collect(self, call: Call) -> list[SequenceOutput]:
        """Every sequence's whole output, in order.

        Raises RequestError when any sequence is refused or ended by the engine; the others are
        aborted then, as they are when this is cancelled.
        """
        outputs = [SequenceOutput() for _ in range(call.num_sequences)]
        async with aclosing(self.answers(call)) as deltas:
            async for index, delta in deltas:
                outputs[index].add(delta)
        return outputs

    async def answers(self, call: Call) -> AsyncGenerator[Delta, None]:
        """`stream`, but an abort that the engine decided is raised as the RequestError it is."""
        async with aclosing(self.stream(call)) as deltas:
            async for index, delta in deltas:
                error = abort_error(delta.finish_reason)
                if error is not None:
                    raise error
                yield index, delta

    async def stream(self, call: Call) -> AsyncGenerator[Delta, None]:
        """Deltas of all sequences as they come, each with its sequence number.

        Raises RequestError as soon as one sequence is refused. Closing it aborts what still runs.
        """
        for prompt in call.prompts:
            self._kind.check(prompt)
        with self._service.adapters.held(one.lora_path for one in call.prompts) as numbers:
            groups = [await self._expand(prompt) for prompt in call.prompts]
            for request in (one for group in groups for one in group):
                request.lora_number = numbers.get(request.lora_path or "")
            if call.num_sequences == 1:
                source = self._single(groups[0][0])
            else:
                source = self._merge(groups)
            async with aclosing(source) as deltas:
                async for item in deltas:
                    yield item

    async def abort(self, rid: str, abort_all: bool = False) -> None:
        """End the sequences whose id starts with `rid`, as SGLang does, or all of them."""
        for held in self._held:
            if abort_all or (rid and held.startswith(rid)):
                self._held[held] = True
        await self._service.abort(rid, abort_all)

    async def _expand(self, prompt: GenerateRequest) -> list[GenerateRequest]:
        """n requests for one prompt; a text is tokenized once for all of them.

        Choice i samples with seed + i, so choices differ and each can be repeated alone.
        """
        params = prompt.sampling_params
        if params.n == 1:
            return [prompt]
        ids = prompt.input_ids
        if prompt.text is not None and prompt.session is None:  # a session tokenizes by itself
            ids = await self._service.tokenize(prompt.text, prompt.add_special_tokens)
        requests = []
        for choice in range(params.n):
            seed = params.sampling_seed
            if seed is not None:
                seed = min(seed + choice, MAX_SEED)
            requests.append(
                dataclasses.replace(
                    prompt,
                    rid=f"{prompt.rid}_{choice}",
                    text=prompt.text if ids is None else None,
                    input_ids=ids,
                    sampling_params=msgspec.structs.replace(params, n=1, sampling_seed=seed),
                )
            )
        return requests

    async def _single(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        async with aclosing(self._observed(request)) as deltas:
            async for delta in deltas:
                yield 0, delta

    async def _merge(
        self, groups: Sequence[Sequence[GenerateRequest]]
    ) -> AsyncGenerator[Delta, None]:
        """One task per sequence feeds one queue.

        `room` lets a single delta wait there: a slow reader thus stops the feeding tasks, and the
        service coalesces what piles up. A task's end is queued too, so an error in it surfaces.
        """
        queue: asyncio.Queue[Delta | asyncio.Task[None]] = asyncio.Queue()
        room = asyncio.Semaphore(1)
        tasks: list[asyncio.Task[None]] = []
        for group in groups:
            # The siblings of a prompt start when its first choice has news: by then the prompt is
            # computed and cached, and they share it instead of computing it again.
            leader_has_news = asyncio.Event()
            for choice, request in enumerate(group):
                source = self._lead(request, leader_has_news)
                if choice > 0:
                    source = self._follow(request, leader_has_news)
                task = asyncio.create_task(_feed(len(tasks), source, queue, room))
                task.add_done_callback(queue.put_nowait)
                tasks.append(task)
        running = len(tasks)
        try:
            while running:
                item = await queue.get()
                if isinstance(item, asyncio.Task):
                    item.result()
                    running -= 1
                else:
                    room.release()
                    yield item
        finally:
            await cancel_and_wait(*tasks)

    async def _lead(
        self, request: GenerateRequest, has_news: asyncio.Event
    ) -> AsyncGenerator[GenerateDelta, None]:
        async with aclosing(self._observed(request)) as deltas:
            async for delta in deltas:
                if delta.progress is None:
                    has_news.set()
                yield delta

    async def _follow(
        self, request: GenerateRequest, gate: asyncio.Event
    ) -> AsyncGenerator[GenerateDelta, None]:
        self._held[request.rid] = False
        try:
            await gate.wait()
        finally:
            aborted = self._held.pop(request.rid, False)
        if aborted:  # nobody else would answer for it
            reason = FinishReason("abort", message=ABORTED_BY_CLIENT, status_code=CLIENT_CLOSED)
            yield GenerateDelta("", np.empty(0, np.int32), 0, 0, 0, 0, reason)
            return
        async with aclosing(self._observed(request)) as deltas:
            async for delta in deltas:
                yield delta

    def _generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateDelta, None]:
        of = self._service if request.session is None else self.sessions
        return of.generate(request)

    async def _observed(self, request: GenerateRequest) -> AsyncGenerator[GenerateDelta, None]:
        observer = self._observer
        if observer is None:
            async with aclosing(self._generate(request)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        observer.started()
        start = previous = time.monotonic()
        last: GenerateDelta | None = None
        try:
            async with aclosing(self._generate(request)) as deltas:
                async for delta in deltas:
                    if delta.progress is not None:
                        yield delta
                        continue
                    now = time.monotonic()
                    observer.news(delta, len(delta.output_ids), now - previous)
                    previous, last = now, delta
                    yield delta
        finally:
            ended = last is not None and last.finish_reason is not None
            observer.ended(last if ended else None, time.monotonic() - start)


async def _feed(
    index: int,
    source: AsyncGenerator[GenerateDelta, None],
    queue: asyncio.Queue[Delta | asyncio.Task[None]],
    room: asyncio.Semaphore,
) -> None:
    async with aclosing(source) as deltas:
        async for delta in deltas:
            await room.acquire()
            queue.put_nowait((index, delta))
