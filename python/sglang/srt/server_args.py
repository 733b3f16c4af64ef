"""Everything a user may set at start: one frozen value, one field per flag.

The doors build it (`prepare_server_args` from a command line, `ServerArgs.from_kwargs` from
Python) and pass it down; an instance that exists is resolved and valid. Each field's definition
is also the flag's definition: the parser, --help and docs/server_arguments.md come from it. Names
and meanings are SGLang's where SGLang has the flag.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.configs import flag_parser
from sglang.srt.configs.door_args import DoorArgs
from sglang.srt.configs.flag_checks import check_combinations
from sglang.srt.configs.flag_spec import FlagSpec, derived, flag, specs_of
from sglang.srt.configs.flag_tables import OTHER_FLAGS
from sglang.srt.configs.lora_args import LoraArgs
from sglang.srt.configs.priority_args import PriorityArgs
from sglang.srt.configs.rank_args import RankArgs
from sglang.srt.configs.speculative_args import SpeculativeArgs
from sglang.srt.utils.device_probe import detect_device
from sglang.srt.utils.sizes import parse_bytes, parse_count, parse_count_or_auto

DEVICE = "Device and numerics"
SCHEDULE = "Memory and scheduling"
SEGMENTS = "Segmented KV memory (not in SGLang)"
LOGGING = "Logging and health"

MIN_REQUEST_LIMIT = 32 << 20

_OTHER_NAMES = {
    "half": "float16",
    "float": "float32",
    "bf16": "bfloat16",
    "flex_attention": "torch_native",
}


@dataclass(frozen=True)
class ServerArgs(SpeculativeArgs, LoraArgs, PriorityArgs, RankArgs, DoorArgs):
    """All settings of a server or an engine, resolved and validated.

    Building one raises ValueError with one line when a value or a combination cannot be served.
    A field that is still None is derived later or means no limit, as the flag's help says.
    """

    # ---- device and numerics
    device: str = flag(
        None,
        "Where the model runs. cuda is not yet measured on hardware.",
        group=DEVICE,
        choices=("cpu", "cuda"),
        default_text="cuda where torch finds a device, else cpu",
    )
    dtype: str = flag(
        "auto",
        "Type of weights and activations.",
        group=DEVICE,
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
    )
    kv_cache_dtype: str = flag(
        "auto",
        "Type of the KV cache; auto is what the checkpoint says of it (fp8_e4m3 for a static FP8 "
        "scheme of compressed-tensors or ModelOpt with one scale a layer; others are warned of), "
        "else the type of the activations. The two of fp8 halve what a "
        "token takes in bfloat16; numbers are divided by a layer's scales where the checkpoint has "
        "them, and rounded. int8 keeps a float32 scale for each token and kv head, 4 bytes beside "
        "head_dim: more exact than fp8.",
        group=DEVICE,
        choices=("auto", "bf16", "bfloat16", "float16", "float32", "fp8_e4m3", "fp8_e5m2", "int8"),
    )
    quantization_param_path: str | None = flag(
        None,
        "JSON file with a scale for each layer of an fp8 KV cache; wins over the checkpoint's.",
        group=DEVICE,
        metavar="PATH",
    )
    attention_backend: str = flag(
        None,
        "Which code computes attention; cpu is that of sgl-kernel. triton is for GPUs; on a CPU it "
        "runs in Triton's interpreter alone, for tests. flex_attention, which is torch's as well, "
        "is taken as torch_native.",
        group=DEVICE,
        choices=("auto", "cpu", "torch_native", "flex_attention", "triton", "flashinfer"),
        default_text="on a CPU cpu where sgl-kernel is installed, on a GPU triton where it is, "
        "else torch_native",
    )
    quantization: str | None = flag(
        None,
        "Weights that stay quantised in memory: gguf those of a GGUF file, the names of "
        "quantised checkpoints' methods those of such a one. int8 rounds any checkpoint's at load, "
        "fp8 those of one that is not quantised; none makes numbers of all.",
        group=DEVICE,
        choices=(
            *("gguf", "int8", "mxfp4", "fp8", "gptq", "gptq_marlin", "awq", "awq_marlin"),
            *("compressed-tensors", "none"),
        ),
        default_text="gguf or the checkpoint's method where sgl-kernel is installed, else none",
    )
    disable_cuda_graph: bool = flag(
        False,
        "Compute decode steps call by call. Without it their calls are recorded once and made "
        "again together: native ones on a tape, a GPU's in a CUDA graph.",
        group=DEVICE,
    )
    cuda_graph_max_bs: int = flag(
        None,
        "Most requests of a decode step that is recorded.",
        group=DEVICE,
        aliases=("--cuda-graph-max-bs-decode",),
        parse=int,
        default_text="64 on a CPU, 256 on a GPU",
        metavar="N",
        minimum=1,
    )
    enable_fused_qk_norm_rope: bool = flag(
        False,
        "In recorded decode steps, the projection to q, k and v with norms, rotation and the store "
        "of K and V as one call. The same tokens; on two cores 0 to 5 % slower than one by one.",
        group=DEVICE,
    )
    enable_torch_compile: bool = flag(
        False,
        "Let torch.compile make the kernels of norms, gates and rotations in steps of few rows. It "
        "needs a C++ compiler, and time at the first steps. On a CPU steps are not recorded then, "
        "which is slower.",
        group=DEVICE,
    )
    torch_compile_max_bs: int = flag(
        32,
        "Most rows of a step that --enable-torch-compile is for.",
        group=DEVICE,
        parse=int,
        metavar="N",
        minimum=1,
    )
    cpu_threads: int | None = flag(
        None,
        "Threads that compute the model on a CPU. Not in SGLang.",
        group=DEVICE,
        parse=int,
        default_text="one for each core that the process may use",
        metavar="N",
        minimum=1,
    )
    random_seed: int = flag(
        None,
        "Seed for requests that bring none.",
        group=DEVICE,
        parse=int,
        default_text="drawn at start",
        metavar="SEED",
        minimum=0,
    )

    # ---- memory and scheduling
    mem_fraction_static: float | None = flag(
        None,
        "On a CPU, share of the memory free after the weights are loaded that the KV pool may "
        "use; on a GPU, share of its memory for weights and KV pool together.",
        group=SCHEDULE,
        parse=float,
        default_text="0.7 on a CPU, on a GPU what activations and graphs leave",
        metavar="FRACTION",
        above=0,
        below=1,
    )
    max_total_tokens: int | None = flag(
        None,
        "Cap on the tokens of the KV pool (human-readable: 1M).",
        group=SCHEDULE,
        parse=parse_count,
        default_text="what the budget holds",
        metavar="TOKENS",
        minimum=1,
    )
    max_running_requests: int | None = flag(
        None,
        "Cap on the requests that run at once.",
        group=SCHEDULE,
        parse=int,
        default_text="from the capacity, as SGLang derives it",
        metavar="N",
        minimum=1,
    )
    max_queued_requests: int | None = flag(
        None,
        "Requests that may wait; above it a request is answered 503.",
        group=SCHEDULE,
        parse=int,
        default_text="no limit",
        metavar="N",
        minimum=1,
    )
    chunked_prefill_size: int = flag(
        None,
        "Most prompt tokens that one step computes; -1: prompts are not cut. A given size is "
        "kept; the default (SGLang's) shrinks to keep steps short.",
        group=SCHEDULE,
        parse=int,
        default_text="2048 on a CPU, 8192 on a GPU",
        metavar="TOKENS",
        minimum=1,
        also=(-1,),
    )
    max_prefill_tokens: int = flag(
        16384,
        "Most prompt tokens of one step when prompts are not cut (human-readable: 16k).",
        group=SCHEDULE,
        parse=parse_count,
        metavar="TOKENS",
        minimum=1,
    )
    page_size: int | None = flag(
        None,
        "Tokens in a page.",
        group=SCHEDULE,
        parse=int,
        default_text="what the attention backend prefers (64)",
        metavar="TOKENS",
        minimum=1,
    )
    schedule_policy: str = flag(
        "fcfs",
        "Order of the waiting requests: first come, or longest cached prefix.",
        group=SCHEDULE,
        choices=("fcfs", "lpm"),
    )
    disable_radix_cache: bool = flag(False, "Share no prefixes between requests.", group=SCHEDULE)
    radix_eviction_policy: str = flag(
        "lru",
        "Which cached prefix goes first: least recently or often used, oldest, least important.",
        group=SCHEDULE,
        choices=("lru", "lfu", "fifo", "priority"),
    )
    disable_overlap_schedule: bool = flag(False, "Start no step ahead of results.", group=SCHEDULE)

    kv_events_config: str | None = flag(
        None, "JSON: where to publish what the prefix cache holds.", group=SCHEDULE, metavar="JSON"
    )

    # ---- segmented KV memory
    kv_backing: str = flag(
        "auto",
        "Memory of the KV pool: static takes all at start, the others grow and shrink. auto: mmap "
        "on a CPU, cuda_vmm on a GPU.",
        group=SEGMENTS,
        choices=("auto", "static", "mmap", "cuda_vmm", "segment_table"),
    )
    kv_segment_size: int | None = flag(
        None,
        "Tokens in a segment, the unit in which memory comes and goes; rounded up as needed.",
        group=SEGMENTS,
        parse=parse_count_or_auto,
        default_text="auto: about 32 MiB on a CPU, at least 8192 tokens on a GPU",
        metavar="TOKENS|auto",
        minimum=1,
    )
    kv_memory_budget: int | None = flag(
        None,
        "Bytes (with units: 4GiB) that the KV pool may use; wins over --mem-fraction-static.",
        group=SEGMENTS,
        parse=parse_bytes,
        default_text="from --mem-fraction-static",
        metavar="BYTES",
        minimum=1,
    )
    kv_disk_path: str | None = flag(
        None,
        "Directory whose file system holds KV segments that memory has no room for (mmap backing).",
        group=SEGMENTS,
        default_text="no disk tier",
        metavar="DIRECTORY",
    )
    kv_disk_size: int | None = flag(
        None,
        "Bytes (with units: 200GiB) that KV segments may take on disk.",
        group=SEGMENTS,
        parse=parse_bytes,
        default_text="half of what is free there",
        metavar="BYTES",
        minimum=1,
    )
    enable_hierarchical_cache: bool = flag(
        False,
        "Keep KV segments that a GPU has no room for in pinned memory of the host (cuda_vmm).",
        group=SEGMENTS,
        aliases=("--enable-hicache",),
    )
    hicache_ratio: float = flag(
        2.0,
        "Host memory for KV segments as a multiple of the KV budget on the GPU.",
        group=SEGMENTS,
        parse=float,
        metavar="RATIO",
        above=0,
    )
    hicache_size: int = flag(
        0,
        "Host memory for KV segments in GB (10^9 bytes); 0: by --hicache-ratio.",
        group=SEGMENTS,
        parse=int,
        metavar="GB",
        minimum=0,
    )
    kv_segment_reserve: int = flag(
        None,
        "Empty segments that stay mapped when idle.",
        group=SEGMENTS,
        parse=int,
        default_text="0 on a CPU, 1 on a GPU",
        metavar="N",
        minimum=0,
    )
    kv_idle_release_seconds: float = flag(
        30.0,
        "Empty segments above the reserve are given back after so long.",
        group=SEGMENTS,
        parse=float,
        metavar="SECONDS",
        minimum=0,
    )
    prefix_cache_idle_seconds: float = flag(
        300.0,
        "Cached prefixes that nobody used for so long are dropped; -1: never.",
        group=SEGMENTS,
        parse=float,
        metavar="SECONDS",
        minimum=0,
        also=(-1,),
    )
    max_cached_tokens: int | None = flag(
        None,
        "Most tokens of unused prefixes that stay cached (human-readable: 1M).",
        group=SEGMENTS,
        parse=parse_count,
        default_text="no limit",
        metavar="TOKENS",
        minimum=0,
    )

    kv_canary: str = flag(
        "off",
        "Check before every step that each KV page was written by who reads it; full checks its "
        "bytes too. Slow, and without overlap: for finding bugs.",
        group=SEGMENTS,
        choices=("off", "chain", "full"),
    )

    # ---- logging and health
    log_level: str = flag(
        "info",
        "Least severe messages that are logged.",
        group=LOGGING,
        choices=("debug", "info", "warning", "error", "critical"),
    )
    log_level_http: str = flag(
        None,
        "The same for the HTTP server's own log.",
        group=LOGGING,
        choices=("debug", "info", "warning", "error", "critical"),
        default_text="--log-level",
    )
    decode_log_interval: int = flag(
        40, "Decode steps between log lines.", group=LOGGING, parse=int, metavar="STEPS", minimum=1
    )
    enable_metrics: bool = flag(False, "Serve Prometheus metrics on /metrics.", group=LOGGING)
    watchdog_timeout: float = flag(
        300.0,
        "The server ends itself when the scheduler makes no progress for so long.",
        group=LOGGING,
        parse=float,
        metavar="SECONDS",
        above=0,
    )

    # No flag: true when no --chunked-prefill-size is given: the scheduler may shrink chunks.
    chunk_adaptation: bool = derived()
    # No flag: true when --nnodes was given, so that it wins over torchrun's variables.
    has_nodes_given: bool = derived()

    def __post_init__(self) -> None:
        self._resolve()
        for spec in specs_of(ServerArgs):
            spec.check(getattr(self, spec.dest))
        check_combinations(self)

    def _resolve(self) -> None:
        """Fill in what other fields decide; the class is frozen to everyone else."""
        device: str | None = self.device
        if device is None:
            object.__setattr__(self, "device", detect_device())
        on_cpu = self.device == "cpu"
        defaults = {
            "chunk_adaptation": self.chunked_prefill_size is None,
            "has_nodes_given": self.nnodes is not None,
            "nnodes": 1,
            "chunked_prefill_size": 2048 if on_cpu else 8192,
            "cuda_graph_max_bs": 64 if on_cpu else 256,
            "mem_fraction_static": 0.7 if on_cpu else None,
            "tokenizer_path": self.model_path,
            "served_model_name": self.model_path,
            "attention_backend": "auto",
            "kv_segment_reserve": 0 if on_cpu or self.kv_backing == "static" else 1,
            "log_level_http": self.log_level,
            "random_seed": secrets.randbelow(1 << 30),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("dtype", "kv_cache_dtype", "attention_backend"):
            value = getattr(self, name)
            object.__setattr__(self, name, _OTHER_NAMES.get(value, value))

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> ServerArgs:
        """Build from Python keywords: SGLang's field names, text as a flag would take it.

        Raises ValueError for a bad value or a refused flag, TypeError for an unknown name. Logs
        a warning for each flag that is accepted without effect.
        """
        return cls(**flag_parser.values_from_kwargs(specs_of(cls), OTHER_FLAGS, kwargs))

    def request_byte_limit(self, context_length: int) -> int:
        """Largest request body in bytes, given the effective context in tokens."""
        if self.max_request_bytes is not None:
            return self.max_request_bytes
        return max(MIN_REQUEST_LIMIT, 16 * context_length + (1 << 20))

    def model_overrides(self) -> dict[str, Any]:
        """`json_model_override_args` as an object."""
        overrides: dict[str, Any] = json.loads(self.json_model_override_args)
        return overrides

    def public_dict(self) -> dict[str, Any]:
        """All settings by field name, without secrets: what /server_info may show."""
        return {k: v for k, v in dataclasses.asdict(self).items() if not k.endswith("api_key")}


def all_flags() -> tuple[FlagSpec, ...]:
    """Every flag that the command line knows, of all three kinds."""
    return (*specs_of(ServerArgs), *OTHER_FLAGS)


def prepare_server_args(argv: Sequence[str]) -> ServerArgs:
    """Read a command line (without the program's name).

    Logs a warning for each flag that is accepted without effect. A refused or unknown flag, a
    bad value or a bad combination prints one line and exits with status 2, --help with 0.
    """
    parser = flag_parser.build_parser(specs_of(ServerArgs), OTHER_FLAGS)
    values = flag_parser.parse_values(parser, OTHER_FLAGS, argv)
    try:
        return ServerArgs(**values)
    except ValueError as error:
        parser.error(str(error))
