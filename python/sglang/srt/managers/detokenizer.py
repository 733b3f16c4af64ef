"""Token news to text news, request by request: the detokenizer without its sockets.

`Detokenizer.handle` is a function of its messages and of what each live request has shown so far.
A request is forgotten with its final news, so memory is bounded by the requests alive.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sglang.srt.managers.generate_request import first_rows
from sglang.srt.managers.incremental_text import IncrementalDecoder, StopMatcher, make_decoder
from sglang.srt.managers.io_struct import (
    BatchTokenIDOut,
    DetokOptions,
    FinishReason,
    StopStringHit,
    TextOut,
    TokenOut,
)
from sglang.srt.managers.stop_regex import TextStops
from sglang.srt.tokenizer.tokenizer import Tokenizer


@dataclass
class DetokenizedBatch:
    """What follows from one batch: `outs` for the TokenizerManager, `hits` for the scheduler."""

    outs: list[TextOut] = field(default_factory=list)
    hits: list[StopStringHit] = field(default_factory=list)


class Detokenizer:
    """Keeps one `_Stream` per live request. `tokenizer` None: every text is empty."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._streams: dict[str, _Stream] = {}
        self._stopped: set[str] = set()  # ended by its text, the scheduler's end still to come

    def __len__(self) -> int:
        """Requests that are remembered."""
        return len(self._streams) + len(self._stopped)

    def handle(self, batch: BatchTokenIDOut) -> DetokenizedBatch:
        """The text of all news of one step.

        A request that a stop string ends gets its final news here; what the scheduler still
        sends of it is dropped, up to and including its own final news.
        """
        result = DetokenizedBatch()
        for out in batch.outs:
            if out.rid in self._stopped:
                if out.finish_reason is not None:
                    self._stopped.remove(out.rid)
                continue
            text_out = self._handle_one(out)
            result.outs.append(text_out)
            if text_out.finish_reason is None:
                continue
            self._streams.pop(out.rid, None)
            if out.finish_reason is None:
                self._stopped.add(out.rid)
                result.hits.append(StopStringHit(out.rid))
        return result

    def _handle_one(self, out: TokenOut) -> TextOut:
        stream = self._streams.get(out.rid)
        if stream is None:
            options = DetokOptions() if out.detok is None else out.detok
            stream = self._streams[out.rid] = _Stream(self._tokenizer, options)
        news = TextOut(
            rid=out.rid,
            text="",
            output_ids=out.output_ids,
            prompt_tokens=out.prompt_tokens,
            completion_tokens=out.completion_tokens,
            cached_tokens=out.cached_tokens,
            num_retractions=out.num_retractions,
            finish_reason=out.finish_reason,
            input_logprobs=out.input_logprobs,
            output_logprobs=out.output_logprobs,
            drafts=out.drafts,
            pooled=out.pooled,
        )
        stream.read(out, news)
        return news


class _Stream:
    """The text side of one request."""

    def __init__(self, tokenizer: Tokenizer | None, options: DetokOptions) -> None:
        self._min_new_tokens = options.min_new_tokens
        self._no_stop_trim = options.no_stop_trim
        self._decoder: IncrementalDecoder | None = None
        if tokenizer is not None:
            self._decoder = make_decoder(
                tokenizer,
                np.frombuffer(options.prefix_ids, dtype="<i4").tolist(),
                skip_special_tokens=options.skip_special_tokens,
                spaces_between_special_tokens=options.spaces_between_special_tokens,
                kept_special_tokens=options.kept_special_tokens,
            )
        self._matcher: StopMatcher | TextStops | None = None
        if options.stop_regex:
            self._matcher = TextStops(
                options.stop_strings, options.stop_regex, keep_match=options.no_stop_trim
            )
        elif options.stop_strings:
            self._matcher = StopMatcher(options.stop_strings, keep_match=options.no_stop_trim)

    def read(self, out: TokenOut, news: TextOut) -> None:
        """Fill in `news.text`; cut `news` at the token that completes a stop string."""
        if self._decoder is None:
            return
        ids = np.frombuffer(out.output_ids, dtype="<i4").tolist()
        shown_ids = ids
        if not self._no_stop_trim and _ends_with_stop_token(ids, out.finish_reason):
            shown_ids = ids[:-1]
        parts: list[str] = []
        num_before = out.completion_tokens - len(ids)
        for count, token_id in enumerate(shown_ids, start=1):
            stop = self._show(self._decoder.feed(token_id), num_before + count, parts)
            if stop is not None:
                _cut_at_stop(news, count, num_before + count, stop)
                break
        else:
            if out.finish_reason is not None:
                stop = self._show(self._decoder.flush(), out.completion_tokens, parts)
                if stop is not None:
                    news.finish_reason = FinishReason("stop", matched=stop)
                elif self._matcher is not None:
                    parts.append(self._matcher.flush())
        news.text = "".join(parts)

    def _show(self, text: str, num_tokens: int, parts: list[str]) -> str | None:
        """Add what may be shown of `text` to `parts`; the stop string that it completes, if any."""
        if self._matcher is None or not text:
            parts.append(text)
            return None
        match = self._matcher.feed(text, armed=num_tokens >= self._min_new_tokens)
        parts.append(match.text)
        return match.matched


def _ends_with_stop_token(ids: list[int], reason: FinishReason | None) -> bool:
    return (
        reason is not None
        and reason.type == "stop"
        and isinstance(reason.matched, int)
        and bool(ids)
        and ids[-1] == reason.matched
    )


def _cut_at_stop(news: TextOut, num_ids: int, completion_tokens: int, stop: str) -> None:
    """End `news` with its first `num_ids` ids, because `stop` was completed by the last of them."""
    news.output_ids = news.output_ids[: 4 * num_ids]
    news.output_logprobs = first_rows(news.output_logprobs, num_ids)
    news.completion_tokens = completion_tokens
    news.finish_reason = FinishReason("stop", matched=stop)
