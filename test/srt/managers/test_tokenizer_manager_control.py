"""Health and questions to the scheduler, as the TokenizerManager sees them."""

import asyncio

import pytest

from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import ControlReply, ControlReq
from srt.managers.tokenizer_manager_harness import WAIT_S, rig


async def test_idle_with_heartbeats_is_healthy_and_silence_is_not() -> None:
    async with rig(None) as r:
        await r.heartbeat(progress=5)
        r.clock.now += 19
        assert r.manager.is_healthy()
        r.clock.now += 2
        assert not r.manager.is_healthy()
        assert r.manager.is_healthy(r.clock.now - 2)
        await r.heartbeat(progress=5, num_waiting=0, context_length=99)
        assert r.manager.is_healthy()


async def test_busy_needs_progress() -> None:
    async with rig(None) as r:
        await r.heartbeat(progress=5)
        r.clock.now += 100  # a long idle time does not count against the first work after it
        await r.heartbeat(progress=5, busy=True, num_running=1)
        assert r.manager.is_healthy()
        for running in range(3):
            r.clock.now += 10
            await r.heartbeat(progress=5, busy=True, num_running=running)
        assert not r.manager.is_healthy()
        await r.heartbeat(progress=6, busy=True)
        assert r.manager.is_healthy()


# ---- control


async def test_replies_find_their_questions() -> None:
    async with rig(None) as r:
        first = asyncio.create_task(r.manager.control("internal_state"))
        asked_first = await r.sent()
        second = asyncio.create_task(r.manager.control("audit", depth=2))
        asked_second = await r.sent()
        assert asked_first == ControlReq(1, "internal_state")
        assert asked_second == ControlReq(2, "audit", {"depth": 2})
        r.reply(ControlReply(77, False))
        r.reply(ControlReply(2, True, "two"))
        r.reply(ControlReply(1, True, "one", {"memory": {"x": 1}}))
        assert (await first).data == {"memory": {"x": 1}}
        assert (await second).message == "two"


async def test_requests_are_listed_under_their_users_ids() -> None:
    async with rig(None) as r:
        asked = asyncio.create_task(r.manager.control("internal_state"))
        assert isinstance(await r.sent(), ControlReq)
        listed = [{"rid": "a#1"}, {"rid": "with#hash#22"}]
        r.reply(ControlReply(1, True, data={"requests": listed}))
        assert (await asked).data["requests"] == [{"rid": "a"}, {"rid": "with#hash"}]


async def test_a_question_that_is_not_answered_times_out() -> None:
    async with rig(None) as r:
        with pytest.raises(RequestError, match="did not answer 'audit'") as error:
            await r.manager.control("audit", timeout_s=0.0)
        assert error.value.http_status == 503
        r.reply(ControlReply(1, True))
        await r.heartbeat()  # the late reply is nobody's


async def test_flush_waits_for_the_running_requests() -> None:
    async with rig(None) as r:
        task = asyncio.create_task(r.manager.flush_cache())
        await r.sent()
        r.reply(ControlReply(1, False, "busy"))
        assert not (await task).success
        task = asyncio.create_task(r.manager.flush_cache(timeout_s=WAIT_S))
        await r.sent()
        r.reply(ControlReply(2, False, "busy"))
        await r.heartbeat(busy=True)
        assert not task.done()
        await r.heartbeat(busy=False)
        assert await r.sent() == ControlReq(3, "flush_cache")
        r.reply(ControlReply(3, True))
        assert (await task).success


async def test_a_context_that_a_reply_names_counts_at_once() -> None:
    async with rig(None) as r:
        await r.heartbeat(progress=5, context_length=99)
        task = asyncio.create_task(r.manager.control("set_kv_budget", budget_bytes=5))
        assert await r.sent() == ControlReq(1, "set_kv_budget", {"budget_bytes": 5})
        r.reply(ControlReply(1, True, data={"context_length": 41}))
        await task
        assert r.manager.context_length == 41
        await r.heartbeat(progress=6, context_length=42)
        assert r.manager.context_length == 42
