"""A draft model beside the model: loaded, checked against it, and given its part of the memory.

Runs at start, for `scheduler_setup`; what makes batches for both models is here too. See
docs/speculative_decoding.md, Note [A draft model].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.registry import make_attention_backend
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler_device import make_recorder
from sglang.srt.managers.scheduler_pool_plan import kv_cache_spec
from sglang.srt.mem_cache.allocation import KVMemory, KVPlacement
from sglang.srt.mem_cache.block_table import BlockTableSnapshot
from sglang.srt.mem_cache.kv_layout import KVCacheSpec, KVHeads
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.draft_batch import DraftSide
from sglang.srt.model_executor.draft_head import DraftHead, HeadModel
from sglang.srt.model_executor.draft_model import Drafter, DraftModel
from sglang.srt.model_executor.forward_batch_info import (
    ForwardBatch,
    LayerStates,
    block_tables_of,
)
from sglang.srt.model_loader.loader import load_head, load_model
from sglang.srt.models.causal_lm import CausalLM
from sglang.srt.models.deepseek_nextn import DeepseekNextN
from sglang.srt.models.deepseek_v2 import DeepseekV2ForCausalLM
from sglang.srt.models.llama import LlamaForCausalLM, LlamaModel
from sglang.srt.models.llama_eagle import (
    LlamaForCausalLMEagle,
    LlamaForCausalLMEagle3,
)
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.device import DeviceRuntime
from sglang.srt.utils.progress import Progress

Tables = tuple[tuple[BlockTableSnapshot, ...], ...]
BatchMaker = Callable[[ScheduleBatch, KVPlacement], ForwardBatch]


@dataclass(frozen=True)
class LoadedDraft:
    """A draft model, or a head on the model's hidden states.

    Its layers keep K and V as `config` says; a step of it costs about `step_part` of one of the
    model's.
    """

    config: ModelConfig
    model: CausalLM | HeadModel
    step_part: float

    @property
    def reads_hidden(self) -> bool:
        return not isinstance(self.model, CausalLM)


@dataclass(frozen=True)
class ModelSides:
    """The pools of the model and of the draft model (None: there is none), over one memory."""

    own: MHATokenToKVPool
    draft: MHATokenToKVPool | None

    @classmethod
    def of(cls, memory: KVMemory, num_groups: int) -> ModelSides:
        """`num_groups` of the memory's groups are the model's, the others the draft model's."""
        every = range(memory.spec.num_groups)
        pool = memory.kv_pool
        draft = pool.part(every[num_groups:]) if len(every) > num_groups else None
        return cls(pool.part(every[:num_groups]), draft)


def load_draft(
    args: ServerArgs,
    config: ModelConfig,
    target: CausalLM,
    *,
    dtype: torch.dtype,
    parallel: ParallelState,
    device: torch.device,
    scales_kv: bool,
    show_progress: bool,
) -> LoadedDraft | None:
    """What drafts for `target`, the loaded model of `config`; None: no model or head does.

    It computes in the model's `dtype`. Other parameters as in `load_model`. Raises ValueError with
    one line when the two don't go together.
    """
    if args.speculative_algorithm in (None, "NGRAM"):
        return None
    quantization = args.speculative_draft_model_quantization or args.quantization
    load_format = args.speculative_draft_load_format or args.load_format
    common: dict[str, Any] = {
        "load_format": load_format,
        "dtype": dtype,
        "device": device,
        "show_progress": show_progress,
        "seed": args.random_seed,
        "quantization": quantization,
    }
    if args.speculative_algorithm != "STANDALONE":
        return _load_head(args, config, target, parallel, common)
    assert args.speculative_draft_model_path is not None
    draft = ModelConfig.from_path(args.speculative_draft_model_path)
    check_pair(config, draft)
    model = load_model(draft, parallel=parallel, scales_kv=scales_kv, **common)
    return LoadedDraft(draft, model, _part(draft, config))


def _load_head(
    args: ServerArgs,
    config: ModelConfig,
    target: CausalLM,
    parallel: ParallelState,
    common: dict[str, Any],
) -> LoadedDraft:
    """The head that drafts for `target`: its checkpoint's own, or one of another checkpoint."""
    flag, path = (
        f"--speculative-algorithm {args.speculative_algorithm}",
        args.speculative_draft_model_path,
    )
    dtype = common["dtype"]
    if path is None:
        check_next_token_layer(flag, config)
        assert isinstance(target, DeepseekV2ForCausalLM)
        wanted = DeepseekNextN.wanted_of(config)
        nextn = load_head(
            lambda: DeepseekNextN(config, parallel, dtype, target), config, wanted, **common
        )
        one = _of_one_layer(config)
        return LoadedDraft(one, nextn, _part(one, config))
    is_llama = isinstance(target, LlamaForCausalLM) and type(target.model) is LlamaModel
    if not isinstance(target, LlamaForCausalLM) or not is_llama or config.latent is not None:
        raise ValueError(f"{flag}: heads draft for Llama and models computed like it")
    # Heads name themselves in several ways; what they are the algorithm says.
    draft = ModelConfig.from_path(path, overrides={"architectures": ["LlamaForCausalLM"]})
    check_pair(config, draft)
    kind: type[LlamaForCausalLMEagle | LlamaForCausalLMEagle3] = LlamaForCausalLMEagle3
    if args.speculative_algorithm != "EAGLE3":
        kind = LlamaForCausalLMEagle
        if "draft_vocab_size" in draft.raw:
            raise ValueError(
                f"{flag}: {path} is a head of EAGLE-3, for --speculative-algorithm EAGLE3"
            )
    eagle = load_head(lambda: kind(draft, parallel, dtype, target), draft, None, **common)
    return LoadedDraft(draft, eagle, _part(draft, config))


def check_next_token_layer(flag: str, config: ModelConfig) -> None:
    """Raise ValueError unless the model of `config` brings a head that drafts for it."""
    if not config.num_draft_layers or config.is_gguf:
        raise ValueError(
            f"{flag}: {config.path} has no layer of multi-token prediction; name a head by "
            "--speculative-draft-model-path"
        )
    if config.latent is None or config.index is not None:
        raise ValueError(
            f"{flag}: the layer of multi-token prediction of {config.architecture} is not served; "
            "DeepSeek-V3's is"
        )


def check_pair(config: ModelConfig, draft: ModelConfig) -> None:
    """Raise ValueError unless the model of `draft` can draft for the one of `config`."""
    flag = f"--speculative-draft-model-path {draft.path}"
    if config.encoder is not None or draft.encoder is not None:
        raise ValueError(f"{flag}: an encoder generates nothing")
    if draft.vocab_size != config.vocab_size:
        raise ValueError(
            f"{flag}: the draft model has {draft.vocab_size} tokens, the model has "
            f"{config.vocab_size}; both must have one vocabulary"
        )
    if any(draft.layer_windows) or any(draft.layer_chunks):
        raise ValueError(f"{flag}: a draft model whose layers forget tokens is not served")
    if draft.linear is not None or draft.index is not None:
        kept = "recurrent states" if draft.index is None else "index keys"
        raise ValueError(f"{flag}: a draft model that keeps {kept} is not served")
    if (draft.latent is None) != (config.latent is None):
        raise ValueError(f"{flag}: latent attention and other attention share no KV memory")


def with_draft(
    spec: KVCacheSpec, draft: LoadedDraft | None, parallel: ParallelState
) -> KVCacheSpec:
    """The model's cache with the draft model's layers behind, in groups of their own."""
    if draft is None:
        return spec
    other = kv_cache_spec(draft.config, parallel, spec.dtype, spec.page_size)
    heads = KVHeads(other.kv_heads, other.head_dim, other.v_head_dim)
    groups = tuple(
        replace(group, layers=tuple(layer + spec.num_layers for layer in group.layers), heads=heads)
        for group in other.groups
    )
    return replace(spec, groups=spec.groups + groups)


def make_drafter(
    args: ServerArgs, draft: LoadedDraft | None, side: DraftSide | None, runtime: DeviceRuntime
) -> Drafter | None:
    """Who drafts; None: no model does. Side effect: on a device its steps are recorded."""
    if draft is None or side is None:
        return None
    if not isinstance(draft.model, CausalLM):
        return DraftHead(draft.model, runtime)
    recorder = make_recorder(args, draft.model, side.backend, runtime, side.pool)
    return DraftModel(draft.model, runtime, recorder)


def make_side(
    draft: LoadedDraft | None,
    backend_class: type[AttentionBackend],
    sides: ModelSides,
    progress: Progress,
) -> DraftSide | None:
    """What the draft model's batches are made with; None: there is none."""
    pool = sides.draft
    if draft is None or pool is None:
        return None
    backend = make_attention_backend(backend_class, pool)
    first_group = sides.own.spec.num_groups
    layers = () if isinstance(draft.model, CausalLM) else draft.model.state_layers
    return DraftSide(
        pool, backend, first_group, pool.page_size, progress, draft.reads_hidden, layers
    )


def batch_maker(
    sides: ModelSides, backend: AttentionBackend, side: DraftSide | None, progress: Progress
) -> BatchMaker:
    """What turns a step that the scheduler decided into one that can be computed."""
    pool = sides.own
    num_groups, share = pool.spec.num_groups, pool.share

    def make(batch: ScheduleBatch, placement: KVPlacement) -> ForwardBatch:
        tables = None if side is None else block_tables_of(batch, placement)
        slots = enumerate(placement.out_cache_loc[:num_groups])
        own = replace(
            placement,
            out_cache_loc=tuple(share.write_slots(group, loc) for group, loc in slots),
            tables=placement.tables if tables is None else partial(_first, tables, num_groups),
        )
        made = ForwardBatch.from_schedule_batch(
            batch,
            own,
            pool=pool,
            backend=backend,
            page_size=pool.page_size,
            progress=progress,
            all_rows=side is not None and side.reads_hidden,
        )
        if side is None or tables is None:
            return made
        states = LayerStates(side.state_layers) if side.state_layers else None
        return replace(made, drafting=side.plan(batch, tables[num_groups:]), layer_states=states)

    return make


def _first(tables: Tables, count: int) -> Tables:
    return tables[:count]


def _of_one_layer(config: ModelConfig) -> ModelConfig:
    """What K and V a layer behind the model's last one keeps."""
    return replace(
        config, num_layers=1, layer_windows=(None,), layer_chunks=(None,), layer_rope=(True,)
    )


def _part(draft: ModelConfig, config: ModelConfig) -> float:
    return min(1.0, _weights_of(draft) / _weights_of(config))


def _weights_of(config: ModelConfig) -> int:
    """About how many weights a step of one token reads."""
    heads = config.num_heads * config.head_dim + config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + 3 * config.intermediate_size)
    return config.num_layers * layer + config.vocab_size * config.hidden_size
