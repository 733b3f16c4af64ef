"""The scheduler's process: sockets, signs of life, the loop, and what it says when it dies.

Started by the launcher with multiprocessing spawn, once for each rank of each replica; rank 0 of a
replica has its sockets. A failure at start is told on the ready pipe in one line; a broken
invariant or a lost rank later writes the pools' state, says why on the same pipe and ends the
process, which the parent notices.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import zmq

from sglang.srt.distributed.communicator import RankLinks
from sglang.srt.distributed.process_group import connect_ranks
from sglang.srt.environ import Environ
from sglang.srt.errors import BackingError, RankLostError
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
from sglang.srt.managers.scheduler_limits import SchedulerChannel
from sglang.srt.managers.scheduler_ranks import SilentChannel, make_turns
from sglang.srt.managers.scheduler_setup import SchedulerParts, build_scheduler_parts
from sglang.srt.managers.scheduler_start import agree_on_settings
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.channel import Receiver, Sender
from sglang.srt.utils.device import make_runtime
from sglang.srt.utils.process import set_up_child
from sglang.srt.utils.progress import Progress
from sglang.srt.utils.rendezvous import ALONE, RankPlace, Rendezvous

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
    place: RankPlace = ALONE,
    rendezvous: Rendezvous | None = None,
) -> None:
    """Serve until the parent ends this process.

    `place` says which scheduler this is, `rendezvous` is where the others are met, None when there
    are none; `ipc` are the endpoints of its replica. Sends ("ready",
    SchedulerReady) or, then and when it fails later, ("error", one line) on `ready_pipe`, ("lost",
    one line) when it is another rank that failed. Exits with 1 after an error, having logged the
    state of the pools.
    """
    title = place.name if rendezvous is not None else "scheduler TP0"
    set_up_child(f"sglang::{title}", _log_level(server_args.log_level, place.number))
    context: zmq.Context[Any] = zmq.Context()
    progress = Progress()
    channel = SocketChannel(context, ipc) if place.tp_rank == 0 else SilentChannel()
    try:
        links, everyone = None, None
        # First of all: what carries tensors between GPUs takes the one that is current.
        runtime = make_runtime(server_args.device, place.device_index)
        if rendezvous is not None:
            connections = connect_ranks(
                rendezvous,
                place,
                server_args.dist_timeout,
                device=server_args.device,
                shared_memory=not server_args.disable_custom_all_reduce,
            )
            links, everyone = connections.links, connections.everyone
            server_args = agree_on_settings(server_args, everyone)
        parts = build_scheduler_parts(
            server_args, environ, progress, links, everyone=everyone, place=place, runtime=runtime
        )
    except (ValueError, OSError, MemoryError, BackingError, RankLostError) as error:
        _tell(ready_pipe, error, f"{error}")
        _leave(rendezvous)
    scheduler = make_scheduler(parts, channel, progress, links)
    threads = _start_threads(server_args, scheduler, progress)
    if place.tp_rank == 0:
        threads.append(_start_heartbeat(scheduler, context, ipc, progress, place.dp_rank))
    ready_pipe.send(("ready", parts.ready))
    try:
        while True:
            scheduler.turn()
    except Exception as error:
        # The one place where everything is caught: whatever broke, the state has to be seen.
        logger.exception("The scheduler failed")
        logger.error("Requests at that moment: %r", list(scheduler.requests()))
        logger.error("Memory at that moment: %r", parts.memory)
        _tell(ready_pipe, error, f"{type(error).__name__}: {error}")
        for thread in threads:
            thread.close()
        if parts.publisher is not None:
            parts.publisher.close()
        _leave(rendezvous)


def _tell(ready_pipe: Connection, error: Exception, text: str) -> None:
    with contextlib.suppress(OSError):  # the parent may have gone
        ready_pipe.send(("lost" if isinstance(error, RankLostError) else "error", text))


def _log_level(wanted: str, number: int) -> str:
    """Schedulers do the same, so one of them tells; what goes wrong is told by each."""
    return "warning" if number and wanted == "info" else wanted


def _leave(rendezvous: Rendezvous | None) -> NoReturn:
    """Exit with 1; at once where a thread may wait for ranks that will not come."""
    sys.stderr.flush()
    if rendezvous is None:
        sys.exit(1)
    os._exit(1)


def make_scheduler(
    parts: SchedulerParts,
    channel: SchedulerChannel,
    progress: Progress,
    links: RankLinks | None = None,
) -> Scheduler:
    """Join the parts that were set up with their sockets, and with the other ranks."""
    return Scheduler(
        memory=parts.memory,
        worker=parts.worker,
        make_batch=parts.make_batch,
        channel=channel,
        limits=parts.limits,
        progress=progress,
        clock=time.monotonic,
        canary=parts.canary,
        grammars=parts.grammars,
        adapters=parts.adapters,
        turns=make_turns(channel, time.monotonic, None if links is None else links.control),
    )


def _start_threads(
    server_args: ServerArgs, scheduler: Scheduler, progress: Progress
) -> list[HeartbeatThread | WatchdogThread]:
    watchdog = WatchdogThread(
        lambda: (progress.count, scheduler.busy), server_args.watchdog_timeout, time.monotonic
    )
    watchdog.start()
    return [watchdog]


def _start_heartbeat(
    scheduler: Scheduler,
    context: zmq.Context[Any],
    ipc: IpcNames,
    progress: Progress,
    dp_rank: int,
) -> HeartbeatThread:
    sender: Sender[ToTokenizer] = Sender(context, ipc.tokenizer)

    def read() -> Heartbeat:
        return Heartbeat(
            progress=progress.count,
            busy=scheduler.busy,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            context_length=scheduler.context_length,
            dp_rank=dp_rank,
        )

    heartbeat = HeartbeatThread(read, sender.send)
    heartbeat.start()
    return heartbeat
