"""Which node of a server this process is: from the flags, or from what torchrun says.

Each process that torchrun starts is a node here, with its share of the ranks. Pure; the launcher
calls it once.
"""

from __future__ import annotations

import dataclasses

from sglang.srt.configs.flag_checks import split_address
from sglang.srt.environ import Environ
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.rendezvous import NodeMeeting


def resolve_nodes(
    server_args: ServerArgs, environ: Environ
) -> tuple[ServerArgs, NodeMeeting | None]:
    """The settings with their nodes, and where these meet; None when there is only one.

    Flags win over torchrun's variables. Raises ValueError with one line when the ranks can't be
    divided among the processes that torchrun started.
    """
    torchrun = environ.torchrun
    if torchrun is not None and torchrun.world_size > 1 and not server_args.has_nodes_given:
        try:
            server_args = dataclasses.replace(
                server_args,
                nnodes=torchrun.world_size,
                node_rank=torchrun.rank,
                dist_init_addr=_joined(torchrun.master_addr, torchrun.master_port),
            )
        except ValueError as error:
            raise ValueError(
                f"torchrun has started WORLD_SIZE={torchrun.world_size} processes, "
                f"each of them a node: {error}"
            ) from error
        return server_args, NodeMeeting(
            torchrun.rank,
            torchrun.master_addr,
            torchrun.master_port,
            torchrun.has_store,
            torchrun.attempt,
            torchrun.local_world_size,
            environ.gloo_interface,
        )
    if server_args.nnodes == 1:
        return server_args, None
    assert server_args.dist_init_addr is not None  # ServerArgs
    host, port = split_address(server_args.dist_init_addr)
    return server_args, NodeMeeting(
        server_args.node_rank, host, port, interface=environ.gloo_interface
    )


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
