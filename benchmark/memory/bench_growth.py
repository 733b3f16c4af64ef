"""Does mapping memory while a batch decodes slow the steps down?

    PYTHONPATH=python python benchmark/memory/bench_growth.py --markdown

Two real schedulers with the real model in one process, one over each backing, take steps in
turns. The segmented one starts every round with nothing mapped and has to grow all the way; the
static one has all its memory. Steps are whole turns of the scheduler, without overlap.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch

from bench_common import BACKINGS, Report, Row, demo_model, parser, percentile, seconds_of, show
from sglang.srt.environ import Environ
from sglang.srt.managers.io_struct import (
    BatchProgressOut,
    BatchTokenIDOut,
    ControlReply,
    ControlReq,
    TokenizedGenerateReqInput,
    ToScheduler,
    int32_buffer,
)
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_setup import build_scheduler_parts
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.progress import Progress

GOAL_P50, GOAL_P99 = 1.01, 1.05
PROMPT_TOKENS = 16


class MemoryChannel:
    """Messages in and out in memory."""

    def __init__(self) -> None:
        self.inbox: list[ToScheduler] = []
        self.replies: list[ControlReply] = []

    def receive(self, timeout_ms: int) -> Sequence[ToScheduler]:
        del timeout_ms
        taken, self.inbox = self.inbox, []
        return taken

    def send_outputs(self, outputs: BatchTokenIDOut) -> None:
        del outputs

    def send_reply(self, reply: ControlReply) -> None:
        self.replies.append(reply)

    def send_progress(self, progress: BatchProgressOut) -> None:
        del progress


class Side:
    """One scheduler over one backing, run turn by turn."""

    def __init__(self, backing: str, settings: object) -> None:
        tokens = settings.batch * (settings.steps + PROMPT_TOKENS + 2 * settings.segment_tokens)
        args = ServerArgs.from_kwargs(
            model_path=settings.model_path,
            kv_backing=backing,
            kv_segment_size=settings.segment_tokens,
            kv_memory_budget=tokens * 23_040,
            kv_idle_release_seconds=0,
            disable_overlap_schedule=True,
            disable_radix_cache=True,
            log_level="error",
        )
        progress = Progress()
        parts = build_scheduler_parts(args, Environ(), progress)
        self.memory = parts.memory
        self.channel = MemoryChannel()
        self.scheduler = Scheduler(
            memory=parts.memory,
            worker=parts.worker,
            make_batch=parts.make_batch,
            channel=self.channel,
            limits=parts.limits,
            progress=progress,
            clock=time.monotonic,
        )
        self._worker = parts.worker

    def begin(self, batch: int, steps: int) -> None:
        """Queue requests that all decode `steps` tokens, and compute their prompts."""
        rng = np.random.default_rng(4)
        for i in range(batch):
            length = PROMPT_TOKENS + i  # rows start new pages at different steps
            ids = rng.integers(100, 40_000, length).astype(np.int32)
            params = SamplingParams(max_new_tokens=steps, temperature=0.0, ignore_eos=True)
            self.channel.inbox.append(
                TokenizedGenerateReqInput(f"r{i}", memoryview(int32_buffer(ids)), params, True)
            )
        while self.scheduler.num_running < batch:
            self.scheduler.turn()
        self.scheduler.turn()

    def end(self) -> None:
        """Run to the end and until all that can be unmapped is."""
        while self.scheduler.busy:
            self.scheduler.turn()
        self.channel.inbox.append(ControlReq(1, "flush_cache"))
        self.scheduler.turn()
        while self.memory.manager.pending():
            self.scheduler.turn()

    @property
    def num_maps(self) -> int:
        return sum(one.map_count for one in self.memory.manager.stats())

    def close(self) -> None:
        self._worker.close()
        self.memory.close_pool()


def one_round(sides: dict[str, Side], settings: object) -> dict[str, list[float]]:
    """Milliseconds of every decode step of one round, by backing."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side.begin(settings.batch, settings.steps)
    for step in range(settings.steps - 8):
        names = list(sides) if step % 2 == 0 else list(reversed(sides))
        for name in names:
            found[name].append(seconds_of(sides[name].scheduler.turn) * 1000)
    for side in sides.values():
        assert side.scheduler.num_running == settings.batch, "a request ended too early"
        side.end()
    return found


def main(argv: Sequence[str] | None = None) -> Report:
    args = parser(__doc__.splitlines()[0])
    args.add_argument("--batch", type=int, default=4)
    args.add_argument("--steps", type=int, default=48, help="tokens of every request of a round")
    args.add_argument("--segment-tokens", type=int, default=64)
    args.add_argument("--threads", type=int, default=1)
    args.add_argument("--model-path", default="", help="default: the demo model")
    settings = args.parse_args(argv)
    settings.model_path = settings.model_path or demo_model()
    torch.set_num_threads(settings.threads)
    report = Report("decode steps while segments are being mapped", dict(vars(settings)))
    report.settings["model_path"] = settings.model_path.rpartition("/")[2]
    del report.settings["markdown"]
    sides = {name: Side(name, settings) for name in BACKINGS}
    one_round(sides, settings)  # warms up both
    maps_before = sides["mmap"].num_maps
    rounds = [one_round(sides, settings) for _ in range(settings.repeats)]
    maps = sides["mmap"].num_maps - maps_before
    for side in sides.values():
        side.close()
    add_rows(report, rounds)
    steps = sum(len(one["mmap"]) for one in rounds)
    report.notes.append(f"{maps} segments were mapped during {steps} segmented steps.")
    show(report, markdown=settings.markdown)
    return report


def add_rows(report: Report, rounds: Sequence[dict[str, list[float]]]) -> None:
    pooled = {name: [step for one in rounds for step in one[name]] for name in BACKINGS}
    for percent, goal in ((50, GOAL_P50), (90, None), (99, GOAL_P99)):
        ours, static = (percentile(pooled[name], percent) for name in BACKINGS)
        words = "" if goal is None else f"ratio <= {goal}"
        met = None if goal is None else ours / static <= goal
        report.rows.append(Row(f"p{percent} of all steps", ours, static, "ms", words, met))
    pairs = [ours / static for ours, static in zip(*pooled.values(), strict=True)]
    what = "median of step over the static step beside it"
    report.rows.append(Row(what, statistics.median(pairs), 1.0, "x"))


if __name__ == "__main__":
    main()
