"""An SGLang-compatible LLM serving engine on segmented KV memory."""

__version__ = "0.1.0"
