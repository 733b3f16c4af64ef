"""Several scheduler processes under one parent: who is waited for, named and ended."""

from __future__ import annotations

import queue
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sglang.srt.entrypoints.processes import ServerProcesses, StartError
from sglang.srt.environ import Environ
from sglang.srt.server_args import ServerArgs
from srt.entrypoints.fake_ranks import DETOKENIZER, ENTRY

Make = Callable[[str], ServerProcesses]


@pytest.fixture
def make(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Starts two fake ranks; afterwards nothing may be left of them."""
    monkeypatch.setattr("tempfile.tempdir", str(short_tmp))
    monkeypatch.setenv("FAKE_RANKS_GO", str(short_tmp / "go"))
    made: list[ServerProcesses] = []

    def start(words: str) -> ServerProcesses:
        monkeypatch.setenv("FAKE_RANKS", words)
        args = ServerArgs.from_kwargs(model_path="m", tp_size=2, log_level="critical")
        processes = ServerProcesses(args, Environ(), scheduler=ENTRY, detokenizer=DETOKENIZER)
        made.append(processes)
        processes.start()
        return processes

    yield start
    for processes in made:
        pids = [pid for pid in processes.pids.values() if pid is not None]
        port = processes._meetings[0].port
        processes.stop()
        assert not any(psutil.pid_exists(pid) for pid in pids)
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass
    (short_tmp / "go").unlink(missing_ok=True)
    assert list(short_tmp.iterdir()) == []


def test_every_rank_is_waited_for_and_the_first_one_speaks(make: Make) -> None:
    processes = make("ready,ready")
    assert processes.wait_ready().context_length == 100
    assert list(processes.pids) == ["scheduler TP0", "scheduler TP1", "detokenizer"]


@pytest.mark.parametrize("words", ["lost,fail", "ready,fail", ",fail"])
def test_the_rank_that_can_not_start_is_named(make: Make, words: str) -> None:
    with pytest.raises(StartError, match=r"^The scheduler TP1 cannot start: .* made of cheese"):
        make(words).wait_ready()


def test_a_rank_that_dies_is_told_with_its_last_words(make: Make, short_tmp: Path) -> None:
    processes = make("ready,ready die")
    processes.wait_ready()
    told: queue.Queue[str] = queue.Queue()
    processes.watch(told.put)
    (short_tmp / "go").touch()
    reason = told.get(timeout=20)
    assert reason.startswith("The scheduler TP1 process")
    assert reason.endswith("exited with code 7. Its last error: the invariant does not hold")


def test_processes_that_never_started_leave_nothing(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(short_tmp))
    args = ServerArgs.from_kwargs(model_path="m", tp_size=2)
    ServerProcesses(args, Environ(), scheduler=ENTRY, detokenizer=DETOKENIZER).stop()
    assert list(short_tmp.iterdir()) == []
