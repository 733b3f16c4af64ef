"""What memory a rank needs to load its part of a checkpoint, and how much of it is read.

    PYTHONPATH=python python benchmark/ranks/bench_loading.py --markdown

Writes checkpoints of several safetensors files with random weights (a dense Llama and a mixture
of experts) and loads rank after rank at every size, each in a fresh process, by the way that a
server loads. A rank's peak is taken from the kernel's high-water mark, less what the process held
once everything was imported. It counts windows on the files as well, which the system takes back
when it needs memory; anonymous memory, which it can't, is given beside.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.model_loader.loader import load_model

GIB = 1 << 30
GOAL_BYTES = 1_000_000_000  # above a rank's own part
DEFAULT_SIZES = "1,2,4,8"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Loaded:
    """One rank's load, all in bytes but `seconds`; peaks are above what imports had taken."""

    model: str
    tp_size: int
    tp_rank: int
    shard_bytes: int
    peak_rss: int
    peak_anonymous: int
    seconds: float

    @property
    def above_shard(self) -> int:
        return self.peak_rss - self.shard_bytes


def llama_config(scale: int) -> dict[str, Any]:
    """A dense decoder; `scale` 8 is the width of the 8-billion models, with 16 layers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 512 * scale,
        "intermediate_size": 1792 * scale,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": max(2, 2 * scale),
        "vocab_size": 16_032 * scale,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }


def moe_config(scale: int) -> dict[str, Any]:
    """A mixture of experts with Qwen3-MoE's names; `scale` 8 has its widths and 128 experts."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 256 * scale,
        "intermediate_size": 768 * scale,
        "moe_intermediate_size": 96 * scale,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": scale,
        "vocab_size": 18_992 * scale,
        "num_experts": 16 * scale,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }


def checkpoint_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint with this config."""
    hidden = config["hidden_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = (head_dim * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "lm_head.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")
        }
        rows = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
        shapes |= {f"{at}self_attn.{name}_proj.weight": shape for name, shape in rows.items()}
        if config["model_type"] == "llama":
            shapes |= _mlp(f"{at}mlp.", config["intermediate_size"], hidden)
            continue
        shapes |= {f"{at}self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        shapes[f"{at}mlp.gate.weight"] = (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            shapes |= _mlp(f"{at}mlp.experts.{expert}.", config["moe_intermediate_size"], hidden)
    return shapes


def _mlp(at: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{at}gate_proj.weight": (width, hidden),
        f"{at}up_proj.weight": (width, hidden),
        f"{at}down_proj.weight": (hidden, width),
    }


def write_checkpoint(config: Mapping[str, Any], folder: Path, num_files: int) -> int:
    """Write config and weights, a file at a time; returns the bytes of all tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = checkpoint_shapes(config)
    files = list(_into_files(shapes, num_files))
    places = {}
    total = 0
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        # Values do not matter, but a hole in a file would be read for nothing: no zeros.
        tensors = {
            name: torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-0.02, 0.02)
            for name in names
        }
        save_file(tensors, folder / file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        places.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _into_files(shapes: Shapes, num_files: int) -> Iterator[list[str]]:
    """The names in files of about equal size, in order."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    per_file = -(-sum(sizes.values()) // num_files)
    names: list[str] = []
    filled = 0
    for name, size in sizes.items():
        names.append(name)
        filled += size
        if filled >= per_file:
            yield names
            names, filled = [], 0
    if names:
        yield names


def memory_of_process() -> tuple[int, int]:
    """(resident bytes, those of them that are anonymous) of this process now."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("VmRSS", "RssAnon"):
            found[name] = int(rest.split()[0]) * 1024
    return found["VmRSS"], found["RssAnon"]


class Watch:
    """Peaks of this process's memory while the block runs.

    The resident peak is the kernel's own; the anonymous one is looked at every few milliseconds.
    """

    def __enter__(self) -> Watch:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self.rss, self.anonymous = self._base = memory_of_process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self.anonymous = max(self.anonymous, memory_of_process()[1])

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        self._thread.join()
        self.anonymous = max(self.anonymous, memory_of_process()[1]) - self._base[1]
        status = Path("/proc/self/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        self.rss = int(peak.split()[1]) * 1024 - self._base[0]


def load_rank(path: str, tp_size: int, tp_rank: int) -> Loaded:
    """Load one rank's part in this process."""
    config = ModelConfig.from_path(path)
    warm = torch.ones(8, 8, dtype=torch.bfloat16)
    torch.mm(warm, warm)  # what the first product loads is no part of the model
    began = time.perf_counter()
    with Watch() as watch:
        model = load_model(
            config,
            dtype=torch.bfloat16,
            parallel=ParallelState(tp_rank, tp_size),
            show_progress=False,
            quantization="none",
        )
    seconds = time.perf_counter() - began
    shard = sum(parameter.nbytes for parameter in model.parameters())
    return Loaded(
        Path(path).name, tp_size, tp_rank, shard, watch.rss, watch.anonymous, round(seconds, 2)
    )


def load_in_process(path: Path, tp_size: int, tp_rank: int) -> Loaded:
    command = [sys.executable, __file__, "--load", str(path), str(tp_size), str(tp_rank)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Loaded(**json.loads(told.splitlines()[-1]))


def measure(scale: int, sizes: Sequence[int], num_files: int, folder: Path) -> dict[str, Any]:
    """Write, load and remove one checkpoint after the other."""
    rows: list[dict[str, Any]] = []
    totals = {}
    for name, config in (("llama", llama_config(scale)), ("qwen3-moe", moe_config(scale))):
        path = folder / name
        totals[name] = write_checkpoint(config, path, num_files)
        try:
            for size in sizes:
                loads = [load_in_process(path, size, rank) for rank in range(size)]
                worst = max(loads, key=lambda loaded: loaded.above_shard)
                met = worst.above_shard <= GOAL_BYTES
                rows.append({**asdict(worst), "above_shard": worst.above_shard, "met": met})
        finally:
            shutil.rmtree(path)
    settings = {"scale": scale, "files": num_files, "checkpoint_bytes": totals}
    return {"benchmark": "loading", "settings": settings, "rows": rows}


def as_markdown(report: Mapping[str, Any]) -> str:
    lines = [
        "| checkpoint | ranks | rank's part, MB | peak, MB | above its part, MB | "
        "anonymous peak, MB | s | within 1 GB |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["rows"]:
        sizes = ("shard_bytes", "peak_rss", "above_shard", "peak_anonymous")
        cells = [f"{row[size] / 1e6:,.0f}" for size in sizes]
        total = report["settings"]["checkpoint_bytes"][row["model"]]
        name = f"{row['model']}, {total / 1e9:.1f} GB"
        met = "yes" if row["met"] else "**no**"
        cells = [name, str(row["tp_size"]), *cells, f"{row['seconds']:.1f}", met]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, default=8, help="width and depth; 8 is several GB")
    parser.add_argument("--sizes", default=DEFAULT_SIZES, help="numbers of ranks")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints are written")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.load:
        print(json.dumps(asdict(load_rank(args.load[0], int(args.load[1]), int(args.load[2])))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        sizes = [int(size) for size in args.sizes.split(",")]
        report = measure(args.scale, sizes, args.files, Path(folder))
    print(as_markdown(report) if args.markdown else json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
