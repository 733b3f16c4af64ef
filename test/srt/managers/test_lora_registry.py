"""Adapters by name on the text side: who may ask, when one is let go, what fails how."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang.srt.configs.lora_args import LoraRef
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import GenerateRequest
from sglang.srt.managers.io_struct import ControlReply, ControlReq, FinishReason
from sglang.srt.managers.lora_registry import LoraRegistry
from sglang.srt.sampling.sampling_params import SamplingParams
from srt.managers.tokenizer_manager_harness import rig


class Schedulers:
    """What was asked, and what is answered; None: nothing is, until the test is over."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.replies: list[ControlReply | RequestError | None] = []

    async def control(self, op: str, *, timeout_s: float = 30.0, **args: Any) -> ControlReply:
        self.asked.append((op, args["adapter_id"]))
        reply = self.replies.pop(0) if self.replies else ControlReply(1, True)
        if reply is None:
            await asyncio.Event().wait()
        if isinstance(reply, RequestError):
            raise reply
        assert reply is not None
        return reply


def make(schedulers: Schedulers, **changes: Any) -> LoraRegistry:
    args = {
        "serves_lora": True,
        "served_model_name": "base",
        "lora_paths": (LoraRef("a", "/a"),),
        "max_loras_per_batch": 2,
        "max_loaded_loras": None,
        **changes,
    }
    return LoraRegistry(SimpleNamespace(**args), schedulers.control)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_unloading_waits_for_the_last_request_and_refuses_new_ones() -> None:
    schedulers = Schedulers()
    registry = make(schedulers)
    first, second = registry.begin("a"), registry.begin("a")
    assert first is not None
    assert first is second
    unload = asyncio.create_task(registry.unload("a"))
    await settle()
    with pytest.raises(RequestError, match="'a' is not loaded; loaded are: none"):
        registry.begin("a")
    first.ended()
    await settle()
    assert not unload.done()
    assert schedulers.asked == []
    first.ended()
    assert await unload == {"success": True, "error_message": "", "loaded_adapters": {}}
    assert schedulers.asked == [("unload_lora_adapter", 1)]


async def test_a_name_comes_back_under_another_number_even_while_the_old_one_runs() -> None:
    schedulers = Schedulers()
    registry = make(schedulers)
    old = registry.begin("a")
    assert old is not None
    unload = asyncio.create_task(registry.unload("a"))
    await settle()
    assert (await registry.load("a", "/new", False))["success"]
    new = registry.begin("a")
    assert new is not None
    assert (old.number, new.number, new.ref) == (1, 2, LoraRef("a", "/new"))
    old.ended()
    assert (await unload)["loaded_adapters"] == {"a": "/new"}
    assert schedulers.asked == [("load_lora_adapter", 2), ("unload_lora_adapter", 1)]


async def test_a_call_keeps_its_adapter_for_sequences_that_begin_late() -> None:
    registry = make(Schedulers())
    with registry.held(["a", None, "a"]) as numbers:
        assert numbers == {"a": 1}
        unload = asyncio.create_task(registry.unload("a"))
        await settle()
        assert (await registry.load("a", "/new", False))["success"]
        late = registry.begin("a", numbers["a"])
        assert late is not None
        assert late.ref.path == "/a"
    await settle()
    assert not unload.done()
    late.ended()
    assert (await unload)["loaded_adapters"] == {"a": "/new"}
    with pytest.raises(RequestError, match="'a' is not loaded"):
        registry.begin("a", 1)
    with pytest.raises(RequestError, match="'z' is not loaded"), registry.held(["a", "z"]):
        pass
    assert (await registry.unload("a"))["success"], "nothing of the refused call is left"


async def test_who_gives_up_waiting_leaves_it_loaded() -> None:
    registry = make(Schedulers())
    adapter = registry.begin("a")
    assert adapter is not None
    unload = asyncio.create_task(registry.unload("a"))
    await settle()
    unload.cancel()
    await asyncio.gather(unload, return_exceptions=True)
    assert registry.begin("a") is adapter


@pytest.mark.parametrize(
    "reply", [ControlReply(1, False, "1 requests use it."), RequestError("gone", 503)]
)
async def test_what_is_not_unloaded_stays(reply: ControlReply | RequestError) -> None:
    schedulers = Schedulers()
    registry = make(schedulers)
    schedulers.replies = [reply]
    if isinstance(reply, RequestError):
        with pytest.raises(RequestError, match="gone"):
            await registry.unload("a")
    else:
        assert (await registry.unload("a"))["error_message"] == "1 requests use it."
    assert list(registry.loaded) == ["a"]


async def test_what_could_not_be_loaded_is_taken_back_everywhere() -> None:
    """A replica may have it although another has not."""
    schedulers = Schedulers()
    registry = make(schedulers)
    schedulers.replies = [ControlReply(1, False, "bad file")]
    assert (await registry.load("b", "/b", False))["error_message"] == "bad file"
    assert schedulers.asked == [("load_lora_adapter", 2), ("unload_lora_adapter", 2)]
    assert list(registry.loaded) == ["a"]
    assert (await registry.load("b", "/b", False))["success"]
    assert schedulers.asked[-1] == ("load_lora_adapter", 3), "a number is never given twice"


async def test_what_still_leaves_counts_as_loaded() -> None:
    registry = make(Schedulers(), max_loaded_loras=2)
    adapter = registry.begin("a")
    assert adapter is not None
    unload = asyncio.create_task(registry.unload("a"))
    await settle()
    assert (await registry.load("b", "/b", False))["success"]
    answer = await registry.load("c", "/c", False)
    assert answer["error_message"].startswith("No more than 2 LoRA adapters may be loaded")
    adapter.ended()
    await unload
    assert (await registry.load("c", "/c", False))["success"]


def request(name: str, adapter: str | None) -> GenerateRequest:
    params = SamplingParams(max_new_tokens=2)
    ids = np.array([1, 2, 3], np.int32)
    return GenerateRequest(name, None, ids, params, False, lora_path=adapter, extra_key="1:k")


async def test_a_request_carries_the_number_and_frees_the_adapter_at_its_end() -> None:
    async with rig(None) as r:
        r.manager.adapters = make(Schedulers())
        r.manager.adapters._control = r.manager.control

        async def run(name: str, adapter: str | None) -> list[Any]:
            return [delta async for delta in r.manager.generate(request(name, adapter))]

        with pytest.raises(RequestError, match="'z' is not loaded") as error:
            await run("r0", "z")
        assert error.value.http_status == 400
        plain, adapted = (asyncio.create_task(run(*one)) for one in (("r1", None), ("r2", "a")))
        first, second = await r.sent_request(), await r.sent_request()
        assert (first.lora_id, first.prefix_key) == (None, "1:k")
        assert (second.lora_id, second.prefix_key) == (1, "lora1:1:k")
        unload = asyncio.create_task(r.manager.adapters.unload("a"))
        await settle()
        assert not unload.done()
        r.tell(second.rid, "x", [1, 2], FinishReason("length", length=2))
        assert len(await adapted) == 1
        asked = await r.sent()
        assert asked == ControlReq(1, "unload_lora_adapter", {"adapter_id": 1})
        r.reply(ControlReply(1, True))
        assert (await unload)["success"]
        r.tell(first.rid, "x", [1, 2], FinishReason("length", length=2))
        await plain


async def test_a_client_that_leaves_frees_the_adapter() -> None:
    async with rig(None) as r:
        r.manager.adapters = make(Schedulers())
        news = r.manager.generate(request("r1", "a"))
        waiting = asyncio.create_task(anext(news))
        await r.sent_request()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (await r.manager.adapters.unload("a"))["success"]
