"""A node of a server that is not its first: its ranks, and no doors.

It waits until it is told to end or until one of its ranks ends, which they do soon after any other
rank of the server. Exit codes are those of a server.
"""

from __future__ import annotations

import logging
import queue
import signal
from types import FrameType

from sglang.srt.entrypoints.processes import ServerProcesses, StartError
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


def serve_node(server_args: ServerArgs, processes: ServerProcesses) -> int:
    """Run this node's ranks until the end; returns the exit code. Call it in the main thread."""
    endings: queue.SimpleQueue[str] = queue.SimpleQueue()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        logger.info("%s: shutting down", signal.Signals(number).name)
        raise _PoliteEnd

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        processes.start()
        processes.wait_ready()
        processes.watch(endings.put)
        logger.info(
            "Node %d of %d is ready; HTTP is served by node 0",
            server_args.node_rank,
            server_args.nnodes,
        )
        logger.error("%s This node ends.", endings.get())
    except StartError as error:
        logger.error("This node cannot start: %s", error)
    except _PoliteEnd:
        return 0
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        processes.stop()
        logger.info("Node %d has ended.", server_args.node_rank)
    return 1


class _PoliteEnd(BaseException):
    """A signal asked this node to end; no handler of errors may take it for one."""
