"""Ranks without a model: each does what the variable FAKE_RANKS says, such as "ready die,ready".

Words of rank n stand at place n, separated by commas: "ready", "fail" and "lost" send such a
message and the last two exit; "die" waits for the file named by FAKE_RANKS_GO and exits with 7; a
rank whose words are over waits for ever.
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
from sglang.srt.utils.rendezvous import RankBoard, Rendezvous

ENTRY = "srt.entrypoints.fake_ranks:run_rank"
DETOKENIZER = "srt.entrypoints.fake_ranks:run_detokenizer"


def run_rank(
    server_args: ServerArgs,
    environ: Environ,
    ipc: IpcNames,
    ready_pipe: Connection,
    tp_rank: int,
    rendezvous: Rendezvous,
) -> None:
    set_up_child(f"fake rank {tp_rank}", server_args.log_level)
    assert (rendezvous.listener is not None) == (tp_rank == 0)
    assert RankBoard(rendezvous.board_path, server_args.tp_size).begin(tp_rank, 0) == 1
    for word in os.environ["FAKE_RANKS"].split(",")[tp_rank].split():
        if word == "ready":
            ready_pipe.send(("ready", SchedulerReady(100 + tp_rank, 100, 100, 1, 99, 64)))
        elif word == "fail":
            ready_pipe.send(("error", "the weights are made of cheese"))
            sys.exit(1)
        elif word == "lost":
            ready_pipe.send(("lost", "the other rank is gone"))
            sys.exit(1)
        elif word == "die":
            while not Path(os.environ["FAKE_RANKS_GO"]).exists():
                threading.Event().wait(0.01)
            ready_pipe.send(("error", "the invariant does not hold"))
            sys.exit(7)
    threading.Event().wait()


def run_detokenizer(server_args: ServerArgs, ipc: IpcNames) -> None:
    set_up_child("fake detokenizer", server_args.log_level)
    threading.Event().wait()
