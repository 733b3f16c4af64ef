"""What the children of test_process.py run; a module of its own so that spawn can import it."""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

from sglang.srt.utils.process import ChildStarter, set_up_child


def child_that_waits(pipe: Connection) -> None:
    set_up_child("test::child")
    pipe.send(os.getpid())
    pipe.recv()  # for ever, or until told how to end
    sys.exit(7)


def child_that_ignores_sigterm(pipe: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe.send(os.getpid())
    threading.Event().wait()


def parent_of_one(pipe: Connection, die: Connection) -> None:
    """Starts a child from a thread that ends, then waits to be killed itself."""
    starter = ChildStarter()

    def start() -> None:
        child = multiprocessing.get_context("spawn").Process(target=child_that_waits, args=(pipe,))
        starter.start(child)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    die.send("the thread has ended")
    die.recv()
    os.kill(os.getpid(), signal.SIGKILL)
