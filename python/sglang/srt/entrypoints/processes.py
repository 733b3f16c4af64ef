"""The two child processes of a server or an engine: started, waited for, watched, ended.

Children are spawned, never forked, and named by their entry functions, so that this process
imports neither torch nor the scheduler.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import multiprocessing.connection
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from sglang.srt.environ import Environ
from sglang.srt.managers.io_struct import IpcNames, SchedulerReady
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.channel import IpcDirectory
from sglang.srt.utils.process import (
    ChildExit,
    ChildStarter,
    ProcessWatch,
    describe_exit,
    stop_children,
)

logger = logging.getLogger(__name__)

SCHEDULER = "sglang.srt.managers.scheduler_process:run_scheduler_process"
DETOKENIZER = "sglang.srt.managers.detokenizer_manager:run_detokenizer_process"
STOP_GRACE_S = 3.0


class StartError(Exception):
    """The server cannot start; the message is one line for its user."""


def run_entry(entry: str, *args: Any) -> None:
    """Run "module:function" with `args`; the first thing that a child does."""
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)(*args)


class ServerProcesses:
    """The scheduler, the detokenizer and the directory of their sockets.

    `scheduler` and `detokenizer` are "module:function" with the signatures of the real ones.
    Nothing runs before `start`; `stop` may be called in any state and leaves nothing behind.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        environ: Environ,
        *,
        scheduler: str = SCHEDULER,
        detokenizer: str = DETOKENIZER,
    ) -> None:
        self._directory = IpcDirectory()
        self._starter = ChildStarter()
        self._watch: ProcessWatch | None = None
        self._last_error: str | None = None
        spawn = multiprocessing.get_context("spawn")
        self._ready_receiver, self._ready_sender = spawn.Pipe(duplex=False)
        self._children: dict[str, SpawnProcess] = {
            "scheduler": spawn.Process(
                target=run_entry,
                args=(scheduler, server_args, environ, self.ipc, self._ready_sender, 0),
                name="sglang-scheduler",
                daemon=True,
            ),
            "detokenizer": spawn.Process(
                target=run_entry,
                args=(detokenizer, server_args, self.ipc),
                name="sglang-detokenizer",
                daemon=True,
            ),
        }

    @property
    def ipc(self) -> IpcNames:
        """The endpoints that all processes share."""
        return IpcNames.in_directory(self._directory.path)

    @property
    def pids(self) -> dict[str, int | None]:
        """Process ids by name, None before the start."""
        return {name: process.pid for name, process in self._children.items()}

    def start(self) -> None:
        """Start the children; returns at once."""
        for process in self._children.values():
            self._starter.start(process)
        # The child has its own copy; with ours closed, its death ends the pipe.
        self._ready_sender.close()

    def wait_ready(self) -> SchedulerReady:
        """Block until the scheduler is ready. Raises StartError when a child fails or ends."""
        sentinels = {process.sentinel: name for name, process in self._children.items()}
        while True:
            done = multiprocessing.connection.wait([self._ready_receiver, *sentinels])
            if self._ready_receiver in done:
                ready = self._read_pipe()
                if ready is not None:
                    return ready
                if self._last_error is not None:
                    raise StartError(f"The scheduler cannot start: {self._last_error}")
            for sentinel, name in sentinels.items():
                if sentinel in done:
                    process = self._children[name]
                    process.join()
                    raise StartError(str(describe_exit(name, process)))

    def watch(self, on_exit: Callable[[str], None]) -> None:
        """Call `on_exit` once, from a thread, with a sentence when a child ends by itself."""
        self._watch = ProcessWatch(self._children, lambda ended: on_exit(self._describe(ended)))
        self._watch.start()

    def _describe(self, ended: ChildExit) -> str:
        if ended.name == "scheduler":
            self._read_pipe()
        if self._last_error is None:
            return str(ended)
        return f"{ended} Its last error: {self._last_error}"

    def _read_pipe(self) -> SchedulerReady | None:
        """What the scheduler said last: its readiness, or an error that is kept."""
        try:
            while self._ready_receiver.poll():
                kind, content = self._ready_receiver.recv()
                if kind == "ready" and isinstance(content, SchedulerReady):
                    return content
                self._last_error = str(content)
        except (EOFError, OSError):
            return None
        return None

    def stop(self) -> None:
        """End the children and remove the sockets; blocks until both are gone."""
        if self._watch is not None:
            self._watch.stop()
        self._end_children(STOP_GRACE_S)

    def kill(self) -> None:
        """The same without grace."""
        for process in self._children.values():
            if process.pid is not None:
                with contextlib.suppress(ValueError):
                    process.kill()
        self._directory.remove()

    def _end_children(self, grace_s: float) -> None:
        started = {name: p for name, p in self._children.items() if p.pid is not None}
        stop_children(started, grace_s)
        self._starter.close()
        for end in (self._ready_receiver, self._ready_sender):
            _close(end)
        self._directory.remove()


def _close(end: Connection) -> None:
    if not end.closed:
        end.close()
