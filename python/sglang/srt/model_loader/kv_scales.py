"""Scales of K and V of fp8: read from a checkpoint or a JSON file, given to the attention layers.

One number for all K and one for all V of a layer: stored is x / scale, read is that times scale.
Checkpoints have them as tensors of one element beside the layer's weights, under names that differ
by who wrote them. The loader takes them out of the stream of weights, so models need not know.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.weights import LoadedWeight
from sglang.srt.model_loader.weight_files import WeightIterator

logger = logging.getLogger(__name__)

# `kv_scale` is one number for both. Scales of queries and of softmax weights are for attention that
# computes in fp8, which ours does not.
_NAME = re.compile(
    r"(?:language_model\.)?model\.(?:language_model\.)?layers\.(\d+)\.self_attn\."
    r"(?:attn\.|[qkv]_proj\.|qkv_proj\.)?(k_scale|v_scale|kv_scale|q_scale|prob_scale)"
)
_UNUSED = ("q_scale", "prob_scale")
_FILE_DTYPE = "float8_e4m3fn"

Scales = dict[int, tuple[float, float]]
"""(scale of K, scale of V) of each layer that has them."""


class CheckpointScales:
    """What a checkpoint says, layer by layer, once `without_scales` has been walked.

    Not `wanted`, they are taken out of the weights all the same, whatever their shape.
    """

    def __init__(self, *, wanted: bool = True) -> None:
        self._wanted = wanted
        self._found: dict[int, dict[str, float]] = {}

    def without_scales(self, weights: Iterable[tuple[str, LoadedWeight]]) -> WeightIterator:
        """All other weights. Raises ValueError for a scale that is no positive number."""
        for name, tensor in weights:
            match = _NAME.fullmatch(name)
            if match is None:
                yield name, tensor
            elif self._wanted and match[2] not in _UNUSED:
                layer = self._found.setdefault(int(match[1]), {})
                if match[2] in layer:
                    raise ValueError(f"weight {name}: layer {match[1]} has two scales of this kind")
                layer[match[2]] = _scale_of(name, tensor)

    def scales(self) -> Scales:
        """Raises ValueError where a layer has a scale for K or for V alone."""
        made: Scales = {}
        for layer, found in self._found.items():
            both = found.get("kv_scale")
            k_scale, v_scale = found.get("k_scale", both), found.get("v_scale", both)
            if k_scale is None or v_scale is None:
                raise ValueError(f"layer {layer} has a {next(iter(found))} and no other of the two")
            made[layer] = (k_scale, v_scale)
        return made


def read_scale_file(path: str, num_layers: int, tp_rank: int, tp_size: int) -> Scales:
    """The scales of a rank in the JSON file that --quantization-param-path names.

    {"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {rank: {layer: scale}}}}, ranks and
    layers as strings; a scale is for K and V. Raises ValueError, one line, for a file that is not
    so or was made for other ranks or layers.
    """
    flag = f"--quantization-param-path {path}"
    try:
        content = json.loads(Path(path).read_bytes())
        kv_cache = content["kv_cache"]
        dtype, ranks = kv_cache["dtype"], dict(kv_cache["scaling_factor"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{flag}: no file with scales of a KV cache: {error!r}") from error
    if dtype != _FILE_DTYPE:
        raise ValueError(f"{flag}: scales are for {dtype!r}, {_FILE_DTYPE!r} is served")
    if set(ranks) != {str(rank) for rank in range(tp_size)}:
        raise ValueError(f"{flag}: scales of ranks {sorted(ranks)}, --tp-size is {tp_size}")
    layers = ranks[str(tp_rank)]
    wanted = {str(layer) for layer in range(num_layers)}
    if not isinstance(layers, dict) or set(layers) != wanted:
        raise ValueError(f"{flag}: rank {tp_rank} needs scales of layers 0 to {num_layers - 1}")
    numbers = {int(layer): _checked(flag, value) for layer, value in layers.items()}
    return {layer: (scale, scale) for layer, scale in numbers.items()}


def set_kv_scales(model: nn.Module, scales: Scales) -> None:
    """Give every attention layer its scales; without any, K and V are rounded as they are.

    Raises ValueError when some layers have scales and others none. Side effect: says once in the
    log what fp8 is scaled by.
    """
    layers = {one.layer_id: one for one in model.modules() if isinstance(one, RadixAttention)}
    if not scales:
        logger.warning(
            "The KV cache of fp8 is not scaled: the checkpoint has no k_scale and v_scale, and no "
            "--quantization-param-path is given. What is beyond fp8's largest number is cut off."
        )
        return
    missing = sorted(layers.keys() - scales.keys())
    unknown = sorted(scales.keys() - layers.keys())
    if missing or unknown:
        what = f"layers {missing} have none" if missing else f"there are no layers {unknown}"
        raise ValueError(f"scales of the KV cache: {what}")
    for number, layer in layers.items():
        layer.set_kv_scales(*scales[number])
    every = [scale for pair in scales.values() for scale in pair]
    logger.info("The KV cache is scaled by %g to %g.", min(every), max(every))


def _scale_of(name: str, tensor: LoadedWeight) -> float:
    if not isinstance(tensor, torch.Tensor) or tensor.numel() != 1:
        shape = tuple(tensor.shape)
        raise ValueError(f"weight {name}: shape {shape}, only one scale for a layer is served")
    return _checked(f"weight {name}", float(tensor.item()))


def _checked(where: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{where}: a scale of {value!r} is no positive number")
    return float(value)
