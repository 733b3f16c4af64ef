"""A scheduler process without a model, for tests of what surrounds it.

Every request gets the ids 100, 101, ... one message each. How it behaves otherwise is told by
the variable FAKE_SCHEDULER of its environment: "fail" (cannot start), "die" (exits with 7 when it
gets a request, having said why), "hang" (never answers a request), "starting" (never ready).
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import zmq

from sglang.srt.environ import Environ
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenIDOut,
    ControlReply,
    ControlReq,
    FinishReason,
    Heartbeat,
    IpcNames,
    SchedulerReady,
    TokenizedGenerateReqInput,
    TokenOut,
    ToScheduler,
    int32_buffer,
)
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.channel import Receiver, Sender
from sglang.srt.utils.process import set_up_child
from sglang.srt.utils.rendezvous import ALONE, RankPlace

ENTRY = "srt.entrypoints.fake_scheduler:run_fake_scheduler"
CONTEXT_LENGTH = 512


def run_fake_scheduler(
    server_args: ServerArgs,
    environ: Environ,
    ipc: IpcNames,
    ready_pipe: Connection,
    place: RankPlace = ALONE,
    rendezvous: object = None,
) -> None:
    assert isinstance(environ, Environ)
    set_up_child(f"fake-{place.name}", server_args.log_level)
    mode = os.environ.get("FAKE_SCHEDULER", "")
    if mode == "fail":
        ready_pipe.send(("error", "the weights are made of cheese"))
        sys.exit(1)
    if mode == "starting":
        threading.Event().wait()
    context: zmq.Context[Any] = zmq.Context()
    inbox: Receiver[ToScheduler] = Receiver(context, ipc.scheduler, ToScheduler)
    detokenizer: Sender[Any] = Sender(context, ipc.detokenizer)
    tokenizer: Sender[Any] = Sender(context, ipc.tokenizer)
    ready_pipe.send(("ready", SchedulerReady(CONTEXT_LENGTH, 1024, 4096, 16, 511, 64)))
    held: dict[str, int] = {}
    progress = 0
    while True:
        message = inbox.receive(50)
        progress += 1
        tokenizer.send(Heartbeat(progress, bool(held), len(held), 0, CONTEXT_LENGTH, place.dp_rank))
        if isinstance(message, ControlReq):
            state = {"memory": {"capacity_tokens": 4096}, "num_running_reqs": len(held)}
            tokenizer.send(ControlReply(message.seq, True, "Cache flushed.", state))
        elif isinstance(message, TokenizedGenerateReqInput):
            length = len(message.input_ids) // 4
            if mode == "die":
                ready_pipe.send(("error", "the invariant does not hold"))
                sys.exit(7)
            if mode == "hang":
                held[message.rid] = length
            else:
                _answer(detokenizer, message, length)
        elif isinstance(message, AbortReq):
            for rid in [r for r in held if message.abort_all or r == message.rid]:
                finish = FinishReason("abort", message=message.message, status_code=499)
                out = TokenOut(rid, b"", held.pop(rid), 0, finish_reason=finish)
                detokenizer.send(BatchTokenIDOut([out]))


def _answer(detokenizer: Sender[Any], request: TokenizedGenerateReqInput, length: int) -> None:
    count = request.sampling_params.max_new_tokens or 0
    for done in range(1, count + 1):
        finish = FinishReason("length", length=count) if done == count else None
        out = TokenOut(
            request.rid,
            int32_buffer([99 + done]),
            length,
            done,
            finish_reason=finish,
            detok=request.detok if done == 1 else None,
        )
        detokenizer.send(BatchTokenIDOut([out]))
