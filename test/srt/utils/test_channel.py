"""Typed pipes over real sockets."""

import asyncio
import gc
import os
import stat
import tracemalloc
import weakref
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchStrOut,
    ControlReply,
    Heartbeat,
    IpcNames,
    StopStringHit,
    TokenizedGenerateReqInput,
    ToScheduler,
    ToTokenizer,
)
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.channel import AsyncReceiver, IpcDirectory, Receiver, Sender

WAIT_MS = 30_000


@pytest.fixture
def endpoint() -> Iterator[str]:
    with IpcDirectory() as directory:
        yield IpcNames.in_directory(directory.path).scheduler


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    made: zmq.Context[Any] = zmq.Context()
    yield made
    made.destroy(linger=0)


def test_the_directory_is_private_and_goes_away() -> None:
    with IpcDirectory() as directory:
        assert stat.S_IMODE(os.stat(directory.path).st_mode) == 0o700
        names = IpcNames.in_directory(directory.path)
        assert names.tokenizer == f"ipc://{directory.path}/tokenizer"
        assert len({names.tokenizer, names.scheduler, names.detokenizer}) == 3
    assert not os.path.exists(directory.path)
    directory.remove()


def test_a_directory_with_too_long_a_path_is_refused(tmp_path: Any) -> None:
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    with pytest.raises(ValueError, match="TMPDIR"):
        IpcDirectory(str(deep))
    assert list(deep.iterdir()) == []


def test_messages_arrive_in_order_and_typed(context: zmq.Context[Any], endpoint: str) -> None:
    sender = Sender[ToScheduler](context, endpoint)
    sender.send(StopStringHit("early"))  # before the other side is there
    receiver = Receiver[ToScheduler](context, endpoint, ToScheduler)
    assert receiver.receive(WAIT_MS) == StopStringHit("early")
    for number in range(5000):
        sender.send(AbortReq(str(number)))
    got = [receiver.receive(WAIT_MS) for _ in range(5000)]
    assert got == [AbortReq(str(number)) for number in range(5000)]
    assert receiver.receive(0) is None
    assert receiver.drain() == []
    sender.close()
    sender.close()
    receiver.close()


def test_drain_takes_everything_that_is_there(context: zmq.Context[Any], endpoint: str) -> None:
    receiver = Receiver[ToScheduler](context, endpoint, ToScheduler)
    sender = Sender[ToScheduler](context, endpoint)
    for number in range(100):
        sender.send(AbortReq(str(number)))
    got = [receiver.receive(WAIT_MS)]
    while len(got) < 100:
        got += receiver.drain()
    assert got == [AbortReq(str(number)) for number in range(100)]
    sender.close()
    receiver.close()


def make_request(ids: np.ndarray[Any, Any]) -> TokenizedGenerateReqInput:
    params = SamplingParams(stop=("x",), logit_bias={7: -1.5}, sampling_seed=-(1 << 62))
    return TokenizedGenerateReqInput("r", ids.data.cast("B"), params, logprob_start_len=3)


@pytest.mark.parametrize("num_ids", [0, 1, 100_000])
def test_token_ids_travel_in_a_frame_of_their_own(
    context: zmq.Context[Any], endpoint: str, num_ids: int
) -> None:
    """What is encoded beside them does not grow with them."""
    ids = np.arange(num_ids, dtype=np.int32)
    inbox = context.socket(zmq.PULL)
    inbox.bind(endpoint)
    sender = Sender[ToScheduler](context, endpoint)
    sender.send(make_request(ids))
    head, bulk = inbox.recv_multipart()
    assert len(head) < 1000
    assert bulk == ids.tobytes()
    sender.close()
    inbox.close(linger=0)


def test_token_ids_are_sent_without_a_copy(context: zmq.Context[Any], endpoint: str) -> None:
    """Sending allocates nothing of their size, and their memory is let go once delivered."""
    ids = np.arange(1_000_000, dtype=np.int32)
    gone = weakref.finalize(ids, lambda: None)
    receiver = Receiver[ToScheduler](context, endpoint, ToScheduler)
    sender = Sender[ToScheduler](context, endpoint)
    tracemalloc.start()
    sender.send(make_request(ids))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < ids.nbytes // 20
    del ids
    assert gone.alive  # ZeroMQ still reads it
    received = receiver.receive(WAIT_MS)
    assert isinstance(received, TokenizedGenerateReqInput)
    sender.close()
    receiver.close()
    context.destroy(linger=0)
    gc.collect()
    assert not gone.alive


def test_token_ids_arrive_without_a_copy(context: zmq.Context[Any], endpoint: str) -> None:
    ids = np.arange(100_000, dtype=np.int32)
    request = make_request(ids)
    receiver = Receiver[ToScheduler](context, endpoint, ToScheduler)
    sender = Sender[ToScheduler](context, endpoint)
    for _ in range(3):
        sender.send(AbortReq("a"))
        sender.send(request)
    assert request.input_ids.nbytes == ids.nbytes  # the sender's own message is left alone
    assert receiver.receive(WAIT_MS) == AbortReq("a")
    got: list[ToScheduler | None] = [receiver.receive(WAIT_MS)]
    while len(got) < 5:
        got += receiver.drain()
    assert [type(message).__name__ for message in got[1::2]] == ["AbortReq"] * 2
    received = got[0]
    del got
    assert isinstance(received, TokenizedGenerateReqInput)
    view = received.input_ids
    assert isinstance(view.obj, zmq.Frame)
    assert received.sampling_params == request.sampling_params
    del received
    gc.collect()
    assert np.array_equal(np.frombuffer(view, dtype=np.int32), ids)
    sender.close()
    receiver.close()


async def test_a_loop_receives_a_frame(context: zmq.Context[Any], endpoint: str) -> None:
    ids = np.arange(50_000, dtype=np.int32)
    receiver = AsyncReceiver[ToScheduler](context, endpoint, ToScheduler)
    sender = Sender[ToScheduler](context, endpoint)
    sender.send(make_request(ids))
    received = await asyncio.wait_for(receiver.receive(), WAIT_MS / 1000)
    assert isinstance(received, TokenizedGenerateReqInput)
    assert np.array_equal(np.frombuffer(received.input_ids, dtype=np.int32), ids)
    sender.close()
    receiver.close()


def test_a_frame_too_many_is_an_error(context: zmq.Context[Any], endpoint: str) -> None:
    receiver = Receiver[ToScheduler](context, endpoint, ToScheduler)
    socket = context.socket(zmq.PUSH)
    socket.connect(endpoint)
    socket.send_multipart([msgspec.msgpack.encode(AbortReq("a")), b"more"])
    with pytest.raises(msgspec.DecodeError, match="AbortReq comes in one frame"):
        receiver.receive(WAIT_MS)
    socket.close(linger=0)
    receiver.close()


def test_what_is_no_message_is_an_error(context: zmq.Context[Any], endpoint: str) -> None:
    receiver = Receiver[ToScheduler](context, endpoint, ToScheduler)
    sender = Sender[Any](context, endpoint)
    sender.send({"type": "martian"})
    with pytest.raises(msgspec.DecodeError):
        receiver.receive(WAIT_MS)
    sender.close()
    receiver.close()


async def test_a_loop_receives_what_came_before_it_looked(
    context: zmq.Context[Any], endpoint: str
) -> None:
    """Bursts with pauses, the first of them before anybody asks: all come, in order."""
    receiver = AsyncReceiver[ToTokenizer](context, endpoint, ToTokenizer)
    sender = Sender[ToTokenizer](context, endpoint)
    count = 0
    async with asyncio.timeout(WAIT_MS / 1000):
        for burst in (300, 1, 2, 500, 1):
            for number in range(burst):
                sender.send(Heartbeat(count + number, True, 0, 0, 0))
            if count % 2:
                await asyncio.sleep(0)
            for _ in range(burst):
                beat = await receiver.receive()
                assert isinstance(beat, Heartbeat)
                assert beat.progress == count
                count += 1
    sender.close()
    receiver.close()
    receiver.close()


async def test_a_loop_hears_of_what_is_no_message(context: zmq.Context[Any], endpoint: str) -> None:
    receiver = AsyncReceiver[ToTokenizer](context, endpoint, ToTokenizer)
    sender = Sender[Any](context, endpoint)
    sender.send({"type": "martian"})
    for _ in range(2):
        with pytest.raises(msgspec.DecodeError):
            await asyncio.wait_for(receiver.receive(), WAIT_MS / 1000)
    sender.close()
    receiver.close()


async def test_a_loop_receives(context: zmq.Context[Any], endpoint: str) -> None:
    receiver = AsyncReceiver[ToTokenizer](context, endpoint, ToTokenizer)
    sender = Sender[ToTokenizer](context, endpoint)
    first = asyncio.create_task(receiver.receive())
    messages: list[ToTokenizer] = [
        Heartbeat(1, True, 2, 3, 4),
        BatchStrOut([]),
        ControlReply(7, True, data={"a": [1, "b"]}),
    ]
    for message in messages:
        sender.send(message)
    async with asyncio.timeout(WAIT_MS / 1000):
        assert [await first, await receiver.receive(), await receiver.receive()] == messages
    sender.close()
    receiver.close()
