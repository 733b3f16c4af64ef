"""Ranks without a model: each does what the variable FAKE_RANKS says, such as "ready die,ready".

Words of rank n stand at place n, separated by commas: "ready", "fail" and "lost" send such a
message and the last two exit; "die" exits with 7. "die" and "lost" first wait for the file named
by FAKE_RANKS_GO, which "fail" makes: another rank is only missed once it is gone. A rank whose
words are over waits for ever.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from sglang.srt.environ import Environ
from sglang.srt.managers.io_struct import IpcNames, SchedulerReady
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.process import set_up_child
from sglang.srt.utils.rendezvous import RankBoard, RankPlace, Rendezvous

ENTRY = "srt.entrypoints.fake_ranks:run_rank"
DETOKENIZER = "srt.entrypoints.fake_ranks:run_detokenizer"


def run_rank(
    server_args: ServerArgs,
    environ: Environ,
    ipc: IpcNames,
    ready_pipe: Connection,
    place: RankPlace,
    rendezvous: Rendezvous,
) -> None:
    tp_rank = place.number
    set_up_child(f"fake rank {tp_rank}", server_args.log_level)
    assert (rendezvous.listener is not None) == (tp_rank == 0)
    assert rendezvous.board_path is not None
    assert RankBoard(rendezvous.board_path, place.num_all).begin(tp_rank, 0) == 1
    go = Path(os.environ["FAKE_RANKS_GO"])
    for word in os.environ["FAKE_RANKS"].split(",")[tp_rank].split():
        if word == "ready":
            ready_pipe.send(("ready", SchedulerReady(100 + tp_rank, 100, 100, 1, 99, 64)))
        elif word == "fail":
            ready_pipe.send(("error", "the weights are made of cheese"))
            go.touch()
            sys.exit(1)
        elif word == "lost":
            _wait_for(go)
            ready_pipe.send(("lost", "the other rank is gone"))
            sys.exit(1)
        elif word == "die":
            _wait_for(go)
            ready_pipe.send(("error", "the invariant does not hold"))
            sys.exit(7)
    threading.Event().wait()


def _wait_for(path: Path) -> None:
    while not path.exists():
        threading.Event().wait(0.01)


def run_detokenizer(server_args: ServerArgs, ipc: IpcNames) -> None:
    set_up_child("fake detokenizer", server_args.log_level)
    threading.Event().wait()
