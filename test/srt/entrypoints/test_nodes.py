"""Which node a process is, by its flags or by torchrun's variables."""

from __future__ import annotations

import pytest

from sglang.srt.entrypoints.nodes import resolve_nodes
from sglang.srt.entrypoints.processes import places_here
from sglang.srt.environ import Environ
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.rendezvous import NodeMeeting, RankPlace

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def args(**flags: object) -> ServerArgs:
    return ServerArgs.from_kwargs(model_path="m", **flags)


def test_one_node_meets_nobody() -> None:
    assert resolve_nodes(args(tp_size=2), Environ())[1] is None
    alone = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    assert resolve_nodes(args(tp_size=2), Environ.from_os(alone))[1] is None


def test_flags_say_where_nodes_meet() -> None:
    given = args(tp_size=4, nnodes=2, node_rank=1, dist_init_addr="[fe80::1]:5000")
    environ = Environ.from_os({"GLOO_SOCKET_IFNAME": "eth0"})
    settled, meeting = resolve_nodes(given, environ)
    assert settled is given
    assert meeting == NodeMeeting(1, "fe80::1", 5000, interface="eth0")
    assert [place.tp_rank for place in places_here(settled)] == [2, 3]
    assert {place.num_here for place in places_here(settled)} == {2}


def test_each_process_of_torchrun_is_a_node() -> None:
    settled, meeting = resolve_nodes(args(tp_size=4), Environ.from_os(TORCHRUN))
    assert (settled.nnodes, settled.node_rank) == (4, 3)
    assert meeting == NodeMeeting(3, "10.0.0.1", 29500, attempt="-", processes_here=2)
    assert places_here(settled, 2) == (RankPlace(3, 4, num_here=2),)
    agent = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "job"}
    _, meeting = resolve_nodes(
        args(tp_size=8), Environ.from_os({**agent, "TORCHELASTIC_RESTART_COUNT": "2"})
    )
    assert meeting is not None
    assert (meeting.has_store, meeting.attempt) == (True, "job-2")


def test_a_given_number_of_nodes_wins_over_torchrun() -> None:
    assert resolve_nodes(args(nnodes=1), Environ.from_os(TORCHRUN))[1] is None


def test_ranks_that_torchrun_can_not_divide_are_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"WORLD_SIZE=4 processes.*--tp-size 6 cannot be divided"):
        resolve_nodes(args(tp_size=6), Environ.from_os(TORCHRUN))
    with pytest.raises(ValueError, match="RANK must be a number from 0 to 3, got '4'"):
        Environ.from_os({**TORCHRUN, "RANK": "4"})


def test_replicas_are_counted_through() -> None:
    places = places_here(args(tp_size=2, dp_size=2))
    assert [place.name for place in places] == [
        *("scheduler DP0 TP0", "scheduler DP0 TP1", "scheduler DP1 TP0", "scheduler DP1 TP1")
    ]
    assert [(place.number, place.first, place.num_here) for place in places] == [
        *((0, 0, 4), (1, 0, 4), (2, 2, 4), (3, 2, 4))
    ]
