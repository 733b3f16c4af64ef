"""What a step takes and sends at several ranks, tensor- and KV-parallel, and what each maps.

    PYTHONPATH=python python benchmark/ranks/bench_ranks.py --markdown

Every grid of ranks computes the same long prompt and the same answer with a small Llama of random
weights: a process for each rank, over gloo on the loopback interface, the scheduler, memory and
model those of a server. Grids are measured by turns, several rounds of fresh processes. Ranks share
this machine's cores, so more of them are no faster: correctness, not speed, is the point, and the
tokens of all grids are compared. Messages are the collectives that a rank enters in a decode step.
No grid records its steps on tapes, so that only the ranks differ, and none starts a step ahead of
results, so that a turn is a step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_loading import write_checkpoint

from sglang.srt.distributed.communicator import Communicator, RankLinks, TensorCommunicator
from sglang.srt.distributed.process_group import connect_ranks
from sglang.srt.environ import Environ
from sglang.srt.managers.io_struct import (
    BatchProgressOut,
    BatchTokenIDOut,
    ControlReply,
    TokenizedGenerateReqInput,
    ToScheduler,
    int32_buffer,
)
from sglang.srt.managers.scheduler_process import make_scheduler
from sglang.srt.managers.scheduler_setup import build_scheduler_parts
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.progress import Progress
from sglang.srt.utils.rendezvous import RankPlace, Rendezvous

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 8,
    "vocab_size": 8192,
    "max_position_embeddings": 1 << 17,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "hidden_act": "silu",
}
WAIT_S = 600.0


@dataclass
class Sent:
    """Collectives that this rank has entered, and the bytes that it brought to them."""

    messages: int = 0
    num_bytes: int = 0

    def add(self, num_bytes: int) -> None:
        self.messages += 1
        self.num_bytes += num_bytes


class Counted:
    """A communicator that counts."""

    def __init__(self, inner: Any, sent: Sent) -> None:
        self._inner, self._sent = inner, sent
        self.rank: int = inner.rank
        self.size: int = inner.size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self._sent.add(tensor.nbytes)
        summed: torch.Tensor = self._inner.all_reduce(tensor)
        return summed

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        self._sent.add(tensor.nbytes)
        gathered: torch.Tensor = self._inner.all_gather(tensor, dim)
        return gathered

    def broadcast(self, data: bytes | None) -> memoryview:
        self._sent.add(len(data or b""))
        told: memoryview = self._inner.broadcast(data)
        return told

    def agree(self, votes: Sequence[int]) -> Sequence[int]:
        self._sent.add(8 * len(votes))
        agreed: Sequence[int] = self._inner.agree(votes)
        return agreed

    def among(self, members: Sequence[int]) -> TensorCommunicator:
        return Counted(self._inner.among(members), self._sent)


class Inbox:
    """Rank 0's channel: one request goes in, its tokens come out."""

    def __init__(self, request: TokenizedGenerateReqInput | None) -> None:
        self._waiting: list[ToScheduler] = [] if request is None else [request]
        self.tokens: list[int] = []

    def receive(self, timeout_ms: int) -> Sequence[ToScheduler]:
        del timeout_ms
        found, self._waiting = self._waiting, []
        return found

    def send_outputs(self, outputs: BatchTokenIDOut) -> None:
        for out in outputs.outs:
            self.tokens += np.frombuffer(out.output_ids, "<i4").tolist()

    def send_reply(self, reply: ControlReply) -> None: ...

    def send_progress(self, progress: BatchProgressOut) -> None: ...


@dataclass(frozen=True)
class Ask:
    """One run: the flags of a rank's server, and the lengths."""

    flags: dict[str, Any]
    input_len: int
    output_len: int


def run_rank(ask: Ask, place: RankPlace, meeting: Rendezvous | None, pipe: Connection) -> None:
    """One rank's process: build, answer, report."""
    args = ServerArgs.from_kwargs(**ask.flags)
    links, sent = None, Sent()
    if meeting is not None:
        # Held to the end: others may still be connecting when this rank is done with that.
        connections = connect_ranks(meeting, place, args.dist_timeout)
        found = connections.links
        assert found is not None
        control: Communicator = Counted(found.control, sent)
        links = RankLinks(control, Counted(found.compute, sent))
    progress = Progress()
    parts = build_scheduler_parts(args, Environ(), progress, links, place=place)
    prompt = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], ask.input_len, np.int32)
    params = SamplingParams(max_new_tokens=ask.output_len, temperature=0.0, ignore_eos=True)
    request = TokenizedGenerateReqInput("r", memoryview(int32_buffer(prompt)), params)
    inbox = Inbox(request if place.tp_rank == 0 else None)
    scheduler = make_scheduler(parts, inbox, progress, links)
    began = time.perf_counter()
    turns: list[tuple[float, Sent]] = []
    mapped = 0
    while not turns or scheduler.busy:
        scheduler.turn()
        mapped = max(mapped, parts.memory.manager.mapped_bytes)
        turns.append((time.perf_counter() - began, Sent(sent.messages, sent.num_bytes)))
    # The prompt's last turn gives the first token, each further one is a decode step.
    steady = turns[-ask.output_len + 1 :]
    steps = list(itertools.pairwise(steady))
    pipe.send(
        {
            "tokens": inbox.tokens,
            "prefill_s": turns[-ask.output_len][0],
            "step_s": statistics.median(b[0] - a[0] for a, b in steps),
            "messages": statistics.median(b[1].messages - a[1].messages for a, b in steps),
            "bytes": statistics.median(b[1].num_bytes - a[1].num_bytes for a, b in steps),
            "mapped": mapped,
            "resident": parts.memory.manager.backing.resident_bytes(),
        }
    )
    parts.worker.close()


def run_grid(tp: int, kv: int, ask: Ask) -> list[dict[str, Any]]:
    """What each rank of a grid reports."""
    spawn = multiprocessing.get_context("spawn")
    size = tp * kv
    with tempfile.TemporaryDirectory() as folder:
        meetings: Sequence[Rendezvous | None] = (
            Rendezvous.for_ranks(size, folder) if size > 1 else (None,)
        )
        children = []
        for rank, meeting in enumerate(meetings):
            receiver, sender = spawn.Pipe(duplex=False)
            place = RankPlace(rank, size, num_here=size)
            child = spawn.Process(target=run_rank, args=(ask, place, meeting, sender))
            child.start()
            sender.close()
            children.append((child, receiver))
        reports = []
        for child, receiver in children:
            if not receiver.poll(WAIT_S):
                raise RuntimeError(f"a rank of {tp} x {kv} did not answer")
            reports.append(receiver.recv())
            child.join()
        for meeting in meetings:
            if meeting is not None and meeting.listener is not None:
                meeting.listener.close()
    return reports


def measure(grids: Sequence[tuple[int, int]], ask: Ask, rounds: int) -> dict[str, Any]:
    """All grids by turns, `rounds` times; figures are medians of rank 0 but for bytes."""
    found: dict[tuple[int, int], list[list[dict[str, Any]]]] = {grid: [] for grid in grids}
    for _ in range(rounds):
        for tp, kv in grids:
            flags = {**ask.flags, "tp_size": tp, "kv_parallel_size": kv}
            found[tp, kv].append(run_grid(tp, kv, Ask(flags, ask.input_len, ask.output_len)))
    expected = found[grids[0]][0][0]["tokens"]
    rows = []
    for (tp, kv), runs in found.items():
        first = [run[0] for run in runs]
        rows.append(
            {
                "tp": tp,
                "kv_parallel": kv,
                "prefill_s": statistics.median(one["prefill_s"] for one in first),
                "step_ms": statistics.median(one["step_s"] for one in first) * 1e3,
                "step_ms_all": sorted(one["step_s"] * 1e3 for one in first),
                "messages_per_step": first[0]["messages"],
                "bytes_brought_per_step": first[0]["bytes"],
                "mapped_bytes_of_ranks": [one["mapped"] for one in runs[0]],
                "resident_bytes_of_ranks": [one["resident"] for one in runs[0]],
                "same_tokens": all(one["tokens"] == expected for one in first),
            }
        )
    settings = {"input_len": ask.input_len, "output_len": ask.output_len, "rounds": rounds}
    return {"benchmark": "ranks", "settings": settings, "rows": rows}


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        "| tp x kv-parallel | prompt, s | step, ms (all rounds) | messages a step | "
        "bytes a rank brings | mapped by each rank, MiB | same tokens |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["rows"]:
        steps = ", ".join(f"{ms:.1f}" for ms in row["step_ms_all"])
        mapped = sorted({round(size / (1 << 20), 2) for size in row["mapped_bytes_of_ranks"]})
        lines.append(
            f"| {row['tp']} x {row['kv_parallel']} | {row['prefill_s']:.2f} | "
            f"{row['step_ms']:.1f} ({steps}) | {row['messages_per_step']:g} | "
            f"{row['bytes_brought_per_step']:,.0f} | {', '.join(map(str, mapped))} | "
            f"{'yes' if row['same_tokens'] else 'NO'} |"
        )
    return "\n".join(lines)


def _grids(text: str) -> list[tuple[int, int]]:
    pairs = [part.split("x") for part in text.split(",")]
    return [(int(tp), int(kv)) for tp, kv in pairs]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a grid gave other tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grids", type=_grids, default=_grids("1x1,2x1,1x2,4x1,2x2,1x4"))
    parser.add_argument("--input-len", type=int, default=8_000)
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", default="512MiB")
    parser.add_argument("--segment", default="2048")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(5)
        write_checkpoint(CONFIG, Path(folder) / "llama", 1)
        flags = {
            "model_path": str(Path(folder) / "llama"),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "random_seed": 3,
            "kv_memory_budget": args.budget,
            "kv_segment_size": args.segment,
            "chunked_prefill_size": 2048,
            "disable_cuda_graph": True,
            "disable_overlap_schedule": True,
            "log_level": "error",
        }
        ask = Ask(flags, args.input_len, args.output_len)
        report = measure(args.grids, ask, args.rounds)
    print(as_markdown(report) if args.markdown else json.dumps(report, indent=2))
    return 0 if all(row["same_tokens"] for row in report["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
