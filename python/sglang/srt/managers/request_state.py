"""One request as the TokenizerManager waits for it: news that the consumer has not taken yet.

A consumer may be slower than the server, so news are merged as they come: nothing is dropped and
nothing but the undelivered content itself is kept. Lives on one event loop.
"""

from __future__ import annotations

import asyncio
import io

import numpy as np

from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import GenerateDelta, concat_logprobs
from sglang.srt.managers.io_struct import FinishReason, LogprobArrays, PrefillProgress, TextOut
from sglang.srt.managers.lora_registry import LoadedAdapter


class RequestState:
    """The mailbox of one request, filled by the receiving task and emptied by one consumer.

    `rid` is the client's id, `wire_rid` the one that the other processes see: unique even when
    a client uses an id again while the scheduler is still ending its first bearer. `replica` is
    set from the moment that one's scheduler may know the request, `finished` once its final news
    came. `shown_dp_rank` is what clients hear of the replica, None where there is one. `adapter` is
    the LoRA adapter that it runs with, None: none. `image_bytes` are those of its images' pixels,
    as the image desk counts them.
    """

    def __init__(self, rid: str, wire_rid: str, adapter: LoadedAdapter | None = None) -> None:
        self.rid = rid
        self.wire_rid = wire_rid
        self.adapter = adapter
        self.replica: int | None = None
        self.shown_dp_rank: int | None = None
        self.finished = False
        self.image_bytes = 0
        self.abort_message: str | None = None
        self._error: RequestError | None = None
        self._news = asyncio.Event()
        self._last: TextOut | None = None
        self._progress: PrefillProgress | None = None
        self._text = io.StringIO()
        self._ids = bytearray()
        self._input_logprobs: LogprobArrays | None = None
        self._output_logprobs: list[LogprobArrays] = []

    def put(self, out: TextOut) -> None:
        """Add news; what comes after the final news is ignored."""
        if self.finished:
            return
        self._text.write(out.text)
        self._ids += out.output_ids
        if out.input_logprobs is not None:
            self._input_logprobs = out.input_logprobs
        if out.output_logprobs is not None:
            self._output_logprobs.append(out.output_logprobs)
        self._last = out
        self._progress = None
        self.finished = out.finish_reason is not None
        self._news.set()

    def put_progress(self, progress: PrefillProgress) -> None:
        """Note how far the prompt is; only the latest is kept, and none once tokens came."""
        if self._last is None and not self.finished:
            self._progress = progress
            self._news.set()

    def fail(self, error: RequestError) -> None:
        """Let the consumer raise `error` at once; nothing comes after it."""
        self._error = error
        self.finished = True
        self._news.set()

    async def next_delta(self) -> GenerateDelta:
        """Wait for news and take all there are. Raises the error given to `fail`."""
        await self._news.wait()
        self._news.clear()
        if self._error is not None:
            raise self._error
        if self._progress is not None:
            delta = self._progress_delta(self._progress)
            self._progress = None
            return delta
        assert self._last is not None  # other news are set by `put` and `fail` only
        last = self._last
        delta = GenerateDelta(
            text=self._text.getvalue(),
            output_ids=np.frombuffer(bytes(self._ids), dtype=np.int32),
            prompt_tokens=last.prompt_tokens,
            completion_tokens=last.completion_tokens,
            cached_tokens=last.cached_tokens,
            num_retractions=last.num_retractions,
            finish_reason=last.finish_reason,
            input_logprobs=self._input_logprobs,
            output_logprobs=concat_logprobs(self._output_logprobs),
            dp_rank=self.shown_dp_rank,
            drafts=last.drafts,
            pooled=None if last.pooled is None else np.frombuffer(last.pooled, "<f4"),
        )
        self._text = io.StringIO()
        self._ids = bytearray()
        self._input_logprobs = None
        self._output_logprobs = []
        return delta

    @staticmethod
    def _progress_delta(progress: PrefillProgress) -> GenerateDelta:
        return GenerateDelta(
            text="",
            output_ids=np.empty(0, dtype=np.int32),
            prompt_tokens=progress.total_tokens,
            completion_tokens=0,
            cached_tokens=0,
            num_retractions=0,
            finish_reason=None,
            progress=progress,
        )

    def aborted_delta(self, prompt_tokens: int) -> GenerateDelta:
        """The final news of a request that was aborted before the scheduler knew it."""
        return GenerateDelta(
            text="",
            output_ids=np.empty(0, dtype=np.int32),
            prompt_tokens=prompt_tokens,
            completion_tokens=0,
            cached_tokens=0,
            num_retractions=0,
            finish_reason=FinishReason("abort", message=self.abort_message or ""),
        )

    def __repr__(self) -> str:
        state = "finished" if self.finished else "sent" if self.replica is not None else "preparing"
        return f"RequestState({self.wire_rid}, {state}, {len(self._ids) // 4} tokens waiting)"
