"""A TokenizerManager with the other processes played by the test, over real sockets."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import zmq

from sglang.srt.configs.priority_args import PriorityArgs
from sglang.srt.environ import Environ
from sglang.srt.managers.generate_request import GenerateDelta, GenerateRequest
from sglang.srt.managers.io_struct import (
    BatchStrOut,
    FinishReason,
    Heartbeat,
    IpcNames,
    SchedulerReady,
    TextOut,
    TokenizedGenerateReqInput,
    ToScheduler,
    ToTokenizer,
    int32_buffer,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.tokenizer.tokenizer import Tokenizer
from sglang.srt.utils.channel import AsyncReceiver, IpcDirectory, Sender

WAIT_S = 30
CONTEXT_LENGTH = 100
VOCAB_SIZE = 2000
READY = SchedulerReady(CONTEXT_LENGTH, CONTEXT_LENGTH, 1000, 8, CONTEXT_LENGTH - 1, 1)
LENGTH = FinishReason("length", length=2)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """The manager under test, and the scheduler's and detokenizer's ends of its sockets."""

    def __init__(
        self,
        manager: TokenizerManager,
        to_scheduler: AsyncReceiver[ToScheduler],
        sender: Sender[ToTokenizer],
        clock: Clock,
    ) -> None:
        self.manager = manager
        self.clock = clock
        self._to_scheduler = to_scheduler
        self._sender = sender

    async def sent(self) -> ToScheduler:
        """The next message that the scheduler gets."""
        async with asyncio.timeout(WAIT_S):
            return await self._to_scheduler.receive()

    async def sent_request(self) -> TokenizedGenerateReqInput:
        message = await self.sent()
        assert isinstance(message, TokenizedGenerateReqInput)
        return message

    def reply(self, message: ToTokenizer) -> None:
        self._sender.send(message)

    def news(
        self, rid: str, text: str = "", ids: Any = (), finish: FinishReason | None = None, **kw: Any
    ) -> TextOut:
        kw = {"prompt_tokens": 3, "completion_tokens": len(ids), **kw}
        return TextOut(rid, text, int32_buffer(ids), finish_reason=finish, **kw)

    def tell(self, rid: str, *args: Any, **kw: Any) -> None:
        self.reply(BatchStrOut([self.news(rid, *args, **kw)]))

    async def heartbeat(self, **fields: Any) -> None:
        """Send a heartbeat and wait until the manager has taken it."""
        values = {"progress": 1, "busy": False, "num_running": 0, "num_waiting": 0}
        beat = Heartbeat(**{**values, "context_length": CONTEXT_LENGTH, **fields})
        self.reply(beat)
        await eventually(lambda: self.manager.pulse.last_heartbeat == beat)


async def eventually(condition: Any) -> None:
    """Let the loop run until `condition()` holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0)


class _Arguments(SimpleNamespace):
    """Some fields of the server arguments, and what follows from them."""

    refuses_priority = PriorityArgs.refuses_priority


def fake_settings() -> tuple[Any, Any]:
    """The server arguments and the model config that a manager reads, and no more."""
    args = _Arguments(
        max_prompt_logprob_tokens=10,
        dp_size=1,
        load_balance_method="round_robin",
        grammar_backend="llguidance",
        abort_on_priority_when_disabled=False,
        enable_priority_scheduling=False,
        allow_auto_truncate=False,
        served_model_name="tiny",
        serves_lora=False,
        lora_paths=(),
        max_loras_per_batch=2,
        max_loaded_loras=None,
    )
    return args, SimpleNamespace(vocab_size=VOCAB_SIZE, eos_token_ids=(7,), vision=None)


@asynccontextmanager
async def rig(tokenizer: Tokenizer | None, *, ready: bool = True) -> AsyncIterator[Rig]:
    """A started manager and the other ends of its sockets."""
    args, config = fake_settings()
    clock = Clock()
    context: zmq.Context[Any] = zmq.Context()
    with IpcDirectory() as directory:
        ipc = IpcNames.in_directory(directory.path)
        manager = TokenizerManager(args, Environ(), config, ipc, tokenizer, clock=clock)
        to_scheduler = AsyncReceiver[ToScheduler](context, ipc.scheduler, ToScheduler)
        sender = Sender[ToTokenizer](context, ipc.tokenizer)
        await manager.start()
        if ready:
            manager.scheduler_ready(READY)
        try:
            yield Rig(manager, to_scheduler, sender, clock)
        finally:
            await manager.stop()
            to_scheduler.close()
            sender.close()
            context.term()


def request(rid: str = "r", *, text: str | None = None, ids: Any = None, **kw: Any) -> Any:
    """A GenerateRequest; sampling parameters and fields of the request by their names."""
    params = {name: kw.pop(name) for name in list(kw) if name in SamplingParams.__struct_fields__}
    params.setdefault("max_new_tokens", 4)
    if text is None and ids is None:
        ids = [1, 2, 3]
    return GenerateRequest(
        rid=rid,
        text=text,
        input_ids=None if ids is None else np.array(ids, dtype=np.int32),
        sampling_params=SamplingParams(**params),
        stream=kw.pop("stream", True),
        **kw,
    )


async def collect(stream: AsyncGenerator[GenerateDelta, None]) -> list[GenerateDelta]:
    async with asyncio.timeout(WAIT_S):
        return [delta async for delta in stream]
