"""What the TokenizerManager refuses, and that nothing reaches the scheduler then."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
import zmq

from sglang.srt.environ import Environ
from sglang.srt.errors import RequestError
from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.io_struct import (
    BatchTokenIDOut,
    ControlReply,
    ControlReq,
    FinishReason,
    IpcNames,
    StopStringHit,
    TokenizedGenerateReqInput,
    TokenOut,
    ToScheduler,
    int32_buffer,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.tokenizer.loader import load_tokenizer
from sglang.srt.tokenizer.tokenizer import Tokenizer
from sglang.srt.utils.channel import IpcDirectory, Receiver, Sender
from srt.managers.tokenizer_manager_harness import (
    CONTEXT_LENGTH,
    LENGTH,
    READY,
    VOCAB_SIZE,
    WAIT_S,
    collect,
    fake_settings,
    request,
    rig,
)
from srt.tokenizer.vocabularies import write_gguf


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = write_gguf(tmp_path_factory.mktemp("bpe") / "m.gguf", "bpe", pre="smollm")
    return load_tokenizer(str(path))


def prompt(length: int) -> list[int]:
    return [1] * length


REFUSED: list[tuple[Any, str]] = [
    (request(ids=[]), "prompt is empty"),
    (request(text=""), "prompt is empty"),
    (request(text="a", ids=[1]), "Exactly one of text and input_ids"),
    (request(ids=[1, VOCAB_SIZE]), rf"input_ids\[1\] is {VOCAB_SIZE}"),
    (request(ids=[-1]), r"input_ids\[0\] is -1"),
    (request(ids=[[1, 2]]), "prompt is empty"),
    (request(text="\ud800"), "not valid Unicode"),
    (request(stop=("a", "\ud800")), "stop is not valid Unicode"),
    (request("\udfff"), "rid is not valid Unicode"),
    (request(extra_key="\ud800"), "extra_key is not valid Unicode"),
    (request(priority=1 << 70), "priority must be in"),
    (request(max_new_tokens=1 << 70), "Requested token count exceeds"),
    (request(temperature=-1.0), "temperature must be"),
    (request(temperature=float("nan")), "temperature must be"),
    (request(stop_token_ids=(VOCAB_SIZE,)), "stop_token_ids has token id"),
    (request(stop=("",)), "stop must not contain an empty string"),
    (
        request(ids=prompt(CONTEXT_LENGTH)),
        r"The input \(100 tokens\) is longer than the model's context length \(100 tokens\)\.",
    ),
    (
        request(ids=prompt(90), max_new_tokens=11),
        r"Requested token count exceeds the model's maximum context length of 100 tokens\. "
        r"You requested a total of 101 tokens",
    ),
    (request(ids=prompt(95), max_new_tokens=None, min_new_tokens=6), "min_new_tokens is 6"),
    (request(return_logprob=True, top_logprobs_num=-1), r"top_logprobs_num must be in \[0, 1024\]"),
    (request(return_logprob=True, top_logprobs_num=1025), "top_logprobs_num"),
    (request(return_logprob=True, token_ids_logprob=(1, -2)), "token_ids_logprob has token id -2"),
    (request(return_logprob=True, token_ids_logprob=(0,) * 4097), "at most 4096 ids"),
    (request(return_logprob=True, logprob_start_len=-2), "logprob_start_len must be -1"),
    (request(return_logprob=True, logprob_start_len=4), "the prompt has only 3 tokens"),
    (
        request(ids=prompt(40), return_logprob=True, logprob_start_len=29),
        r"11 prompt tokens were asked for, but the limit is 10 \(--max-prompt-logprob-tokens\)",
    ),
]


async def test_each_mistake_is_a_400_and_sends_nothing(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        for ask, message in REFUSED:
            with pytest.raises(RequestError, match=message) as error:
                await collect(r.manager.generate(ask))
            assert error.value.http_status == 400
        assert r.manager.num_requests == 0
        control = asyncio.create_task(r.manager.control("audit"))
        assert await r.sent() == ControlReq(1, "audit")  # the first message that went out
        r.reply(ControlReply(1, True))
        await control


@pytest.mark.parametrize(
    ("fields", "max_new_tokens"),
    [
        ({"ids": prompt(96), "max_new_tokens": 4}, 4),
        ({"ids": prompt(60), "max_new_tokens": None}, 40),
        ({"ids": prompt(99), "max_new_tokens": None, "min_new_tokens": 1}, 1),
        ({"ids": prompt(99), "max_new_tokens": 0}, 0),
    ],
)
async def test_what_just_fits_is_served(
    tokenizer: Tokenizer, fields: dict[str, Any], max_new_tokens: int
) -> None:
    async with rig(tokenizer) as r:
        task = asyncio.create_task(collect(r.manager.generate(request(**fields))))
        sent = await r.sent_request()
        assert sent.sampling_params.max_new_tokens == max_new_tokens
        r.tell(sent.rid, "", [], LENGTH)
        await task


async def test_the_limit_follows_the_heartbeat(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        await r.heartbeat(context_length=50)
        assert r.manager.context_length == 50
        with pytest.raises(RequestError, match=r"context length \(50 tokens\)"):
            await collect(r.manager.generate(request(ids=prompt(60))))
        await r.heartbeat(context_length=200)
        task = asyncio.create_task(collect(r.manager.generate(request(ids=prompt(150)))))
        r.tell((await r.sent_request()).rid, "", [], LENGTH)
        await task


@pytest.mark.parametrize(
    ("fields", "start", "top", "picked"),
    [
        ({"return_logprob": True}, 30, 0, ()),
        ({"return_logprob": True, "logprob_start_len": 30}, 30, 0, ()),
        ({"return_logprob": True, "logprob_start_len": 20, "top_logprobs_num": 3}, 20, 3, ()),
        ({"return_logprob": True, "token_ids_logprob": (4, 5)}, 30, 0, (4, 5)),
        ({"logprob_start_len": 0, "top_logprobs_num": 9, "token_ids_logprob": (1,)}, 30, 0, ()),
    ],
)
async def test_log_probability_wishes_become_positions(
    tokenizer: Tokenizer, fields: dict[str, Any], start: int, top: int, picked: tuple[int, ...]
) -> None:
    async with rig(tokenizer) as r:
        task = asyncio.create_task(collect(r.manager.generate(request(ids=prompt(30), **fields))))
        sent = await r.sent_request()
        assert sent.logprob_start_len == start
        assert sent.top_logprobs_num == top
        assert bytes(sent.token_ids_logprob) == (int32_buffer(picked) if picked else b"")
        r.tell(sent.rid, "", [], LENGTH)
        await task


async def test_ignore_eos_adds_no_end_ids(tokenizer: Tokenizer) -> None:
    async with rig(tokenizer) as r:
        ask = request(ignore_eos=True, stop_token_ids=(9,))
        task = asyncio.create_task(collect(r.manager.generate(ask)))
        sent = await r.sent_request()
        assert sent.sampling_params.stop_token_ids == (9,)
        r.tell(sent.rid, "", [], LENGTH)
        await task


async def test_an_empty_text_is_empty_even_if_bos_would_be_added(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = write_gguf(tmp_path_factory.mktemp("spm") / "m.gguf", "spm")
    with_bos = load_tokenizer(str(path))
    assert with_bos.encode("").tolist() == [1]
    async with rig(with_bos) as r:
        with pytest.raises(RequestError, match="prompt is empty"):
            await collect(r.manager.generate(request(text="")))


async def test_without_a_tokenizer_only_ids_are_served() -> None:
    async with rig(None) as r:
        for ask, message in (
            (request(text="a"), "send input_ids, not text"),
            (request(stop=("a",)), "stop and stop_regex need a tokenizer"),
            (request(stop_regex=("a",)), "stop and stop_regex need a tokenizer"),
        ):
            with pytest.raises(RequestError, match=message) as error:
                await collect(r.manager.generate(ask))
            assert error.value.http_status == 400
        with pytest.raises(RequestError, match="no tokenizer"):
            await r.manager.tokenize("a")
        task = asyncio.create_task(collect(r.manager.generate(request(ids=[5, 6]))))
        sent = await r.sent_request()
        assert sent.sampling_params.stop_token_ids == (7,)  # the model's own end
        r.tell(sent.rid, "", [1, 2], LENGTH)
        (delta,) = await task
        assert (delta.text, delta.output_ids.tolist()) == ("", [1, 2])


class EchoScheduler:
    """A scheduler in a thread that says each prompt back, one token at a time."""

    def __init__(self, ipc: IpcNames, context: Any) -> None:
        self._receiver = Receiver[ToScheduler](context, ipc.scheduler, ToScheduler)
        self._sender = Sender[BatchTokenIDOut](context, ipc.detokenizer)
        self.hits: list[str] = []

    def serve(self, num_messages: int) -> None:
        for _ in range(num_messages):
            message = self._receiver.receive(WAIT_S * 1000)
            if isinstance(message, TokenizedGenerateReqInput):
                self._echo(message)
            elif isinstance(message, StopStringHit):
                self.hits.append(message.rid)
                end = FinishReason("stop", matched="fox")
                self._sender.send(
                    BatchTokenIDOut([TokenOut(message.rid, b"", 0, 0, finish_reason=end)])
                )

    def _echo(self, message: TokenizedGenerateReqInput) -> None:
        ids = np.frombuffer(message.input_ids, dtype=np.int32)
        end = FinishReason("length", length=len(ids))
        for at in range(len(ids)):
            last = at + 1 == len(ids) and not message.detok.stop_strings
            out = TokenOut(
                message.rid,
                int32_buffer(ids[at : at + 1]),
                prompt_tokens=len(ids),
                completion_tokens=at + 1,
                finish_reason=end if last else None,
                detok=message.detok if at == 0 else None,
            )
            self._sender.send(BatchTokenIDOut([out]))

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()


@pytest.mark.parametrize("with_tokenizer", [True, False])
async def test_a_request_through_scheduler_and_detokenizer(
    tokenizer: Tokenizer, with_tokenizer: bool
) -> None:
    """All three sockets: text in, text out, and a stop string that goes the short way."""
    used = tokenizer if with_tokenizer else None
    context: zmq.Context[Any] = zmq.Context()
    num_messages = 3 if with_tokenizer else 1
    with IpcDirectory() as directory:
        ipc = IpcNames.in_directory(directory.path)
        scheduler = EchoScheduler(ipc, context)
        detokenizer = DetokenizerManager(ipc, used)
        done = threading.Event()

        def detokenize() -> None:
            while not done.is_set():
                detokenizer.run_once(20)

        threads = [
            threading.Thread(target=scheduler.serve, args=(num_messages,)),
            threading.Thread(target=detokenize),
        ]
        for thread in threads:
            thread.start()
        args, config = fake_settings()
        manager = TokenizerManager(args, Environ(), config, ipc, used)
        await manager.start()
        manager.scheduler_ready(READY)
        try:
            text = "the naïve 😀 fox"
            if with_tokenizer:
                deltas = await collect(manager.generate(request(text=text)))
                assert "".join(delta.text for delta in deltas) == text
                stopped = await collect(manager.generate(request("s", text=text, stop=("fox",))))
                assert "".join(delta.text for delta in stopped) == "the naïve 😀 "
                assert stopped[-1].finish_reason == FinishReason("stop", matched="fox")
            else:
                deltas = await collect(manager.generate(request(ids=[5, 6, 7])))
                assert [i for delta in deltas for i in delta.output_ids] == [5, 6, 7]
                assert {delta.text for delta in deltas} == {""}
            assert deltas[-1].finish_reason is not None
            await asyncio.get_running_loop().run_in_executor(None, threads[0].join, WAIT_S)
            assert len(scheduler.hits) == (1 if with_tokenizer else 0)
        finally:
            done.set()
            await manager.stop()
            for thread in threads:
                thread.join(WAIT_S)
            scheduler.close()
            detokenizer.close()
            context.term()


async def test_a_priority_that_would_order_nothing_is_refused_where_that_is_asked_for(
    tokenizer: Tokenizer,
) -> None:
    async with rig(tokenizer) as r:
        r.manager.server_args.abort_on_priority_when_disabled = True  # type: ignore[misc]
        with pytest.raises(RequestError, match="priority has no effect on this server") as caught:
            await collect(r.manager.generate(request(ids=prompt(3), priority=0)))
        assert caught.value.http_status == 400
        assert r.manager.num_requests == 0
        for enabled, priority in ((False, None), (True, 0)):
            r.manager.server_args.enable_priority_scheduling = enabled  # type: ignore[misc]
            ask = request(ids=prompt(3), priority=priority)
            served = asyncio.create_task(collect(r.manager.generate(ask)))
            sent = await r.sent_request()
            assert sent.priority == priority
            r.tell(sent.rid, "", [], LENGTH)
            await served
