"""The environment variables that change behaviour, read once and passed down.

The doors build one `Environ` at start; no other module looks at `os.environ` for settings.
Variable names are SGLang's where it has them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"", "0", "false", "no", "off"})


@dataclass(frozen=True)
class Environ:
    """Settings that come from the environment.

    `allow_overwrite_longer_context_len` permits a context above the model's trained length,
    `health_check_timeout_s` bounds `/health_generate`, `kv_debug_protect` makes unmapped KV
    segments inaccessible, so that a stray read faults instead of returning zeros.
    `disable_native_kernels` computes with PyTorch alone, as where sgl-kernel is not installed.
    `kv_canary_perturb` (None: nothing) is damage for `--kv-canary` to find, `kind:group@step`.
    """

    allow_overwrite_longer_context_len: bool = False
    health_check_timeout_s: float = 20.0
    kv_debug_protect: bool = False
    kv_canary_perturb: str | None = None
    disable_native_kernels: bool = False

    @classmethod
    def from_os(cls, environ: Mapping[str, str] | None = None) -> Environ:
        """Read the variables of `environ` (None: the process's own).

        Raises ValueError naming the variable whose value makes no sense.
        """
        source = os.environ if environ is None else environ
        return cls(
            allow_overwrite_longer_context_len=_read_bool(
                source, "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"
            ),
            health_check_timeout_s=_read_seconds(source, "SGLANG_HEALTH_CHECK_TIMEOUT", 20.0),
            kv_debug_protect=_read_bool(source, "SGLANG_KV_DEBUG_PROTECT"),
            disable_native_kernels=_read_bool(source, "SGLANG_DISABLE_NATIVE_KERNELS"),
            kv_canary_perturb=source.get("SGLANG_KV_CANARY_PERTURB", "").strip() or None,
        )


def _read_bool(source: Mapping[str, str], name: str) -> bool:
    value = source.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(f"{name} must be 1 or 0, got {source[name]!r}")


def _read_seconds(source: Mapping[str, str], name: str, default: float) -> float:
    text = source.get(name, "").strip()
    if not text:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{name} must be a number of seconds above 0, got {text!r}")
    return seconds
