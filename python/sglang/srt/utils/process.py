"""Processes that belong together: children die with their parent, and a death is noticed.

The launcher starts children with a `ChildStarter`, watches them with `ProcessWatch` and ends
them with `stop_children`; a child calls `set_up_child` first of all. Nothing here knows what the
processes do.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import psutil

_PR_SET_PDEATHSIG = 1


def set_up_child(title: str, log_level: str = "info") -> None:
    """Make this process a well-behaved child; call it before anything else in its main thread.

    It dies when its parent does, leaves Ctrl-C to the parent (the terminal sends SIGINT to the
    whole group), ends at once on SIGTERM, shows `title` in process lists where the setproctitle
    package is installed, writes a traceback on a fatal signal and logs to stderr.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()
    set_process_title(title)
    faulthandler.enable()
    configure_logging(log_level, title)


def configure_logging(log_level: str, name: str) -> None:
    """Send this process's log records at and above `log_level` to stderr, marked with `name`."""
    logging.basicConfig(
        level=log_level.upper(),
        format=f"[%(asctime)s {name}] %(levelname)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        stream=sys.stderr,
        force=True,
    )


def set_process_title(title: str) -> None:
    """Name this process for `ps`; does nothing where setproctitle is not installed."""
    try:
        import setproctitle
    except ImportError:
        return
    setproctitle.setproctitle(title)


def die_with_parent() -> None:
    """Arrange that this process, spawned by multiprocessing, ends when its parent has ended.

    On Linux the kernel kills it, however busy it is; everywhere a thread also waits on
    multiprocessing's parent sentinel. Does nothing in a process that multiprocessing did not
    start.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")

    def wait_for_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    # The sentinel also covers a parent that ended before prctl was called.
    threading.Thread(target=wait_for_parent, name="parent-watch", daemon=True).start()


class ChildStarter:
    """Starts children from a thread that lives as long as they shall live.

    Linux sends the parent-death signal when the *thread* that spawned the child ends, so a child
    started from a short-lived worker thread would be killed under a healthy parent. Keep the
    starter until the children have ended; `close` ends its thread and with it those left.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="child-starter")

    def start(self, process: BaseProcess) -> None:
        """Start `process`; raises what `process.start` raises."""
        if threading.current_thread() is threading.main_thread():
            process.start()
        else:
            self._executor.submit(process.start).result()

    def close(self) -> None:
        """End the starting thread; call it after the children have ended."""
        self._executor.shutdown()


def stop_children(children: Mapping[str, BaseProcess], grace_s: float = 5.0) -> None:
    """End `children`: SIGTERM, then SIGKILL for those left after `grace_s`; returns when gone.

    Stop a `ProcessWatch` on them first, or it will report them.
    """
    alive = [process for process in children.values() if process.is_alive()]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + grace_s
    for process in alive:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in alive:
        if process.is_alive():
            process.kill()
            process.join()


def kill_process_tree(pid: int, grace_s: float = 5.0, *, include_self: bool = True) -> None:
    """End `pid` and all its descendants: SIGTERM, then SIGKILL for those left after `grace_s`.

    Returns when they are gone. `include_self` False spares `pid` itself. An unknown pid is fine.
    It collects the exit codes of our own children, so `stop_children` comes first for those.
    """
    try:
        root = psutil.Process(pid)
        victims = root.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    if include_self:
        victims.append(root)
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.terminate()
    _, alive = psutil.wait_procs(victims, timeout=grace_s)
    for victim in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    psutil.wait_procs(alive, timeout=grace_s)


@dataclass(frozen=True)
class ChildExit:
    """How a child ended: by itself with `exit_code`, or by the signal named `signal_name`."""

    name: str
    pid: int
    exit_code: int | None
    signal_name: str | None

    def __str__(self) -> str:
        how = (
            f"exited with code {self.exit_code}"
            if self.signal_name is None
            else f"was killed by {self.signal_name}"
        )
        return f"The {self.name} process (pid {self.pid}) {how}."


def describe_exit(name: str, process: BaseProcess) -> ChildExit:
    """Say how `process`, which has ended, ended."""
    code = process.exitcode
    pid = process.pid or 0
    if code is not None and code < 0:
        try:
            signal_name = signal.Signals(-code).name
        except ValueError:
            signal_name = f"signal {-code}"
        return ChildExit(name, pid, None, signal_name)
    return ChildExit(name, pid, code, None)


class ProcessWatch:
    """Waits in a thread of its own for the first of several children to end, and says which.

    `on_exit` is called once, in the watching thread; not after `stop`.
    """

    def __init__(
        self, children: Mapping[str, BaseProcess], on_exit: Callable[[ChildExit], None]
    ) -> None:
        self._children = dict(children)
        self._on_exit = on_exit
        self._wake_receiver, self._wake_sender = multiprocessing.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._watch, name="process-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; call it before the children are ended on purpose."""
        if self._wake_sender.closed:
            return
        self._wake_sender.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        names = {process.sentinel: name for name, process in self._children.items()}
        ready = multiprocessing.connection.wait([self._wake_receiver, *names])
        self._wake_receiver.close()
        if self._wake_sender.closed:
            return
        for sentinel in names:
            if sentinel in ready:
                process = self._children[names[sentinel]]
                process.join()
                self._on_exit(describe_exit(names[sentinel], process))
                return
