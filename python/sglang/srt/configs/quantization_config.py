"""What a Hugging Face checkpoint says of its quantisation: weights, and the KV cache.

compressed-tensors writes `quantization_config` into config.json, ModelOpt the same and, or only, a
file hf_quant_config.json beside it. Pure; `ModelConfig` reads the files. What `auto` of
--kv-cache-dtype makes of it is SGLang's rule: its pull request 35455 says which schemes count, and
that others are warned of and served with a cache that is not quantised. Of weights only that is
read which their tensors don't tell themselves: which modules are quantised, their names say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class KVCacheScheme:
    """A checkpoint's own word about its KV cache.

    `dtype` is the value of --kv-cache-dtype that it means; None: none of ours, which `told`, the
    words as they stand in the file, then says.
    """

    dtype: str | None
    told: str


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How the weights of a checkpoint are quantised.

    `method` is a name of `WEIGHT_METHODS`, of several that mean the same the first. `floats`: all
    codes are FP8; `rounds_inputs`: and products' inputs, by scales found as they come. `block`: an
    FP8 scale is for so many (outputs, inputs), None where the shapes of scales say it. Integers
    have `bits` bits and a scale for each `group` inputs, -1 for all, None where there are none, or
    where modules differ and shapes say it; GPTQ's zeros are stored less `zero_offset`; `ordered`:
    inputs are in groups by an order of their own, which every module has.
    """

    method: str
    block: tuple[int, int] | None = None
    bits: int | None = None
    group: int | None = None
    zero_offset: int = 0
    ordered: bool = False
    floats: bool = False
    rounds_inputs: bool = False


def weight_scheme(config: Any, modelopt: Mapping[str, Any], model_type: str) -> WeightScheme | None:
    """The scheme of the weights, None where they are numbers; arguments as below.

    Raises ValueError, one line, for a method that is not served, at all or of this family of
    models.
    """
    if not has_quantized_weights(config, modelopt):
        return None
    if not isinstance(config, Mapping):
        named: Any = config or f"modelopt {modelopt.get('quant_algo')}"
    else:
        named = config.get("quant_method")
    read = WEIGHT_METHODS.get(named) if isinstance(named, str) else None
    if read is None or not isinstance(config, Mapping):
        served = ", ".join(WEIGHT_METHODS)
        raise ValueError(f"weights quantized by {named!r} are not served; those of {served} are")
    scheme = read(config)
    if scheme.method == "mxfp4" and model_type != "gpt_oss":
        raise ValueError(f"weights quantized by 'mxfp4' are served of gpt_oss, not {model_type}")
    return scheme


def has_quantized_weights(config: Any, modelopt: Mapping[str, Any]) -> bool:
    """Whether weights are quantised: False also where a checkpoint tells of its KV cache alone.

    `config` is config.json's `quantization_config` (None: there is none), `modelopt` the object
    `quantization` of hf_quant_config.json ({}: there is none).
    """
    if modelopt.get("quant_algo"):
        return True
    if not isinstance(config, Mapping):
        return bool(config)
    if config.get("quant_method") == "compressed-tensors" and config.get("kv_cache_scheme"):
        return bool(config.get("config_groups"))
    if _is_modelopt(config) and (config.get("kv_cache_scheme") or _algorithm(config)):
        return bool(_modelopt_part(config).get("quant_algo") or config.get("config_groups"))
    return bool(config)


def kv_cache_scheme(config: Any, modelopt: Mapping[str, Any]) -> KVCacheScheme | None:
    """The scheme of the KV cache, None where nothing is said; arguments as above.

    Served is fp8 by numbers that were found once, one for a layer's K and one for its V.
    """
    found = config if isinstance(config, Mapping) else {}
    scheme = found.get("kv_cache_scheme")
    algorithm = _algorithm(modelopt) or (_algorithm(found) if _is_modelopt(found) else None)
    if scheme:
        return KVCacheScheme("fp8_e4m3" if _is_served(scheme) else None, f"{scheme}")
    if algorithm is not None:
        return KVCacheScheme("fp8_e4m3" if algorithm.upper() == "FP8" else None, algorithm)
    return None


def _is_served(scheme: Any) -> bool:
    return isinstance(scheme, Mapping) and (
        scheme.get("num_bits") == 8
        and scheme.get("type") == "float"
        and scheme.get("strategy") in (None, "tensor")
        and not scheme.get("dynamic")
        and scheme.get("symmetric") in (None, True)
    )


def _is_modelopt(config: Mapping[str, Any]) -> bool:
    return str(config.get("quant_method", "")).startswith("modelopt")


def _modelopt_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """ModelOpt's fields, which older files have in an object of their own."""
    inner = config.get("quantization")
    return inner if isinstance(inner, Mapping) else config


def _algorithm(config: Mapping[str, Any]) -> str | None:
    value = _modelopt_part(config).get("kv_cache_quant_algo")
    return str(value) if value else None


def _read_mxfp4(config: Mapping[str, Any]) -> WeightScheme:
    del config  # its fields are about which modules are quantised
    return WeightScheme("mxfp4")


def _read_fp8(config: Mapping[str, Any]) -> WeightScheme:
    if config.get("fmt", "e4m3") != "e4m3":
        raise ValueError(f"weights of fp8 in {config['fmt']!r} are not served; 'e4m3' is")
    block = _block(config.get("weight_block_size"), "weight_block_size")
    rounds = config.get("activation_scheme") == "dynamic"
    return WeightScheme("fp8", block=block, floats=True, rounds_inputs=rounds)


def _read_fbgemm(config: Mapping[str, Any]) -> WeightScheme:
    """The same, with a scale for each output, and inputs always rounded as they come."""
    return replace(_read_fp8(config), rounds_inputs=True)


def _read_gptq(config: Mapping[str, Any]) -> WeightScheme:
    stored = config.get("checkpoint_format") or config.get("format") or "gptq"
    if stored not in ("gptq", "gptq_v2"):
        raise ValueError(f"weights of gptq in {stored!r} are not served; 'gptq' and 'gptq_v2' are")
    _check("gptq", config, "pack_dtype", ("int32",), "int32")
    _check("gptq", config, "bits", (4, 8))
    varies = bool(config.get("dynamic"))  # modules that differ, by regular expressions
    return WeightScheme(
        "gptq",
        bits=None if varies else config["bits"],
        group=None if varies else _group_size("gptq", config.get("group_size", -1)),
        zero_offset=1 if stored == "gptq" else 0,
        ordered=bool(config.get("desc_act")) and not varies,
    )


def _read_awq(config: Mapping[str, Any]) -> WeightScheme:
    # AutoAWQ's own file has the names in brackets.
    named = {"bits": config.get("w_bit"), "group_size": config.get("q_group_size"), **config}
    _check("awq", named, "bits", (4,))
    version = str(config.get("version") or "gemm").lower()
    _check("awq", {"version": version}, "version", ("gemm",))
    return WeightScheme("awq", bits=4, group=_group_size("awq", named["group_size"]))


def _check(
    method: str, config: Mapping[str, Any], field: str, served: tuple[Any, ...], default: Any = None
) -> None:
    value = config.get(field, default)
    if value not in served:
        names = " and ".join(map(repr, served))
        raise ValueError(f"weights of {method} with {field} {value!r} are not served, {names} are")


def _group_size(method: str, value: Any) -> int:
    if value != -1 and not _is_count(value):
        raise ValueError(f"{method}: group_size must be -1 or positive, not {value!r}")
    return int(value)


def _read_compressed_tensors(config: Mapping[str, Any]) -> WeightScheme:
    """Each of its groups says how some modules' weights are: all must be what is served."""
    name = "compressed-tensors"
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise ValueError(f"{name}: weights in {sparsity['format']!r} are not served")
    transforms = config.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise ValueError(f"{name}: transform_config is not served")
    groups = config.get("config_groups")
    found = []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            found.append(_compressed_group(weights, group.get("input_activations")))
    if not found:
        raise ValueError(f"weights quantized by {name!r}: config_groups names none")
    blocks = sorted({one.block for one in found if one.block is not None})
    if len(blocks) > 1:
        raise ValueError(f"{name}: one block_structure is served, not {blocks}")
    if len(set(found)) == 1:
        return found[0]
    return WeightScheme(name, block=blocks[0] if blocks else None)


def _compressed_group(weights: Mapping[str, Any], inputs: Any) -> WeightScheme:
    """What one group of compressed-tensors says of weights and, where it does, of inputs."""
    name = "compressed-tensors"
    kind, bits = weights.get("type", "int"), weights.get("num_bits")
    strategy = weights.get("strategy")
    if (kind, bits) not in _COMPRESSED or strategy not in _COMPRESSED_STRATEGIES:
        raise ValueError(
            f"{name}: weights of {bits} bits of type {kind!r} by {strategy!r} are not served"
        )
    block = None
    if strategy == "block":
        block = _block(weights.get("block_structure"), "block_structure")
        if block is None:
            raise ValueError(f"{name}: strategy 'block' needs a block_structure")
    if kind == "float":
        said = inputs if isinstance(inputs, Mapping) else {}
        rounds = (said.get("type"), said.get("num_bits")) == (kind, bits)
        dynamic = rounds and said.get("dynamic") is True
        return WeightScheme(name, block=block, floats=True, rounds_inputs=dynamic)
    group = _group_size(name, weights.get("group_size") or -1)
    return WeightScheme(name, block, bits, group, ordered=weights.get("actorder") == "group")


def _block(value: Any, field: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, str):  # older files of compressed-tensors: "128x128"
        value = [int(size) if size.isdecimal() else size for size in value.split("x")]
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_count, value)):
        raise ValueError(f"{field} must be two positive whole numbers, not {value!r}")
    return value[0], value[1]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_COMPRESSED = (("float", 8), ("int", 4), ("int", 8))
_COMPRESSED_STRATEGIES = (None, "tensor", "channel", "group", "block")

WEIGHT_METHODS: Mapping[str, Callable[[Mapping[str, Any]], WeightScheme]] = {
    "mxfp4": _read_mxfp4,
    "fp8": _read_fp8,
    "fbgemm_fp8": _read_fbgemm,
    "gptq": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed_tensors,
}
