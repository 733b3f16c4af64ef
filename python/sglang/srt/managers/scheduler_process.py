"""The scheduler's process: sockets, signs of life, the loop, and what it says when it dies.

Started by the launcher with multiprocessing spawn. A failure at start is told on the ready pipe
in one line; a broken invariant later writes the pools' state and ends the process, which the
parent notices.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import zmq

from sglang.srt.environ import Environ
from sglang.srt.errors import BackingError
from sglang.srt.managers.io_struct import (
    BatchProgressOut,
    BatchTokenIDOut,
    ControlReply,
    Heartbeat,
    IpcNames,
    ToDetokenizer,
    ToScheduler,
    ToTokenizer,
)
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_health import HeartbeatThread, WatchdogThread
from sglang.srt.managers.scheduler_setup import SchedulerParts, build_scheduler_parts
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.channel import Receiver, Sender
from sglang.srt.utils.process import set_up_child
from sglang.srt.utils.progress import Progress

logger = logging.getLogger(__name__)


class SocketChannel:
    """The scheduler's sockets; used by the scheduler's thread only."""

    def __init__(self, context: zmq.Context[Any], ipc: IpcNames) -> None:
        self._inbox: Receiver[ToScheduler] = Receiver(context, ipc.scheduler, ToScheduler)
        self._detokenizer: Sender[ToDetokenizer] = Sender(context, ipc.detokenizer)
        self._tokenizer: Sender[ToTokenizer] = Sender(context, ipc.tokenizer)

    def receive(self, timeout_ms: int) -> Sequence[ToScheduler]:
        """All messages waiting; blocks up to `timeout_ms` for the first."""
        if timeout_ms:
            first = self._inbox.receive(timeout_ms)
            if first is None:
                return ()
            return [first, *self._inbox.drain()]
        return self._inbox.drain()

    def send_outputs(self, outputs: BatchTokenIDOut) -> None:
        self._detokenizer.send(outputs)

    def send_reply(self, reply: ControlReply) -> None:
        self._tokenizer.send(reply)

    def send_progress(self, progress: BatchProgressOut) -> None:
        self._tokenizer.send(progress)

    def close(self) -> None:
        for socket in (self._inbox, self._detokenizer, self._tokenizer):
            socket.close()


def run_scheduler_process(
    server_args: ServerArgs,
    environ: Environ,
    ipc: IpcNames,
    ready_pipe: Connection,
    tp_rank: int = 0,
) -> None:
    """Serve until the parent ends this process.

    Sends ("ready", SchedulerReady) or ("error", one line) on `ready_pipe`. Exits with 1 after an
    error, having logged the state of the pools.
    """
    set_up_child(f"sglang::scheduler TP{tp_rank}", server_args.log_level)
    context: zmq.Context[Any] = zmq.Context()
    progress = Progress()
    channel = SocketChannel(context, ipc)
    try:
        parts = build_scheduler_parts(server_args, environ, progress)
    except (ValueError, OSError, MemoryError, BackingError) as error:
        ready_pipe.send(("error", f"{error}"))
        ready_pipe.close()
        sys.exit(1)
    scheduler = make_scheduler(parts, channel, progress)
    threads = _start_threads(server_args, scheduler, context, ipc, progress)
    ready_pipe.send(("ready", parts.ready))
    ready_pipe.close()
    try:
        while True:
            scheduler.turn()
    except Exception:
        # The one place where everything is caught: whatever broke, the state has to be seen.
        logger.exception("The scheduler failed")
        logger.error("Requests at that moment: %r", list(scheduler.requests()))
        logger.error("Memory at that moment: %r", parts.memory)
        for thread in threads:
            thread.close()
        if parts.publisher is not None:
            parts.publisher.close()
        sys.stderr.flush()
        sys.exit(1)


def make_scheduler(parts: SchedulerParts, channel: SocketChannel, progress: Progress) -> Scheduler:
    """Join the parts that were set up with their sockets."""
    return Scheduler(
        memory=parts.memory,
        worker=parts.worker,
        make_batch=parts.make_batch,
        channel=channel,
        limits=parts.limits,
        progress=progress,
        clock=time.monotonic,
        canary=parts.canary,
    )


def _start_threads(
    server_args: ServerArgs,
    scheduler: Scheduler,
    context: zmq.Context[Any],
    ipc: IpcNames,
    progress: Progress,
) -> tuple[HeartbeatThread, WatchdogThread]:
    sender: Sender[ToTokenizer] = Sender(context, ipc.tokenizer)

    def read() -> Heartbeat:
        return Heartbeat(
            progress=progress.count,
            busy=scheduler.busy,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            context_length=scheduler.context_length,
        )

    heartbeat = HeartbeatThread(read, sender.send)
    watchdog = WatchdogThread(
        lambda: (progress.count, scheduler.busy), server_args.watchdog_timeout, time.monotonic
    )
    heartbeat.start()
    watchdog.start()
    return heartbeat, watchdog
