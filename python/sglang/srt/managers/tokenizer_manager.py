"""The text side's desk: takes requests from the doors, hands back a stream of news for each.

It runs on the HTTP process's event loop: tokenises in threads, refuses what cannot be served,
sends the rest to the scheduler and sorts the detokenizer's news by request. The doors (HTTP and
Engine) are its only callers. It never touches memory, models or sockets of clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.environ import Environ
from sglang.srt.errors import RequestError
from sglang.srt.managers import request_validation as validation
from sglang.srt.managers.constraint_desk import ConstraintDesk
from sglang.srt.managers.control_replies import merged_reply
from sglang.srt.managers.generate_request import GenerateDelta, GenerateRequest, IdArray
from sglang.srt.managers.image_desk import ImageDesk
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchProgressOut,
    BatchStrOut,
    ControlReply,
    ControlReq,
    Heartbeat,
    IpcNames,
    SchedulerReady,
    TokenizedGenerateReqInput,
    ToScheduler,
    ToTokenizer,
    int32_buffer,
)
from sglang.srt.managers.lora_registry import LoraRegistry
from sglang.srt.managers.replica_choice import ReplicaChoice
from sglang.srt.managers.request_state import RequestState
from sglang.srt.managers.scheduler_pulse import SchedulerPulse
from sglang.srt.multimodal.image_source import FetchRules
from sglang.srt.server_args import ServerArgs
from sglang.srt.tokenizer.tokenizer import Tokenizer
from sglang.srt.utils.channel import AsyncReceiver, Sender

logger = logging.getLogger(__name__)
T = TypeVar("T")

LONG_TEXT_CHARS = 1 << 15
"""Longer texts are tokenised by threads of their own, so that short ones never wait for them."""


def wire_rid(rid: str, number: int) -> str:
    """The id between the processes: late news of a reused `rid` never reach its successor."""
    return f"{rid}#{number}"


def user_rid(wire: str) -> str:
    """The user's own id again."""
    return wire.rpartition("#")[0]


class TokenizerManager:
    """The doors' way to the scheduler; every method runs on the loop that called `start`.

    `tokenizer` is None under --skip-tokenizer-init. `clock` gives monotonic seconds.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        environ: Environ,
        model_config: ModelConfig,
        ipc: IpcNames,
        tokenizer: Tokenizer | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.server_args = server_args
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.num_replicas: int = server_args.dp_size
        self.pulse = SchedulerPulse(environ.health_check_timeout_s, clock, self.num_replicas)
        self._choice = ReplicaChoice(server_args.load_balance_method, self.num_replicas)
        self._ipc = ipc
        self._clock = clock
        self._end_ids = tuple(
            sorted({*model_config.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())})
        )
        self.adapters = LoraRegistry(server_args, self.control)
        rules = FetchRules(allow_private=environ.allow_private_image_urls)
        self.images = ImageDesk(model_config.vision, tokenizer, rules)
        self._constraints = ConstraintDesk(tokenizer, self._end_ids, server_args.grammar_backend)
        self._short_texts = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        self._long_texts = ThreadPoolExecutor(2, thread_name_prefix="tokenize-long")
        self._states: dict[str, RequestState] = {}  # by wire rid
        self._rids: set[str] = set()
        self._num_seen = 0
        self._control_seq = 0
        self._control_replies: dict[int, tuple[int, asyncio.Future[ControlReply]]] = {}

    # ---- life

    async def start(self) -> None:
        """Bind the socket, connect to the scheduler and begin to receive."""
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._receiver = AsyncReceiver[ToTokenizer](self._context, self._ipc.tokenizer, ToTokenizer)
        self._senders = [
            Sender[ToScheduler](self._context, self._ipc.of_replica(replica).scheduler)
            for replica in range(self.num_replicas)
        ]
        self._receive_task = asyncio.create_task(self._receive())

    async def stop(self) -> None:
        """Fail what still waits with 503, close the sockets and end the threads."""
        self._fail_all("The server is shutting down.")
        self._receive_task.cancel()
        await asyncio.gather(self._receive_task, return_exceptions=True)
        self._receiver.close()
        for sender in self._senders:
            sender.close()
        self._context.term()
        self._short_texts.shutdown(wait=False, cancel_futures=True)
        self._long_texts.shutdown(wait=False, cancel_futures=True)
        self.images.close()

    def scheduler_ready(self, ready: SchedulerReady) -> None:
        """Accept requests from now on; before, they are refused with 503."""
        self.pulse.scheduler_ready(ready)

    def server_died(self, reason: str) -> None:
        """A process died: every waiting and every later request gets 503 with `reason`.

        Safe to call from any thread.
        """
        with contextlib.suppress(RuntimeError):  # the loop has ended, and everyone with it
            self._loop.call_soon_threadsafe(self._fail_all, reason)

    async def wait_failed(self) -> str:
        """Wait until the server can serve no more (a process died, `stop`); gives the reason."""
        return await self.pulse.wait_failed()

    # ---- state

    @property
    def context_length(self) -> int:
        """The effective context length in tokens at this moment; 0 before the scheduler's ready."""
        return self.pulse.context_length

    @property
    def constraint_refusal(self) -> str | None:
        """Why no text can be held to a grammar, for clients; None: it can."""
        return self._constraints.refusal

    @property
    def num_requests(self) -> int:
        """Requests that are being prepared, waiting or running."""
        return len(self._states)

    def is_healthy(self, now: float | None = None) -> bool:
        """Whether the scheduler is ready, alive, and idle or making progress."""
        return self.pulse.is_healthy(now)

    # ---- text

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> IdArray:
        """Token ids of `text`, int32 [n], computed off the event loop.

        A long text is a thread's work piece by piece, so long texts take turns, and one whose
        client has left ends with its piece.
        """
        pieces = self._need_tokenizer().encode_pieces(text, add_special_tokens=add_special_tokens)
        found = bytearray()  # grows in place, and is the result's memory

        def read_piece() -> bool:
            ids = next(pieces, None)
            if ids is not None:
                found.extend(ids.data.cast("B"))
            return ids is not None

        while await self._in_thread(len(text), read_piece):
            pass
        return np.frombuffer(found, dtype=np.int32)

    async def detokenize(
        self, token_ids: npt.NDArray[np.int32], skip_special_tokens: bool = True
    ) -> str:
        """The text of `token_ids`, computed off the event loop."""
        tokenizer = self._need_tokenizer()
        return await self._in_thread(
            4 * len(token_ids),
            lambda: tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens),
        )

    async def render_chat(
        self, messages: Sequence[Mapping[str, Any]], **template_kwargs: Any
    ) -> str:
        """`Tokenizer.apply_chat_template`, off the event loop."""
        tokenizer = self._need_tokenizer()
        return await self._in_thread(
            0, lambda: tokenizer.apply_chat_template(messages, **template_kwargs)
        )

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("The server has no tokenizer (--skip-tokenizer-init).")
        return self.tokenizer

    async def _in_thread(self, num_chars: int, work: Callable[[], T]) -> T:
        pool = self._long_texts if num_chars > LONG_TEXT_CHARS else self._short_texts
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    # ---- requests

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateDelta, None]:
        """News of one sequence; the last one, and only it, has a finish reason.

        Raises RequestError before anything is sent when the request cannot be served, and later
        (503) when the server dies. Closing or cancelling the iterator early aborts the request
        in the scheduler. News that the consumer is too slow for are merged. Once the scheduler
        has the prompt, `request` has it no more.
        """
        state = self._register(request)
        try:
            message = await self._prepare(request, state)
            if state.abort_message is not None:
                yield state.aborted_delta(message.input_ids.nbytes // 4)
                return
            self._check_alive()
            self._send_request(message, request, state)
            del message  # its ids are ZeroMQ's now
            request.forget_prompt()
            while True:
                delta = await state.next_delta()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._forget(state)

    def _register(self, request: GenerateRequest) -> RequestState:
        self._check_alive()
        is_held = request.sampling_params.held_to is not None
        validation.check_fields(
            request,
            vocab_size=self.model_config.vocab_size,
            has_tokenizer=self.tokenizer is not None,
            no_constraints=self.constraint_refusal if is_held else None,
            num_replicas=self.num_replicas,
            refuses_priority=self.server_args.refuses_priority,
        )
        if request.rid in self._rids:
            raise RequestError(f"A request with the id {request.rid!r} is already being served.")
        adapter = self.adapters.begin(request.lora_path, request.lora_number)
        self._num_seen += 1
        state = RequestState(request.rid, wire_rid(request.rid, self._num_seen), adapter)
        self._rids.add(state.rid)
        self._states[state.wire_rid] = state
        return state

    def _send_request(
        self, message: TokenizedGenerateReqInput, request: GenerateRequest, state: RequestState
    ) -> None:
        """Give the request to the replica that it wants, else to one that is chosen for it."""
        replica = request.routed_dp_rank
        if replica is None:
            ids = np.frombuffer(message.input_ids, dtype=np.int32)
            replica = self._choice.choose(ids, message.prefix_key)
        else:
            self._choice.began(replica)
        state.replica = replica
        state.shown_dp_rank = replica if self.num_replicas > 1 else None
        if message.sampling_params.held_to is not None:
            news = self._constraints.news_for(replica)
            if news is not None:
                self._senders[replica].send(news)
        self._senders[replica].send(message)

    def _forget(self, state: RequestState) -> None:
        self._rids.discard(state.rid)
        self._states.pop(state.wire_rid, None)
        if state.adapter is not None:
            state.adapter.ended()
        self.images.release(state.image_bytes)
        if state.replica is None:
            return
        self._choice.ended(state.replica)
        if not state.finished:
            gone = AbortReq(state.wire_rid, message="The client went away.")
            self._senders[state.replica].send(gone)

    def _check_alive(self) -> None:
        if self.pulse.failure is not None:
            raise RequestError(self.pulse.failure, 503)
        if self.pulse.ready is None:
            raise RequestError("The server is starting.", 503)

    async def _prepare(
        self, request: GenerateRequest, state: RequestState
    ) -> TokenizedGenerateReqInput:
        """Tokenise and check against the vocabulary and the effective context."""
        if request.input_ids is not None:
            input_ids = request.input_ids
        else:
            assert request.text is not None  # check_fields
            input_ids = await self.tokenize(request.text, request.add_special_tokens)
        input_ids = np.ascontiguousarray(input_ids, dtype="<i4")
        await self._check_ids(input_ids)
        placed = await self.images.place(input_ids, request.images)
        input_ids, keys, state.image_bytes = placed.ids, placed.keys, placed.num_bytes
        if request.sampling_params.held_to is not None:
            await self._in_thread(0, self._constraints.read_vocabulary)
        params = request.sampling_params
        if self.server_args.allow_auto_truncate and not request.images:
            input_ids, params = validation.truncate(input_ids, params, self.context_length)
            keys = input_ids
        params = validation.fit_to_context(len(input_ids), params, self.context_length)
        params = msgspec.structs.replace(
            params, stop_token_ids=validation.merged_stop_ids(params, self._end_ids)
        )
        start = validation.prompt_logprob_start(
            request, len(input_ids), self.server_args.max_prompt_logprob_tokens
        )
        wants = request.return_logprob
        return TokenizedGenerateReqInput(
            rid=state.wire_rid,
            input_ids=keys.data.cast("B"),
            sampling_params=params,
            stream=request.stream,
            return_logprob=wants,
            logprob_start_len=start,
            top_logprobs_num=request.top_logprobs_num if wants else 0,
            token_ids_logprob=int32_buffer(request.token_ids_logprob) if wants else b"",
            extra_key=request.extra_key,
            lora_id=None if state.adapter is None else state.adapter.number,
            priority=request.priority,
            include_progress=request.include_progress,
            pooling=request.pooling,
            images=placed.inputs,
            detok=request.detok_options(input_ids),
        )

    async def _check_ids(self, input_ids: IdArray) -> None:
        """Refuse ids that the model has no embedding for; many are looked at in a thread."""
        vocab_size = self.model_config.vocab_size
        if len(input_ids) <= LONG_TEXT_CHARS:
            validation.check_ids(input_ids, vocab_size)
            return
        await self._in_thread(len(input_ids), lambda: validation.check_ids(input_ids, vocab_size))

    async def abort(self, rid: str = "", abort_all: bool = False) -> None:
        """End the requests whose id starts with `rid` (as SGLang does), or all of them.

        Their streams end with an abort as finish reason. An unknown id is no error; an empty one
        matches nothing. Does nothing once the server has failed.
        """
        if self.pulse.failure is not None:
            return
        message = "Request aborted by the client"
        for state in self._states.values():
            if state.finished or not (abort_all or (rid and state.rid.startswith(rid))):
                continue
            if state.replica is None:
                state.abort_message = message
            elif not abort_all:
                self._senders[state.replica].send(AbortReq(state.wire_rid, message=message))
        for sender in self._senders if abort_all else ():
            sender.send(AbortReq(abort_all=True, message=message))

    # ---- control

    async def control(self, op: str, *, timeout_s: float = 30.0, **args: Any) -> ControlReply:
        """Ask the scheduler something (see `ControlReq`), or each of several replicas.

        The reply is the first refusal, else the first replica's; with several replicas its `data`
        has what each of them said as `replicas`. Raises RequestError (503) when one does not
        answer within `timeout_s` seconds or dies.
        """
        self._check_alive()
        first = self._control_seq + 1
        self._control_seq += self.num_replicas
        replies: list[asyncio.Future[ControlReply]] = []
        for replica, sender in enumerate(self._senders):
            replies.append(asyncio.get_running_loop().create_future())
            self._control_replies[first + replica] = (replica, replies[-1])
            sender.send(ControlReq(first + replica, op, args))
        try:
            async with asyncio.timeout(timeout_s):
                answers = [await reply for reply in replies]
        except TimeoutError:
            raise RequestError(
                f"The scheduler did not answer {op!r} within {timeout_s:g} s.", 503
            ) from None
        finally:
            for replica, reply in enumerate(replies):
                del self._control_replies[first + replica]
                if reply.done() and not reply.cancelled():
                    reply.exception()  # seen: the server's death fails all of them
        for answer in answers:
            for request in answer.data.get("requests", ()):
                request["rid"] = user_rid(request["rid"])
        return merged_reply(answers)

    async def flush_cache(self, timeout_s: float = 0.0) -> ControlReply:
        """Empty the prefix cache, waiting at most `timeout_s` for running requests to end.

        The reply's `success` is False when requests are still running or queued.
        """
        deadline = self._clock() + timeout_s
        while True:
            reply = await self.control("flush_cache")
            left = deadline - self._clock()
            if reply.success or left <= 0:
                return reply
            await self.pulse.wait_until_idle(left)

    # ---- receiving

    async def _receive(self) -> None:
        try:
            while True:
                self._dispatch(await self._receiver.receive())
        except Exception as error:
            logger.exception("The TokenizerManager cannot go on")
            self._fail_all(f"The TokenizerManager failed: {error}")

    def _dispatch(self, message: ToTokenizer) -> None:
        if isinstance(message, BatchStrOut):
            for out in message.outs:
                state = self._states.get(out.rid)
                if state is not None:
                    state.put(out)
        elif isinstance(message, BatchProgressOut):
            for news in message.news:
                state = self._states.get(news.rid)
                if state is not None:
                    state.put_progress(news)
        elif isinstance(message, Heartbeat):
            self.pulse.beat(message)
        else:
            replica, reply = self._control_replies.get(message.seq, (None, None))
            if replica is None or reply is None:
                return
            if "context_length" in message.data:  # at once, not with the next heartbeat
                self.pulse.note_context_length(message.data["context_length"], replica)
            if not reply.done():
                reply.set_result(message)

    def _fail_all(self, reason: str) -> None:
        self.pulse.scheduler_failed(reason)
        for state in self._states.values():
            if not state.finished:
                state.fail(RequestError(reason, 503))
        for _, reply in self._control_replies.values():
            if not reply.done():
                reply.set_exception(RequestError(reason, 503))
