"""Two nodes on the loopback interface: two launchers, or what torchrun starts."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from e2e.server_process import ServerProcess, Traces, gone, wait_until
from sglang.srt.utils.network import get_free_port
from srt.models.hf_models import hf_greedy, make_hf_model, save

TIMEOUT_S = 5
NEW_TOKENS = 8
PROMPT = [5, 9, 2, 70, 11]
FLAGS = ("--skip-tokenizer-init", "--dtype", "float32", "--kv-memory-budget", "64MiB")


class Nodes:
    """Both nodes of one server, each with a directory of its own for temporary files."""

    def __init__(self, model: str, tmp: Path, second: tuple[str, ...] = ()) -> None:
        address = f"127.0.0.1:{get_free_port()}"
        common = ("--model-path", model, *FLAGS, "--tp", "2", "--dist-timeout", str(TIMEOUT_S))
        self.tmps = [tmp / "a", tmp / "b"]
        self.nodes = []
        for rank, folder in enumerate(self.tmps):
            folder.mkdir()
            place = ("--nnodes", "2", "--node-rank", str(rank), "--dist-init-addr", address)
            flags = (*common, *place, *(second if rank else ()))
            self.nodes.append(ServerProcess(*flags, env={"TMPDIR": str(folder)}))

    def wait_ready(self) -> None:
        self.nodes[0].wait_ready()
        self.nodes[1].wait_text("Node 1 of 2 is ready")

    def traces(self) -> list[Traces]:
        pairs = zip(self.nodes, self.tmps, strict=True)
        return [Traces.of(node, folder) for node, folder in pairs]

    def close(self) -> None:
        for node in self.nodes:
            node.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(make_hf_model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def nodes(model: str, short_tmp: Path) -> Iterator[Nodes]:
    made = Nodes(model, short_tmp)
    try:
        made.wait_ready()
        yield made
    finally:
        made.close()


def ask(server: ServerProcess) -> list[int]:
    params = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    reply = server.post("/generate", {"input_ids": PROMPT, "sampling_params": params})
    assert reply.status_code == 200, reply.text
    ids: list[int] = reply.json()["output_ids"]
    return ids


def test_two_nodes_answer_as_one_until_one_is_killed(nodes: Nodes) -> None:
    first, second = nodes.nodes
    assert ask(first) == hf_greedy(make_hf_model("llama"), PROMPT, NEW_TOKENS)
    traces = nodes.traces()
    assert second.port not in traces[1].ports, "HTTP is node 0's alone"
    names = [sum("TP" in part for part in (" ".join(p.cmdline()),)) for p in second.children()]
    assert sum(names) == 1, "one rank, no detokenizer"
    second.process.kill()
    assert first.wait_exit(TIMEOUT_S + 8) != 0
    assert "rank 1" in first.text, first.text
    for trace in traces[:1]:
        trace.assert_gone()
    assert wait_until(lambda: gone(traces[1].processes)), "ranks die with their launcher"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_ends_both_nodes_and_is_named(nodes: Nodes, victim: int) -> None:
    traces = nodes.traces()
    nodes.nodes[victim].child(f"scheduler TP{victim}").send_signal(signal.SIGSTOP)
    for node in nodes.nodes:
        if node is not nodes.nodes[victim]:
            assert node.wait_exit(TIMEOUT_S + 10) != 0
            # of the one that serves the store no more is known than that it is gone
            said = "rank 1 has not come to" if victim else "rank 0 was lost during"
            assert said in node.text
    # its own launcher hears nothing of a stopped process, and ends with the others' connections
    nodes.nodes[victim].child(f"scheduler TP{victim}").send_signal(signal.SIGCONT)
    assert nodes.nodes[victim].wait_exit(TIMEOUT_S + 10) != 0
    for trace in traces:
        trace.assert_gone()


@pytest.mark.slow
def test_a_polite_end_of_node_0_ends_node_1(nodes: Nodes) -> None:
    traces = nodes.traces()
    nodes.nodes[0].process.send_signal(signal.SIGTERM)
    assert nodes.nodes[0].wait_exit() == 0
    assert nodes.nodes[1].wait_exit(TIMEOUT_S + 8) != 0
    assert "rank 0" in nodes.nodes[1].text
    for trace in traces:
        trace.assert_gone()


@pytest.mark.slow
def test_nodes_with_other_settings_say_which(model: str, short_tmp: Path) -> None:
    made = Nodes(model, short_tmp, ("--page-size", "16"))
    try:
        assert [node.wait_exit(60) != 0 for node in made.nodes] == [True, True]
        assert "other settings than node 0: --page-size (16 here, None there)" in made.nodes[1].text
        assert "another node was started with other settings" in made.nodes[0].text
    finally:
        made.close()


@pytest.mark.slow
def test_a_node_that_never_comes_is_a_clear_error(model: str) -> None:
    flags = ("--model-path", model, *FLAGS, "--tp", "2", "--dist-timeout", "2")
    address = f"127.0.0.1:{get_free_port()}"
    for rank in ("0", "1"):
        place = ("--nnodes", "2", "--node-rank", rank, "--dist-init-addr", address)
        server = ServerProcess(*flags, *place)
        try:
            assert server.wait_exit(60) != 0
            assert f"rank {rank} found not all of 2 ranks" in server.text
            assert "Traceback" not in server.text
        finally:
            server.close()


@pytest.mark.slow
def test_torchrun_starts_a_server(model: str, short_tmp: Path) -> None:
    port = get_free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "sglang.launch_server", "--model-path", model, *FLAGS]
    command += ["--tp-size", "2", "--port", str(port), "--dist-timeout", "30"]
    server = ServerProcess.of_command(command, port, {"TMPDIR": str(short_tmp)})
    try:
        server.wait_ready()
        assert ask(server) == hf_greedy(make_hf_model("llama"), PROMPT, NEW_TOKENS)
        everything = [psutil.Process(server.process.pid), *server.children()]
        server.process.send_signal(signal.SIGTERM)
        server.wait_exit(60)
        assert wait_until(lambda: gone(everything))
    finally:
        server.close()
