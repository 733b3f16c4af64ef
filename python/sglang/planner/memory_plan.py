"""What one model needs on `tp_size` equal devices, and what it can hold there. No effects.

The arithmetic is the engine's own: the model's parameters are those that it would make (built
without memory, on torch's meta device), KV groups come from `kv_cache_spec`, segments from
`make_segment_layouts`, the context from `effective_context_length`. Here they are put side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from sglang.planner.machines import Device
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.moe import Experts
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.layers.weights import WeightOwner
from sglang.srt.managers.scheduler_pool_plan import kv_cache_spec
from sglang.srt.mem_cache.capacity import (
    effective_context_length,
    request_segments,
    tokens_kept,
)
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    GroupKind,
    KVCacheSpec,
    SegmentLayout,
)
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)
from sglang.srt.model_executor.lora_places import make_places
from sglang.srt.model_loader.weight_forms import kept_bits
from sglang.srt.models.causal_lm import CausalLM
from sglang.srt.models.llama4_vision import VisionTower
from sglang.srt.models.registry import resolve_model_class

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GPU_GRANULE_BYTES = 2 << 20  # what CUDA recommends on data-centre parts
_GPU_SEGMENT_TOKENS = 8192
_CPU_SEGMENT_BYTES = 32 << 20
_DENSE_ROWS = 2048  # requests of a dense request-to-token table
_DENSE_ENTRY_BYTES = 4
_STATES_BETWEEN_STEPS = 2  # of a request: the newest, and the one at the last page border
_TP_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Weights:
    """Of one rank: all parameters, and those that one token of text multiplies with (embedding row,
    experts that it does not choose and the vision tower left out). Of both, those that stay
    quantised in `code_bits` bits, scales included. Places of adapters are bytes of their own."""

    num_params: int
    num_active: int
    bytes_per_param: int
    num_coded: int = 0
    active_coded: int = 0
    code_bits: float = 0.0
    num_vision: int = 0
    adapter_bytes: int = 0

    @property
    def all_bytes(self) -> int:
        return self._bytes(self.num_params, self.num_coded) + self.adapter_bytes

    @property
    def active_bytes(self) -> int:
        return self._bytes(self.num_active, self.active_coded)

    def _bytes(self, params: int, coded: int) -> int:
        return (params - coded) * self.bytes_per_param + int(coded * self.code_bits / 8)


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One layer group of one rank. `kept_tokens` are held at the full context by one request
    between two steps, `peak_tokens` in a full prefill chunk; `span` is its window, None: all.

    Of a group of states `state_bytes` is one, all of a request's layers together; its tokens are
    shares of states."""

    kind: str
    num_layers: int
    span: int | None
    bytes_per_token: int
    kept_tokens: int
    peak_tokens: int
    segment_tokens: int
    num_segments: int
    segment_bytes: int
    state_bytes: int = 0

    @property
    def kept_bytes(self) -> int:
        return self.kept_tokens * self.bytes_per_token


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The whole answer for one rank of `tp_size`; bytes unless the name says otherwise.

    `kv_bytes` is held by one request of `context_length` between two steps; `needed_bytes` is what
    the pool maps for it at its peak, whole segments and the reserve included. `capacity_tokens` is
    the longest request that the budget holds. Seconds are None without the device's rate.
    """

    device: Device
    tp_size: int
    context_length: int
    kv_dtype: str
    weights: Weights
    budget_bytes: int
    bytes_per_token_all_layers: int
    groups: tuple[GroupPlan, ...]
    kv_bytes: int
    needed_bytes: int
    capacity_tokens: int
    dense_table_bytes: int
    prefill_flops: float
    prefill_s: float | None
    decode_s: float | None

    @property
    def fits(self) -> bool:
        return self.capacity_tokens >= self.context_length


@dataclass(frozen=True, slots=True)
class AdapterRoom:
    """LoRA adapters that batches may mix: places, their rank, and the modules that they change by
    their last words, `all` for every linear layer."""

    num_places: int
    rank: int
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """What is planned for. `kv_dtype` is a key of `DTYPE_BYTES`; `mem_fraction` of the device's
    memory is for weights and KV; `prefill_chunk` in tokens; `adapters` None: none are served."""

    config: ModelConfig
    device: Device
    tp_size: int
    context_length: int
    kv_dtype: str
    dtype: str
    mem_fraction: float = 0.9
    page_size: int = 64
    prefill_chunk: int = 8192
    adapters: AdapterRoom | None = None


def make_plan(question: Question) -> MemoryPlan:
    """Answer a question.

    Raises ValueError when heads or widths can't be divided over the ranks, and for modules of
    adapters that the model lacks.
    """
    ask = question
    parallel = ParallelState(0, ask.tp_size)
    weights = count_weights(ask.config, parallel, ask.dtype, ask.adapters)
    spec = kv_cache_spec(ask.config, parallel, ask.kv_dtype, ask.page_size)
    usable = int(ask.device.memory_bytes * ask.mem_fraction)
    budget = max(0, usable - weights.all_bytes)
    reserve = 0 if ask.device.is_cpu else 1
    layouts = _layouts(spec, ask.device, budget)
    clamp = effective_context_length(
        spec,
        layouts,
        budget_bytes=budget,
        reserve_segments=reserve,
        requested=ask.context_length,
        prefill_chunk=ask.prefill_chunk,
    )
    groups = _groups(spec, layouts, ask.context_length, ask.prefill_chunk)
    kv_bytes = sum(group.kept_bytes for group in groups)
    flops = prefill_flops(ask.config, weights, ask.context_length, ask.tp_size)
    read = kv_bytes if ask.config.index is None else sparse_read_bytes(spec, ask)
    rate, bandwidth = ask.device.flops_per_s, ask.device.bytes_per_s
    return MemoryPlan(
        device=ask.device,
        tp_size=ask.tp_size,
        context_length=ask.context_length,
        kv_dtype=ask.kv_dtype,
        weights=weights,
        budget_bytes=budget,
        bytes_per_token_all_layers=spec.bytes_per_token * _kv_ranks(ask.config, ask.tp_size),
        groups=groups,
        kv_bytes=kv_bytes,
        needed_bytes=sum((group.num_segments + reserve) * group.segment_bytes for group in groups),
        capacity_tokens=clamp.capacity_tokens,
        dense_table_bytes=_DENSE_ROWS * ask.context_length * _DENSE_ENTRY_BYTES,
        prefill_flops=flops,
        prefill_s=None if rate is None else flops / rate,
        decode_s=None if bandwidth is None else (weights.active_bytes + read) / bandwidth,
    )


def sparse_read_bytes(spec: KVCacheSpec, ask: Question) -> int:
    """What a rank's decode step reads of the whole context: index keys, and the chosen latents."""
    assert ask.config.index is not None
    chosen = min(ask.config.index.topk, ask.context_length)
    index = len(spec.index_layers) * spec.index_bytes_per_slot_layer
    return index * ask.context_length + (spec.bytes_per_token - index) * chosen


def count_weights(
    config: ModelConfig, parallel: ParallelState, dtype: str, adapters: AdapterRoom | None = None
) -> Weights:
    """Parameters of one rank, counted on the model itself, which is built without memory.

    So are the places of `adapters`, None: none. A vision tower counts where `config` has one.

    A quantised checkpoint's codes are kept: those of MXFP4 are experts, those of other methods
    all matrices but embedding, head and routers; a file may have fewer. What a GGUF file
    keeps stands in its tensors and is counted as numbers.
    """
    with torch.device("meta"):
        model = resolve_model_class(config.architecture)(config, parallel, _DTYPES[dtype])
    scheme = config.weight_scheme
    bits = None if scheme is None else kept_bits(scheme)
    total = sum(parameter.numel() for parameter in model.parameters())
    vision = sum(_num_params(m) for m in model.modules() if isinstance(m, VisionTower))
    idle, coded, idle_coded = vision, 0, 0
    for module in model.modules():
        in_code = 0
        if bits is not None and scheme is not None and _is_coded(module, scheme.method):
            named = module.named_parameters()
            in_code = sum(one.numel() for name, one in named if not name.endswith("bias"))
        coded += in_code
        if isinstance(module, Experts) and config.moe is not None:
            share = 1 - config.moe.experts_per_token / config.moe.num_experts
            idle += int(_num_params(module) * share)
            idle_coded += int(in_code * share)
        elif isinstance(module, VocabParallelEmbedding) and not config.tie_word_embeddings:
            idle += _num_params(module)
    size = _DTYPES[dtype].itemsize
    places = 0 if adapters is None else _adapter_bytes(model, adapters)
    active_coded = coded - idle_coded
    return Weights(total, total - idle, size, coded, active_coded, bits or 0.0, vision, places)


def _adapter_bytes(model: CausalLM, room: AdapterRoom) -> int:
    """Bytes of the places that the engine would make in the linear layers of `model`."""
    sites = model.adapter_sites()
    with torch.device("meta"):
        places = make_places(
            sites,
            (),
            num_places=room.num_places,
            rank=room.rank,
            targets=room.targets,
            own_factors=model.own_factors,
        )
    return places.nbytes


def _is_coded(module: nn.Module, method: str) -> bool:
    if isinstance(module, Experts):
        return True
    is_table = isinstance(module, (VocabParallelEmbedding, ParallelLMHead))
    return isinstance(module, WeightOwner) and not is_table and method != "mxfp4"


def prefill_flops(
    config: ModelConfig, weights: Weights, context_length: int, tp_size: int
) -> float:
    """Floating point operations of one rank for a prompt of `context_length` tokens.

    Two per parameter and token, the output head's left out, which one row wants; and four per head
    dimension, query head and visible key: all keys before it for a query of a global layer, its
    window or chunk elsewhere, so many as are chosen where an indexer chooses. That takes two per
    number, index head and key before the query, on every rank, once there are more to choose from.
    Of linear attention six for each number of a state: it fades, is read for the key and for the
    query, and is written.
    """
    n = context_length
    keys = 0.0
    linear = config.linear
    stateful = frozenset[int]() if linear is None else linear.layers
    spans = zip(config.layer_windows, config.layer_chunks, strict=True)
    for layer, (window, chunk) in enumerate(spans):
        if layer in stateful:
            continue
        if chunk is not None:
            whole, rest = divmod(n, chunk)
            keys += whole * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2
        elif window is not None:
            w = min(window, n)
            keys += w * (w + 1) / 2 + (n - w) * w
        else:
            k = n if config.index is None else min(config.index.topk, n)
            keys += k * (k + 1) / 2 + (n - k) * k
    per_key = 2 * config.num_heads * (config.head_dim + config.v_head_dim)
    head = config.vocab_size * config.hidden_size // tp_size
    states = 0
    if linear is not None:
        states = len(stateful) * linear.value_heads * linear.key_dim * linear.value_dim
    scoring = 0.0
    if config.index is not None and n > config.index.topk:
        k, index = config.index.topk, config.index
        scored = (n * (n + 1) - k * (k + 1)) / 2
        scoring = 2.0 * index.num_heads * index.head_dim * scored * len(index.layers)
    own = per_key * keys + 6.0 * states * n
    return 2.0 * (weights.num_active - head) * n + own / tp_size + scoring


@dataclass(frozen=True, slots=True)
class Remedies:
    """What would make it fit, each None when it would not help (or no tried one does).

    `fp8_capacity_tokens` is the longest request with KV in fp8 on the same devices;
    `device_memory_bytes` what each device would have to have.
    """

    capacity_tokens: int
    tp_size: int | None
    fp8_capacity_tokens: int | None
    device_memory_bytes: int


def find_remedies(question: Question, plan: MemoryPlan) -> Remedies:
    """Look for a smaller context, more devices, KV in fp8 and larger devices."""
    fp8 = None
    if not question.kv_dtype.startswith("fp8"):
        fp8 = make_plan(replace(question, kv_dtype="fp8_e4m3")).capacity_tokens
    tp_size = next(
        (size for size, other in _larger_plans(question) if size > plan.tp_size and other.fits),
        None,
    )
    needed = plan.weights.all_bytes + plan.needed_bytes
    return Remedies(
        capacity_tokens=plan.capacity_tokens,
        tp_size=tp_size,
        fp8_capacity_tokens=fp8,
        device_memory_bytes=int(needed / question.mem_fraction) + 1,
    )


def _larger_plans(question: Question) -> Iterator[tuple[int, MemoryPlan]]:
    for size in _TP_SIZES:
        try:
            yield size, make_plan(replace(question, tp_size=size))
        except ValueError:
            continue  # the model can't be divided so


def _kv_ranks(config: ModelConfig, tp_size: int) -> int:
    """Ranks that hold different kv heads: with more ranks than heads, heads are repeated."""
    return min(tp_size, config.num_kv_heads)


def _layouts(spec: KVCacheSpec, device: Device, budget: int) -> tuple[SegmentLayout, ...]:
    return make_segment_layouts(
        spec,
        slots_per_segment=None,
        auto_segment_bytes=_CPU_SEGMENT_BYTES,
        auto_min_slots=1 if device.is_cpu else _GPU_SEGMENT_TOKENS,
        granule_bytes=4096 if device.is_cpu else _GPU_GRANULE_BYTES,
        machine_bytes=max(device.memory_bytes, 1),
        budget_bytes=budget,
    )


def _groups(
    spec: KVCacheSpec,
    layouts: tuple[SegmentLayout, ...],
    context_length: int,
    prefill_chunk: int,
) -> tuple[GroupPlan, ...]:
    segments = request_segments(spec, layouts, context_length, prefill_chunk)
    groups = []
    for number, (group, layout) in enumerate(zip(spec.groups, layouts, strict=True)):
        span = None if group.kind is GroupKind.FULL else group.window
        if group.kind is GroupKind.STATE:
            span = _STATES_BETWEEN_STEPS * spec.page_size
        groups.append(
            GroupPlan(
                kind=group.kind.value,
                num_layers=len(group.layers),
                span=span,
                bytes_per_token=spec.bytes_per_slot(GroupId(number)),
                kept_tokens=context_length if span is None else min(context_length, span),
                peak_tokens=tokens_kept(group, context_length, prefill_chunk, spec.page_size),
                segment_tokens=layout.slots_per_segment,
                num_segments=segments[number],
                segment_bytes=layout.segment_bytes,
                state_bytes=group.state_bytes,
            )
        )
    return tuple(groups)


def _num_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
