"""The life of a request in the TokenizerManager: sent, answered, aborted, failed."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchProgressOut,
    BatchStrOut,
    ControlReply,
    ControlReq,
    DetokOptions,
    FinishReason,
    LogprobArrays,
    PrefillProgress,
    int32_buffer,
)
from sglang.srt.tokenizer.loader import load_tokenizer
from sglang.srt.tokenizer.tokenizer import Tokenizer
from srt.managers.tokenizer_manager_harness import (
    LENGTH,
    READY,
    WAIT_S,
    Rig,
    collect,
    eventually,
    request,
    rig,
)
from srt.tokenizer.vocabularies import write_gguf


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = write_gguf(
        tmp_path_factory.mktemp("bpe") / "m.gguf", "bpe", pre="llama-bpe", eot_token_id=4
    )
    return load_tokenizer(str(path))


def rows(*values: float) -> LogprobArrays:
    return LogprobArrays(
        len(values),
        int32_buffer(range(len(values))),
        np.array(values, dtype="<f4").tobytes(),
        top_num=1,
        top_ids=int32_buffer(range(len(values))),
        top_logprobs=bytes(4 * len(values)),
        picked_ids=int32_buffer([9]),
        picked_logprobs=bytes(4 * len(values)),
    )


async def test_a_text_goes_out_as_ids_and_comes_back_as_deltas(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        ask = request(
            text="the quick brown fox jumps over",
            stop=("x",),
            stop_token_ids=(9,),
            min_new_tokens=2,
            skip_special_tokens=False,
            no_stop_trim=True,
            extra_key="k",
            priority=3,
        )
        stream = r.manager.generate(ask)
        first = asyncio.create_task(anext(stream))
        sent = await r.sent_request()
        ids = tokenizer.encode("the quick brown fox jumps over")
        assert np.frombuffer(sent.input_ids, dtype=np.int32).tolist() == ids.tolist()
        assert ids[0] == 1  # BOS, as the tokenizer's file says
        assert sent.sampling_params.stop_token_ids == (2, 4, 7, 9)
        assert (sent.extra_key, sent.priority, sent.stream) == ("k", 3, True)
        assert sent.detok == DetokOptions(("x",), 2, True, False, True, int32_buffer(ids[-6:]))
        assert (sent.return_logprob, sent.logprob_start_len) == (False, len(ids))
        r.tell(sent.rid, "he", [5, 6], cached_tokens=1, num_retractions=2)
        delta = await first
        assert (delta.text, delta.output_ids.tolist()) == ("he", [5, 6])
        assert (delta.prompt_tokens, delta.completion_tokens) == (3, 2)
        assert (delta.cached_tokens, delta.num_retractions) == (1, 2)
        assert delta.finish_reason is None
        r.tell(sent.rid, "y", [8], LENGTH, completion_tokens=3)
        rest = await collect(stream)
        assert [(d.text, d.finish_reason) for d in rest] == [("y", LENGTH)]
        assert r.manager.num_requests == 0


async def test_add_special_tokens_is_the_requests_choice(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        task = asyncio.create_task(
            collect(r.manager.generate(request(text="the", add_special_tokens=False)))
        )
        sent = await r.sent_request()
        assert np.frombuffer(sent.input_ids, dtype=np.int32)[0] != 1
        r.tell(sent.rid, "", [], LENGTH)
        await task


async def test_news_for_a_slow_consumer_are_merged_and_none_is_lost(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        stream = r.manager.generate(request(return_logprob=True, logprob_start_len=0))
        first = asyncio.create_task(anext(stream))
        sent = await r.sent_request()
        r.tell(sent.rid, "0", [10], input_logprobs=rows(-1, -2, -3), output_logprobs=rows(-4))
        delta = await first
        assert delta.input_logprobs == rows(-1, -2, -3)
        for number in range(1, 500):
            r.tell(sent.rid, str(number), [number], output_logprobs=rows(-number))
        r.tell(sent.rid, "!", [500], LENGTH, completion_tokens=501, output_logprobs=rows(-500))
        await eventually(lambda: next(iter(r.manager._states.values())).finished)
        assert "500 tokens waiting" in repr(next(iter(r.manager._states.values())))
        (last,) = await collect(stream)
        assert last.text == "".join(str(number) for number in range(1, 500)) + "!"
        assert last.output_ids.tolist() == list(range(1, 501))
        assert last.completion_tokens == 501
        assert last.finish_reason == LENGTH
        assert last.input_logprobs is None
        arrays = last.output_logprobs
        assert arrays is not None
        values = np.frombuffer(arrays.logprobs, dtype="<f4")
        assert values.tolist() == [-n for n in range(1, 501)]
        assert arrays.num_rows == 500
        assert (len(arrays.top_ids), arrays.picked_ids) == (2000, int32_buffer([9]))


async def test_there_is_one_final_delta_whatever_still_comes(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        task = asyncio.create_task(collect(r.manager.generate(request())))
        sent = await r.sent_request()
        final = r.news(sent.rid, "a", [1], LENGTH)
        r.reply(BatchStrOut([final, r.news(sent.rid, "b", [2]), final]))
        deltas = await task
        assert [(d.text, d.finish_reason) for d in deltas] == [("a", LENGTH)]


async def test_many_requests_are_kept_apart(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        tasks = [
            asyncio.create_task(collect(r.manager.generate(request(f"r{n}")))) for n in range(32)
        ]
        sent = [await r.sent_request() for _ in tasks]
        assert len({message.rid for message in sent}) == 32
        for _ in range(3):
            r.reply(BatchStrOut([r.news(message.rid, message.rid[1], [1]) for message in sent]))
        r.reply(BatchStrOut([r.news(message.rid, "", [], LENGTH) for message in sent]))
        for number, task in enumerate(tasks):
            deltas = await task
            assert "".join(d.text for d in deltas) == str(number)[0] * 3
            assert sum(len(d.output_ids) for d in deltas) == 3


async def test_an_id_in_use_is_refused_and_free_again_after_the_end(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        task = asyncio.create_task(collect(r.manager.generate(request("same"))))
        sent = await r.sent_request()
        with pytest.raises(RequestError, match="'same' is already being served") as error:
            await collect(r.manager.generate(request("same")))
        assert error.value.http_status == 400
        r.tell(sent.rid, "", [], LENGTH)
        await task
        again = asyncio.create_task(collect(r.manager.generate(request("same"))))
        second = await r.sent_request()
        assert second.rid != sent.rid  # late news of the first cannot reach the second
        r.tell(sent.rid, "late", [], LENGTH)
        r.tell(second.rid, "new", [], LENGTH)
        assert [d.text for d in await again] == ["new"]


# ---- aborts


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_a_consumer_that_leaves_aborts_its_request(tokenizer: Tokenizer, how: str) -> None:
    async with rig(tokenizer) as r:
        stream = r.manager.generate(request())
        if how == "close":
            first = asyncio.create_task(anext(stream))
            sent = await r.sent_request()
            r.tell(sent.rid, "a", [1])
            await first
            await stream.aclose()
        else:
            task = asyncio.create_task(collect(stream))
            sent = await r.sent_request()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await r.sent() == AbortReq(sent.rid, message="The client went away.")
        assert r.manager.num_requests == 0
        r.tell(sent.rid, "late", [2], LENGTH)  # nobody's any more
        await r.heartbeat()


async def test_leaving_after_the_end_aborts_nothing(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        stream = r.manager.generate(request())
        first = asyncio.create_task(anext(stream))
        sent = await r.sent_request()
        r.tell(sent.rid, "a", [1], LENGTH)
        await first
        await stream.aclose()
        control = asyncio.create_task(r.manager.control("internal_state"))
        assert isinstance(await r.sent(), ControlReq)  # and no AbortReq before it
        r.reply(ControlReply(1, True))
        await control


async def test_abort_takes_all_ids_that_begin_so(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        names = ["job_0", "job_1", "other"]
        tasks = [asyncio.create_task(collect(r.manager.generate(request(n)))) for n in names]
        sent = {
            message.rid.split("#")[0]: message.rid
            for message in [await r.sent_request() for _ in names]
        }
        await r.manager.abort("")
        await r.manager.abort("unknown")
        await r.manager.abort("job_")
        aborted = [await r.sent(), await r.sent()]
        message = "Request aborted by the client"
        assert aborted == [AbortReq(sent[n], message=message) for n in names[:2]]
        for name in names:
            r.tell(sent[name], "", [], FinishReason("abort", message=message))
        for task in tasks:
            (last,) = await task
            assert last.finish_reason == FinishReason("abort", message=message)


async def test_abort_all_is_one_message(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        task = asyncio.create_task(collect(r.manager.generate(request())))
        sent = await r.sent_request()
        await r.manager.abort(abort_all=True)
        message = await r.sent()
        assert isinstance(message, AbortReq)
        assert message.abort_all
        r.tell(sent.rid, "", [], FinishReason("abort"))
        await task


class SlowTokenizer:
    """Tokenises "slow" texts when the test says so, others at once; "endless" ones for ever."""

    def __init__(self) -> None:
        self.eos_token_ids = ()
        self.go = threading.Event()
        self.num_pieces = 0

    def encode_pieces(self, text: str, **_: Any) -> Any:
        if text.startswith("slow"):
            assert self.go.wait(WAIT_S)
        yield np.arange(3, dtype=np.int32)
        while text.startswith("endless"):
            self.num_pieces += 1
            yield np.arange(3, dtype=np.int32)


async def test_a_long_text_does_not_keep_short_ones_waiting() -> None:
    slow: Any = SlowTokenizer()
    async with rig(slow) as r:
        late = [
            asyncio.create_task(
                collect(r.manager.generate(request(f"slow{n}", text="slow" + "x" * 40_000)))
            )
            for n in range(4)
        ]
        quick = asyncio.create_task(collect(r.manager.generate(request("quick", text="short"))))
        sent = await r.sent_request()
        assert sent.rid.startswith("quick")
        r.tell(sent.rid, "", [], LENGTH)
        await quick
        slow.go.set()
        for _ in late:
            r.tell((await r.sent_request()).rid, "", [], LENGTH)
        for task in late:
            await task


async def test_abort_while_tokenising_sends_nothing() -> None:
    slow: Any = SlowTokenizer()
    async with rig(slow) as r:
        task = asyncio.create_task(collect(r.manager.generate(request(text="slow"))))
        await eventually(lambda: r.manager.num_requests == 1)
        await r.manager.abort("r")
        slow.go.set()
        (delta,) = await task
        assert delta.finish_reason is not None
        assert delta.finish_reason.type == "abort"
        assert (delta.prompt_tokens, delta.completion_tokens) == (3, 0)
        await sends_nothing_more(r)


async def test_leaving_while_tokenising_sends_nothing() -> None:
    slow: Any = SlowTokenizer()
    async with rig(slow) as r:
        task = asyncio.create_task(collect(r.manager.generate(request(text="slow"))))
        await eventually(lambda: r.manager.num_requests == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        slow.go.set()
        assert r.manager.num_requests == 0
        await sends_nothing_more(r)


async def test_a_long_text_ends_with_its_client_and_others_have_their_turns() -> None:
    endless: Any = SlowTokenizer()
    async with rig(endless) as r:
        text = "endless" + "x" * 40_000
        tasks = [
            asyncio.create_task(collect(r.manager.generate(request(f"e{n}", text=text))))
            for n in range(4)
        ]
        await eventually(lambda: endless.num_pieces > 20)
        other = asyncio.create_task(r.manager.tokenize("y" * 40_000))  # as long as they are
        assert len(await other) == 3
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(await r.manager.tokenize("y" * 40_000)) == 3  # behind what still ran
        ended = endless.num_pieces
        assert len(await r.manager.tokenize("y" * 40_000)) == 3
        assert endless.num_pieces <= ended + 2  # a piece on each thread may have been under way
        assert r.manager.num_requests == 0


async def test_a_long_text_in_pieces_is_one_prompt(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        text = "a quick brown fox. " * 4000
        ids = await r.manager.tokenize(text)
        assert ids.tolist() == tokenizer._encode_whole(text, True).tolist()


async def sends_nothing_more(r: Rig) -> None:
    """The next thing that the scheduler hears is what the test asks now."""
    task = asyncio.create_task(r.manager.control("audit"))
    message = await r.sent()
    assert isinstance(message, ControlReq)
    r.reply(ControlReply(message.seq, True))
    await task


# ---- the scheduler's end


async def test_when_the_scheduler_dies_everyone_hears_at_once(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        tasks = [
            asyncio.create_task(collect(r.manager.generate(request(f"{n}")))) for n in range(3)
        ]
        control = asyncio.create_task(r.manager.control("internal_state"))
        failed = asyncio.create_task(r.manager.wait_failed())
        for _ in range(4):
            await r.sent()
        threading.Thread(
            target=r.manager.server_died, args=("The scheduler process died.",)
        ).start()
        for task in [*tasks, control]:
            with pytest.raises(RequestError, match="scheduler process died") as error:
                await task
            assert error.value.http_status == 503
        assert await failed == "The scheduler process died."
        with pytest.raises(RequestError, match="scheduler process died"):
            await collect(r.manager.generate(request("later")))
        assert not r.manager.is_healthy()
        assert r.manager.num_requests == 0


async def test_nothing_is_served_before_the_scheduler_is_ready(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer, ready=False) as r:
        with pytest.raises(RequestError, match="starting") as error:
            await collect(r.manager.generate(request()))
        assert error.value.http_status == 503
        assert not r.manager.is_healthy()
        assert r.manager.context_length == 0
        r.manager.scheduler_ready(READY)
        assert r.manager.is_healthy()


async def test_stopping_fails_what_still_waits(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        task = asyncio.create_task(collect(r.manager.generate(request())))
        await r.sent()
    with pytest.raises(RequestError, match="shutting down"):
        await task
    await r.manager.abort("r")  # nobody is there to hear it


async def test_a_message_that_cannot_be_read_fails_loudly(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(tokenizer) as r:
        task = asyncio.create_task(collect(r.manager.generate(request())))
        await r.sent()
        nonsense: Any = {"type": "martian"}
        r.reply(nonsense)
        with pytest.raises(RequestError, match="TokenizerManager failed"):
            await task
        assert not r.manager.is_healthy()
    assert "cannot go on" in caplog.text


async def test_text_helpers_work_off_the_loop(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        ids = await r.manager.tokenize("the fox", False)
        assert await r.manager.detokenize(ids) == "the fox"
        with pytest.raises(RequestError, match="no chat template"):
            await r.manager.render_chat([{"role": "user", "content": "hi"}])


async def test_progress_reaches_the_one_who_asked_and_ends_with_the_first_token() -> None:
    async with rig(None) as r:
        stream = r.manager.generate(request(include_progress=True))
        first = asyncio.create_task(anext(stream))
        sent = await r.sent_request()
        assert sent.include_progress
        early = PrefillProgress(sent.rid, 1, 3, 10.0, 0.2)
        r.reply(BatchProgressOut([early, PrefillProgress("unknown", 1, 3, 1.0, None)]))
        delta = await first
        assert delta.progress == early
        assert (delta.text, len(delta.output_ids), delta.finish_reason) == ("", 0, None)
        second = asyncio.create_task(anext(stream))
        r.tell(sent.rid, "", [5, 6], LENGTH)
        r.reply(BatchProgressOut([PrefillProgress(sent.rid, 2, 3, 10.0, 0.1)]))
        last = await second
        assert last.progress is None
        assert last.output_ids.tolist() == [5, 6]
        assert await collect(stream) == []


@pytest.mark.parametrize(
    ("length", "wanted", "kept", "most"),
    [(300, 4, 99, 1), (100, None, 99, 1), (99, 4, 99, 1), (98, 4, 98, 2), (50, 4, 50, 4)],
)
async def test_what_is_too_long_is_cut_to_fit_if_told(
    length: int, wanted: int | None, kept: int, most: int
) -> None:
    async with rig(None) as r:
        r.manager.server_args.allow_auto_truncate = True  # type: ignore[misc]
        ids = list(range(length))
        ask = request(ids=ids, max_new_tokens=wanted, min_new_tokens=2 if length > 98 else 0)
        stream = r.manager.generate(ask)
        running = asyncio.create_task(collect(stream))
        sent = await r.sent_request()
        assert np.frombuffer(sent.input_ids, np.int32).tolist() == ids[:kept]
        assert sent.detok.prefix_ids == int32_buffer(ids[kept - 6 : kept])
        assert sent.sampling_params.max_new_tokens == most
        assert sent.sampling_params.min_new_tokens <= most
        assert sent.logprob_start_len == kept
        r.tell(sent.rid, "", [5], LENGTH)
        await running
