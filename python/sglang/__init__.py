"""An SGLang-compatible LLM serving engine on segmented KV memory."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`sglang.Engine`, imported on first use: children and tools import this package too."""
    if name == "Engine":
        return importlib.import_module("sglang.srt.entrypoints.engine").Engine
    raise AttributeError(f"module 'sglang' has no attribute {name!r}")
