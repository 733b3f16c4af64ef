"""Children that die with their parent, and deaths that are noticed, with real processes."""

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import psutil
import pytest

from sglang.srt.utils.process import (
    ChildExit,
    ProcessWatch,
    configure_logging,
    kill_process_tree,
    stop_children,
)
from srt.utils.child_processes import (
    child_that_ignores_sigterm,
    child_that_waits,
    parent_of_one,
)

WAIT_S = 60
SPAWN = multiprocessing.get_context("spawn")


KEPT: list[Connection] = []


@pytest.fixture(autouse=True)
def close_pipes() -> Iterator[None]:
    yield
    while KEPT:
        KEPT.pop().close()


def started(
    target: Callable[..., None], *args: object
) -> tuple[multiprocessing.process.BaseProcess, int]:
    """A running child and the pid that it or its child reported."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(theirs, *args))
    process.start()
    theirs.close()
    assert ours.poll(WAIT_S)
    pid = ours.recv()
    KEPT.append(ours)
    return process, pid


def test_a_child_dies_with_its_parent_but_not_with_the_thread_that_started_it() -> None:
    ours, theirs = SPAWN.Pipe()
    parent, pid = started(parent_of_one, theirs)
    child = psutil.Process(pid)
    assert ours.poll(WAIT_S)
    assert ours.recv() == "the thread has ended"
    assert child.status() != psutil.STATUS_ZOMBIE
    ours.send(None)
    parent.join(WAIT_S)
    assert parent.exitcode == -signal.SIGKILL
    with contextlib.suppress(psutil.NoSuchProcess):
        child.wait(WAIT_S)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    ours.close()
    theirs.close()


def test_a_child_leaves_ctrl_c_to_its_parent() -> None:
    process, pid = started(child_that_waits)
    os.kill(pid, signal.SIGINT)
    KEPT[-1].send("end")
    process.join(WAIT_S)
    assert process.exitcode == 7


@pytest.mark.parametrize(
    ("how", "exit_code", "signal_name", "text"),
    [
        ("by itself", 7, None, "exited with code 7."),
        ("killed", None, "SIGKILL", "was killed by SIGKILL."),
    ],
)
def test_a_watch_says_which_child_ended_and_how(
    how: str, exit_code: int | None, signal_name: str | None, text: str
) -> None:
    other, _ = started(child_that_waits)
    victim, pid = started(child_that_waits)
    exits: queue.Queue[ChildExit] = queue.Queue()
    watch = ProcessWatch({"other": other, "scheduler": victim}, exits.put)
    watch.start()
    if how == "killed":
        os.kill(pid, signal.SIGKILL)
    else:
        KEPT[-1].send("end")
    seen = exits.get(timeout=WAIT_S)
    assert seen == ChildExit("scheduler", pid, exit_code, signal_name)
    assert str(seen) == f"The scheduler process (pid {pid}) {text}"
    watch.stop()
    stop_children({"other": other})
    assert other.exitcode == -signal.SIGTERM
    assert exits.empty()


def test_a_stopped_watch_says_nothing() -> None:
    process, _ = started(child_that_waits)
    exits: queue.Queue[ChildExit] = queue.Queue()
    watch = ProcessWatch({"child": process}, exits.put)
    watch.start()
    watch.stop()
    watch.stop()
    stop_children({"child": process})
    assert exits.empty()


def test_children_that_do_not_listen_are_killed() -> None:
    process, _ = started(child_that_ignores_sigterm)
    stop_children({"child": process}, grace_s=0.05)
    assert process.exitcode == -signal.SIGKILL


def test_a_tree_is_ended_with_its_leaves() -> None:
    ours, theirs = SPAWN.Pipe()
    parent, pid = started(parent_of_one, theirs)
    leaf = psutil.Process(pid)
    assert parent.pid is not None
    kill_process_tree(parent.pid)
    assert not psutil.pid_exists(parent.pid)
    assert not leaf.is_running() or leaf.status() == psutil.STATUS_ZOMBIE
    kill_process_tree(parent.pid)
    ours.close()
    theirs.close()


def test_logging_goes_to_stderr_with_the_process_name(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    try:
        configure_logging("warning", "sglang::test")
        logging.getLogger("x").warning("hello")
        logging.getLogger("x").info("not shown")
    finally:
        root.handlers, root.level = handlers, level
    shown = capsys.readouterr().err
    assert "sglang::test] WARNING: hello" in shown
    assert "not shown" not in shown
