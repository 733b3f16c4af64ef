"""Builds a model and fills it: `load_model`, and `load_head` for layers that draft for one.

Called by the worker at start. It decides which files hold the weights, shows progress on
standard error, and leaves a frozen model. Each tensor goes straight into its (possibly sharded)
parameter, so the host never holds the model twice.
"""

from __future__ import annotations

import sys
import threading
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.pooling_config import PoolingConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.expert_weights import ExpertWeights
from sglang.srt.layers.quantization.choice import choose_quantization
from sglang.srt.layers.quantization.rounding import rounding_to
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.layers.weights import LoadedWeight, WeightOwner, give_memory
from sglang.srt.model_loader.gguf_weights import gguf_weights
from sglang.srt.model_loader.huge_pages import move_to_huge_pages, quantized_matrices
from sglang.srt.model_loader.kv_scales import CheckpointScales, read_scale_file, set_kv_scales
from sglang.srt.model_loader.quantized_weights import quantized_weights
from sglang.srt.model_loader.weight_files import (
    Wanted,
    WeightIterator,
    WeightSource,
    find_pt_files,
    find_safetensors,
    pt_weights,
    safetensors_weights,
)
from sglang.srt.models.bert import BertModel
from sglang.srt.models.causal_lm import CausalLM, LoadedModel
from sglang.srt.models.pooled import PooledDecoder
from sglang.srt.models.registry import resolve_model_class
from sglang.srt.utils.native import codes_kernels

Head = TypeVar("Head", bound=LoadedModel)

LOAD_FORMATS = ("auto", "safetensors", "pt", "gguf", "dummy")
_DUMMY_STD = 0.02


def load_model(
    config: ModelConfig,
    *,
    load_format: str = "auto",
    dtype: torch.dtype,
    parallel: ParallelState,
    device: str | torch.device = "cpu",
    show_progress: bool = True,
    seed: int = 0,
    quantization: str | None = None,
    scales_kv: bool = False,
    kv_scale_path: str | None = None,
    pooling: PoolingConfig | None = None,
) -> CausalLM:
    """The model of `config` with weights in `dtype` on `device`, in eval mode, without gradients.

    `load_format` is one of `LOAD_FORMATS`; `auto` takes GGUF for a .gguf file, else safetensors,
    else files of torch.save. `dummy` needs no weight files: random values that depend on `seed`
    alone. `quantization` is a name that `choose_quantization` knows, None its choice. `scales_kv`:
    layers get the scales of an fp8 KV cache, those of the file `kv_scale_path`, else the
    checkpoint's. `pooling` (None: the model generates) gives a `PooledModel`. Raises ValueError,
    one line, for a wrong format, missing files, damaged files, missing or unexpected weights,
    scales that don't fit, and a quantisation that can't be had.
    """
    plan = _LoadPlan.of(config, load_format, dtype, quantization, device)
    with torch.device(device):
        if pooling is not None:
            kind = PooledDecoder if config.encoder is None else BertModel
            model: CausalLM = kind(config, parallel, dtype, pooling)
        else:
            model = resolve_model_class(config.architecture)(config, parallel, dtype)
    scales = CheckpointScales(wanted=scales_kv and kv_scale_path is None)
    plan.fill(model, scales, seed=seed, show_progress=show_progress)
    if scales_kv and kv_scale_path is not None:
        place = (config.num_layers, parallel.tp_rank, parallel.tp_size)
        set_kv_scales(model, read_scale_file(kv_scale_path, *place))
    elif scales_kv:
        set_kv_scales(model, scales.scales())
    return model.requires_grad_(False).eval()


def load_head(
    make: Callable[[], Head],
    config: ModelConfig,
    wanted: Wanted | None,
    *,
    load_format: str,
    dtype: torch.dtype,
    device: str | torch.device,
    show_progress: bool,
    seed: int,
    quantization: str | None,
) -> Head:
    """What `make` makes, with the weights of `config`'s checkpoint that are `wanted` by name.

    None: all of them. The K and V of its layers have no scales. Other parameters and errors as of
    `load_model`.
    """
    plan = _LoadPlan.of(config, load_format, dtype, quantization, device, wanted)
    with torch.device(device):
        model = make()
    plan.fill(model, CheckpointScales(wanted=False), seed=seed, show_progress=show_progress)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True, slots=True)
class _LoadPlan:
    """How weights stay (`kept`, as `choose_quantization` says), and where they come from.

    `rounds`: they are rounded here, from numbers. `rounds_inputs`: FP8 products round theirs.
    `source` None: they are random.
    """

    kept: str
    kernels: ModuleType | None
    rounds: bool
    rounds_inputs: bool
    source: WeightSource | None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        load_format: str,
        dtype: torch.dtype,
        quantization: str | None,
        device: str | torch.device,
        wanted: Wanted | None = None,
    ) -> _LoadPlan:
        """Find the files. Errors as of `load_model`."""
        scheme = config.weight_scheme
        kept = choose_quantization(
            quantization,
            is_gguf=config.is_gguf,
            method=None if scheme is None else scheme.method,
            device=device,
        )
        if load_format not in LOAD_FORMATS:
            raise ValueError(
                f"unknown load format {load_format!r}; one of {', '.join(LOAD_FORMATS)}"
            )
        kernels = None if kept == "none" else codes_kernels(device)
        rounds = kept == "int8" or (kept == "fp8" and scheme is None)
        # Asked for by name: what the checkpoint says of inputs holds as well.
        rounds_inputs = quantization is not None and scheme is not None and scheme.rounds_inputs
        source = None
        if load_format != "dummy":
            source = open_weights(config, load_format, dtype, None if rounds else kernels, wanted)
        return cls(kept, kernels, rounds, rounds_inputs, source)

    def fill(
        self, model: LoadedModel, scales: CheckpointScales, *, seed: int, show_progress: bool
    ) -> None:
        """Load or draw the weights of a model; `scales` takes up those of its KV cache."""
        kernels = self.kernels
        if self.kept == "none":
            move_to_huge_pages(model, copy=False)
        with torch.no_grad():
            if self.source is None:
                fill_with_dummy_weights(model, seed)
            else:
                weights = scales.without_scales(self.source.weights)
                if self.rounds and kernels is not None:
                    weights = _rounded_on_the_way(weights, model, self.kept, kernels)
                _load(model, WeightSource(weights, self.source.num_weights), show_progress)
            if self.rounds and kernels is not None:
                for module in _rounded_layers(model, self.kept):
                    module.quantize(rounding_to(self.kept, kernels))
            if self.kept != "none":
                move_to_huge_pages(model, copy=True)
        if self.rounds_inputs:
            for matrix in quantized_matrices(model):
                matrix.round_fp8_inputs()


def open_weights(
    config: ModelConfig,
    load_format: str,
    dtype: torch.dtype,
    kernels: ModuleType | None = None,
    wanted: Wanted | None = None,
) -> WeightSource:
    """Find the files that `load_format` (not `dummy`) means; see `load_model` for errors.

    `kernels`, the package sgl_kernel: matrices that are quantised in the files keep their codes
    for it. `wanted` says by name which tensors of a directory are read (None: the model's).
    """
    if config.is_gguf != (load_format == "gguf") and load_format != "auto":
        kind = "a GGUF file" if config.is_gguf else "a Hugging Face directory"
        raise ValueError(f"{config.path} is {kind}; --load-format {load_format} can't read it")
    if config.is_gguf:
        return gguf_weights(config, dtype, kernels)
    folder = Path(config.path)
    if load_format in ("auto", "safetensors"):
        files = find_safetensors(folder)
        if files and config.weight_scheme is not None:
            return quantized_weights(config, files, dtype, kernels, wanted)
        if files:
            return safetensors_weights(files, wanted)
    if load_format in ("auto", "pt"):
        files = find_pt_files(folder)
        if files and config.weight_scheme is not None:
            raise ValueError(f"{folder}: quantised weights are read from safetensors files only")
        if files:
            return pt_weights(files, wanted)
    names = {"safetensors": "safetensors", "pt": ".bin or .pt"}
    what = names.get(load_format, "safetensors, .bin or .pt")
    raise ValueError(f"{folder}: no {what} files with weights")


def fill_with_dummy_weights(model: nn.Module, seed: int) -> None:
    """Random parameters: norms are 1, biases 0, the rest normal with deviation 0.02.

    Each parameter's values depend on `seed` and its name alone.
    """
    for name, parameter in model.named_parameters():
        give_memory(parameter)
        if parameter.dim() == 1:
            parameter.data.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        generator = torch.Generator(device=parameter.device)
        generator.manual_seed(zlib.crc32(name.encode()) ^ (seed & 0xFFFF_FFFF))
        parameter.data.normal_(0.0, _DUMMY_STD, generator=generator)


def _load(model: LoadedModel, source: WeightSource, show_progress: bool) -> None:
    if not show_progress:
        model.load_weights(source.weights)
        return
    # The bar's default lock is a named semaphore between processes, which a terminated process
    # leaves behind; one process draws this bar.
    tqdm.set_lock(threading.RLock())
    with tqdm(
        total=source.num_weights,
        desc="Loading weights",
        unit=" tensors",
        file=sys.stderr,
        dynamic_ncols=True,
    ) as bar:
        model.load_weights(_counted(source, bar.update))


def _rounded_layers(model: nn.Module, kept: str) -> list[WeightOwner | ExpertWeights]:
    """Those that `kept` ("int8" or "fp8") rounds: embedding and head only to bytes.

    A byte of theirs has a scale for each 32 inputs, an FP8 one for all of a token's.
    """
    found: list[WeightOwner | ExpertWeights] = []
    for module in model.modules():
        is_table = isinstance(module, VocabParallelEmbedding | ParallelLMHead)
        if isinstance(module, WeightOwner | ExpertWeights) and not (is_table and kept == "fp8"):
            found.append(module)
    return found


def _rounded_on_the_way(
    weights: Iterable[tuple[str, LoadedWeight]], model: nn.Module, kept: str, kernels: ModuleType
) -> WeightIterator:
    """The same `weights`. Side effect: layers are rounded once their weights have come.

    So a model never is in memory as numbers.
    """
    rounding = rounding_to(kept, kernels)
    waiting = _rounded_layers(model, kept)
    for pair in weights:
        yield pair
        for module in [module for module in waiting if module.is_loaded]:
            module.quantize(rounding)
            waiting.remove(module)


def _counted(source: WeightSource, count: Callable[[], object]) -> WeightIterator:
    for pair in source.weights:
        yield pair
        count()
