"""The child processes of a server or an engine: started, waited for, watched, ended.

A scheduler for each tensor-parallel rank of each replica, as far as they belong to this node, and
on the first node the detokenizer. The first that ends by itself ends all; what it said last is
told with its name.

Children are spawned, never forked, and named by their entry functions, so that this process
imports neither torch nor the scheduler.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import multiprocessing.connection
from collections.abc import Callable, Sequence
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
from sglang.srt.utils.rendezvous import NodeMeeting, RankPlace, Rendezvous

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
    """This node's schedulers, the detokenizer and the directory of their sockets.

    `meeting` is where several nodes meet; None: there is one. `scheduler` and `detokenizer` are
    "module:function" with the signatures of the real ones. Nothing runs before `start`; `stop` may
    be called in any state and leaves nothing behind. Raises OSError when node 0 can't listen.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        environ: Environ,
        meeting: NodeMeeting | None = None,
        *,
        scheduler: str = SCHEDULER,
        detokenizer: str = DETOKENIZER,
    ) -> None:
        self._directory = IpcDirectory()
        self._starter = ChildStarter()
        self._watch: ProcessWatch | None = None
        spawn = multiprocessing.get_context("spawn")
        self._children: dict[str, SpawnProcess] = {}
        self._ranks: dict[str, _RankPipe] = {}
        places = places_here(server_args, 1 if meeting is None else meeting.processes_here)
        try:
            self._meetings = _meetings(places, meeting, self._directory.path)
        except OSError:
            self._directory.remove()
            raise
        for place, where in zip(places, self._meetings or (None,), strict=True):
            pipe = self._ranks[place.name] = _RankPipe(*spawn.Pipe(duplex=False))
            ipc = self.ipc.of_replica(place.dp_rank)
            self._children[place.name] = spawn.Process(
                target=run_entry,
                args=(scheduler, server_args, environ, ipc, pipe.sender, place, where),
                name=f"sglang-scheduler-{place.number}",
                daemon=True,
            )
        if server_args.node_rank > 0:
            return
        self._children["detokenizer"] = spawn.Process(
            target=run_entry,
            args=(detokenizer, server_args, self.ipc),
            name="sglang-detokenizer",
            daemon=True,
        )

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
        # The children have their own copies; with ours closed, a death ends its pipe.
        for pipe in self._ranks.values():
            pipe.sender.close()
        _close_listeners(self._meetings)

    def wait_ready(self) -> SchedulerReady:
        """Block until every rank is ready; returns what the first one said.

        Raises StartError when a child fails or ends.
        """
        sentinels = {process.sentinel: name for name, process in self._children.items()}
        while True:
            missing = [pipe for pipe in self._ranks.values() if pipe.ready is None]
            if not missing:
                return next(pipe.ready for pipe in self._ranks.values() if pipe.ready is not None)
            open_ends = [pipe.receiver for pipe in missing if not pipe.ended]
            done = multiprocessing.connection.wait([*open_ends, *sentinels])
            self._read_pipes()
            for name, error in self._errors():
                raise StartError(f"The {name} cannot start: {error}")
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
        """How a child ended and what the ranks said last, its own words first."""
        self._read_pipes()
        errors = dict(self._errors())
        own = errors.pop(ended.name, None)
        words = [str(ended)]
        if own is not None:
            words.append(f"Its last error: {own}")
        words += [f"The last error of {name}: {error}" for name, error in errors.items()]
        return " ".join(words)

    def _read_pipes(self) -> None:
        for pipe in self._ranks.values():
            pipe.read()

    def _errors(self) -> list[tuple[str, str]]:
        """(name, error) of the ranks that said one; who only missed another rank comes last."""
        said = [(name, pipe) for name, pipe in self._ranks.items() if pipe.error is not None]
        said.sort(key=lambda pair: pair[1].missed_another)
        return [(name, str(pipe.error)) for name, pipe in said]

    def stop(self) -> None:
        """End the children and remove the sockets; blocks until all are gone."""
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
        for pipe in self._ranks.values():
            pipe.close()
        _close_listeners(self._meetings)
        self._directory.remove()


def places_here(server_args: ServerArgs, processes_here: int = 1) -> tuple[RankPlace, ...]:
    """The schedulers that this node starts, of its `processes_here` launchers one."""
    count = server_args.ranks_per_node
    first = count * server_args.node_rank
    return tuple(
        RankPlace(
            tp_rank=number % server_args.num_ranks,
            tp_size=server_args.num_ranks,
            dp_rank=number // server_args.num_ranks,
            dp_size=server_args.dp_size,
            num_here=count * processes_here,
        )
        for number in range(first, first + count)
    )


def _meetings(
    places: Sequence[RankPlace], meeting: NodeMeeting | None, directory: str
) -> tuple[Rendezvous, ...]:
    """Where each scheduler meets the others; none when there is only one."""
    if meeting is not None:
        return Rendezvous.across_nodes(meeting, len(places))
    return Rendezvous.for_ranks(len(places), directory) if len(places) > 1 else ()


class _RankPipe:
    """What one rank's scheduler has told on its pipe so far."""

    def __init__(self, receiver: Connection, sender: Connection) -> None:
        self.receiver = receiver
        self.sender = sender
        self.ready: SchedulerReady | None = None
        self.error: str | None = None
        self.missed_another = False  # the error is that another rank was lost
        self.ended = False

    def read(self) -> None:
        """Take what has come; never blocks."""
        try:
            while not self.ended and self.receiver.poll():
                kind, content = self.receiver.recv()
                if kind == "ready" and isinstance(content, SchedulerReady):
                    self.ready = content
                else:
                    self.error, self.missed_another = str(content), kind == "lost"
        except (EOFError, OSError):
            self.ended = True

    def close(self) -> None:
        """Close both ends; a second call does nothing."""
        for end in (self.receiver, self.sender):
            if not end.closed:
                end.close()


def _close_listeners(meetings: Sequence[Rendezvous]) -> None:
    for meeting in meetings:
        if meeting.listener is not None:
            meeting.listener.close()
