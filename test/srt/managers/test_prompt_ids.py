"""Where a prompt's ids go: once to the scheduler, copied once there, never to the detokenizer."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import msgspec
import numpy as np
import pytest

from sglang.srt.errors import RequestError
from sglang.srt.managers import request_validation
from sglang.srt.managers.generate_request import NUM_PREFIX_IDS
from sglang.srt.managers.io_struct import BatchTokenIDOut, DetokOptions, TokenizedGenerateReqInput
from sglang.srt.managers.request_validation import check_ids
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams
from srt.managers.scheduler_harness import Harness, make_memory
from srt.managers.tokenizer_manager_harness import eventually, request, rig


def message_of(ids: np.ndarray[tuple[int], np.dtype[np.int32]]) -> TokenizedGenerateReqInput:
    return TokenizedGenerateReqInput("r", ids.data.cast("B"), SamplingParams(max_new_tokens=3))


def test_a_request_copies_its_prompt_once_and_lets_the_message_go() -> None:
    ids = np.arange(1000, dtype=np.int32)
    gone = weakref.finalize(ids, lambda: None)
    expected = ids.tolist()
    req = Req(message_of(ids), 0, 0)
    del ids
    gc.collect()
    assert not gone.alive
    assert req.tokens.view().tolist() == expected
    arrays = [value for value in vars(req).values() if isinstance(value, np.ndarray)]
    assert arrays == []  # the one copy is in `tokens`


def test_no_turn_keeps_a_message() -> None:
    """A step with a long prompt takes seconds: the received frame is gone before it begins."""
    harness = Harness(make_memory(page_size=4), page_size=4, chunk_tokens=8)
    ids = np.arange(100, dtype=np.int32)
    gone = weakref.finalize(ids, lambda: None)
    alive_in_step: list[bool] = []
    submit = harness.worker.submit

    def watch(*args: object, **kwargs: object) -> object:
        alive_in_step.append(gone.alive)
        return submit(*args, **kwargs)  # type: ignore[arg-type]

    harness.worker.submit = watch  # type: ignore[method-assign, assignment]
    harness.channel.inbox.append(message_of(ids))
    del ids
    harness.run()
    assert len(alive_in_step) > 10
    assert not any(alive_in_step)


@pytest.mark.parametrize("stop", [(), ("x",)])
def test_the_detokenizer_never_gets_the_prompt(stop: tuple[str, ...]) -> None:
    """What it gets of a request is as long for a long prompt as for a short one."""
    sizes = {}
    for length in (64, 4096):
        harness = Harness(make_memory(page_size=4), page_size=4, chunk_tokens=512)
        detok = DetokOptions(stop_strings=stop, prefix_ids=bytes(4 * NUM_PREFIX_IDS))
        harness.send("r", range(1, length + 1), detok=detok)
        harness.run()
        outs = [msgspec.structs.replace(out, prompt_tokens=0) for out in harness.channel.outs]
        sizes[length] = [len(msgspec.msgpack.encode(BatchTokenIDOut([out]))) for out in outs]
    assert len(sizes[64]) > 1
    for short, long in zip(sizes[64], sizes[4096], strict=True):
        assert abs(long - short) <= 8  # numbers of other widths


async def test_the_manager_sends_the_callers_own_memory() -> None:
    async with rig(None) as bench:
        asked = request(ids=np.arange(90))
        ids = asked.input_ids
        sent: list[Any] = []
        bench.manager._senders[0].send = sent.append  # type: ignore[method-assign]
        stream = bench.manager.generate(asked)
        waiting = asyncio.ensure_future(anext(stream))
        await eventually(lambda: sent)
        assert np.shares_memory(np.frombuffer(sent[0].input_ids, np.int32), ids)
        assert len(sent[0].detok.prefix_ids) == 4 * NUM_PREFIX_IDS
        gone = weakref.finalize(ids, lambda: None)
        assert asked.input_ids is None
        del ids
        sent.clear()
        gc.collect()
        assert not gone.alive  # while the request runs, its prompt is the scheduler's alone
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()


@pytest.mark.parametrize(("at", "value"), [(0, -1), (9, 90), (10, 90), (25, -7)])
def test_an_id_outside_the_vocabulary_is_named(
    at: int, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_validation, "_IDS_AT_ONCE", 10)
    ids = np.arange(26, dtype=np.int32)
    ids[at] = value
    with pytest.raises(RequestError, match=rf"input_ids\[{at}\] is {value}, but the vocab"):
        check_ids(ids, 90)
