"""What Ollama's clients ask of the model: /api/tags, /api/show and /api/ps.

Only what is known here is told: a field for which there is nothing is empty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang.srt.entrypoints.http_errors import dump_json
from sglang.srt.entrypoints.ollama.serving_ollama import timestamp
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.errors import RequestError

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.bin")
_NEVER = "9999-12-31T23:59:59Z"


def model_list(context: ServerContext) -> dict[str, Any]:
    """The object of /api/tags: the one model."""
    return {"models": [{**_card(context), "modified_at": timestamp(context.created)}]}


def running_models(context: ServerContext) -> dict[str, Any]:
    """The object of /api/ps: the same model, which is loaded for good."""
    card = _card(context)
    on_gpu = context.server_args.device != "cpu"
    card["size_vram"] = card["size"] if on_gpu else 0
    card["expires_at"] = _NEVER
    card["context_length"] = context.serving.service.context_length
    return {"models": [card]}


def model_shown(context: ServerContext, name: str) -> dict[str, Any]:
    """The object of /api/show; RequestError 404 for a name that is not the model's."""
    served = context.server_args.served_model_name
    if name not in (served, f"{served}:latest"):
        raise RequestError(f"model '{name}' not found", 404)
    service = context.serving.service
    config, parsers = service.model_config, context.serving.parsers
    template = None if service.tokenizer is None else service.tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    defaults = config.generation_defaults
    capabilities = {"tools": parsers.tool_call, "thinking": parsers.reasoning}
    family = config.model_type
    return {
        "modelfile": f"FROM {served}\n",
        "parameters": "\n".join(f"{key} {value}" for key, value in defaults.items()),
        "template": template or "",
        "details": _details(context),
        "model_info": {
            "general.architecture": family,
            f"{family}.context_length": service.context_length,
            f"{family}.embedding_length": config.hidden_size,
            f"{family}.block_count": config.num_layers,
            f"{family}.attention.head_count": config.num_heads,
            f"{family}.attention.head_count_kv": config.num_kv_heads,
            f"{family}.vocab_size": config.vocab_size,
        },
        "capabilities": ["completion", *(name for name, by in capabilities.items() if by)],
        "modified_at": timestamp(context.created),
    }


def _card(context: ServerContext) -> dict[str, Any]:
    name = context.server_args.served_model_name
    config = context.serving.service.model_config
    sizes = _weight_files(Path(config.path))
    told = dump_json([config.raw, sorted(sizes.items())])
    return {
        "name": name,
        "model": name,
        "size": sum(sizes.values()),
        "digest": hashlib.sha256(told).hexdigest(),
        "details": _details(context),
    }


def _details(context: ServerContext) -> dict[str, Any]:
    config = context.serving.service.model_config
    level = _DTYPES.get(config.torch_dtype, "")
    if config.weight_scheme is not None:
        level = config.weight_scheme.method.upper()
    return {
        "parent_model": "",
        "format": "gguf" if config.is_gguf else "safetensors",
        "family": config.model_type,
        "families": [config.model_type],
        "parameter_size": "",
        "quantization_level": "" if config.is_gguf else level,
    }


def _weight_files(path: Path) -> dict[str, int]:
    """The files that the weights are in and their bytes; none where they are gone."""
    files = [path]
    if path.is_dir():
        files = [file for kind in _WEIGHT_FILES for file in path.glob(kind)]
    return {file.name: file.stat().st_size for file in files if file.is_file()}
