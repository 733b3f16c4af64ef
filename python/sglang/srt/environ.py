"""The environment variables that change behaviour, read once and passed down.

The doors build one `Environ` at start; no other module looks at `os.environ` for settings.
Variable names are SGLang's where it has them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"", "0", "false", "no", "off"})


@dataclass(frozen=True)
class TorchrunEnv:
    """What torchrun tells the processes that it starts: which of `world_size` this one is.

    `local_world_size` of them share this machine. `has_store`: its agent serves a store at
    `master_addr` and `master_port`; `attempt` tells this start from earlier ones.
    """

    rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int
    has_store: bool
    attempt: str

    @classmethod
    def from_os(cls, source: Mapping[str, str]) -> TorchrunEnv | None:
        """None unless RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are all there.

        Raises ValueError naming the variable whose value makes no sense.
        """
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if not all(source.get(name, "").strip() for name in names):
            return None
        world = _read_int(source, "WORLD_SIZE", 1, 1 << 20)
        return cls(
            rank=_read_int(source, "RANK", 0, world - 1),
            world_size=world,
            local_world_size=(
                _read_int(source, "LOCAL_WORLD_SIZE", 1, world)
                if source.get("LOCAL_WORLD_SIZE", "").strip()
                else 1
            ),
            master_addr=source["MASTER_ADDR"].strip(),
            master_port=_read_int(source, "MASTER_PORT", 1, 65535),
            has_store=_read_bool(source, "TORCHELASTIC_USE_AGENT_STORE"),
            attempt="-".join(
                source.get(name, "")
                for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
            ),
        )


@dataclass(frozen=True)
class OllamaRoutes:
    """The paths of Ollama's API; `root` says that it is running, "": it has no path of its own."""

    root: str = ""
    chat: str = "/api/chat"
    generate: str = "/api/generate"
    tags: str = "/api/tags"
    show: str = "/api/show"
    ps: str = "/api/ps"
    version: str = "/api/version"

    @property
    def paths(self) -> frozenset[str]:
        """All of them."""
        return frozenset(vars(self).values()) - {""}

    @classmethod
    def from_os(cls, source: Mapping[str, str]) -> OllamaRoutes:
        """Read SGLANG_OLLAMA_CHAT_ROUTE and the others.

        Raises ValueError naming the variable whose value is no path, or one that comes twice.
        """
        found: dict[str, str] = {}
        for field in fields(cls):
            name = f"SGLANG_OLLAMA_{field.name.upper()}_ROUTE"
            path = source.get(name, "").strip() or str(field.default)
            if path and (not path.startswith("/") or any(char in path for char in "{}?# ")):
                raise ValueError(f"{name} must be a path like /api/chat, got {path!r}")
            if path and path in found.values():
                raise ValueError(f"{name}: {path} is another path of Ollama's API already")
            found[field.name] = path
        return cls(**found)


@dataclass(frozen=True)
class Environ:
    """Settings that come from the environment.

    `allow_overwrite_longer_context_len` permits a context above the model's trained length,
    `health_check_timeout_s` bounds `/health_generate`, `kv_debug_protect` makes unmapped KV
    segments inaccessible, so that a stray read faults instead of returning zeros.
    `disable_native_kernels` computes with PyTorch alone, as where sgl-kernel is not installed.
    `kv_canary_perturb` (None: nothing) is damage for `--kv-canary` to find, `kind:group@step`.
    `torchrun` is set in a process that torchrun started, `gloo_interface` names the network device
    that ranks of several machines talk through (None: found by the way to the first).
    `ollama_routes` are the paths of Ollama's API, which win over others.
    `allow_private_image_urls` lets clients name images at addresses of the server's own networks.
    """

    allow_overwrite_longer_context_len: bool = False
    health_check_timeout_s: float = 20.0
    kv_debug_protect: bool = False
    kv_canary_perturb: str | None = None
    disable_native_kernels: bool = False
    torchrun: TorchrunEnv | None = None
    gloo_interface: str | None = None
    ollama_routes: OllamaRoutes = OllamaRoutes()
    allow_private_image_urls: bool = False

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
            torchrun=TorchrunEnv.from_os(source),
            gloo_interface=source.get("GLOO_SOCKET_IFNAME", "").strip() or None,
            ollama_routes=OllamaRoutes.from_os(source),
            allow_private_image_urls=_read_bool(source, "SGLANG_ALLOW_PRIVATE_IMAGE_URLS"),
        )


def _read_bool(source: Mapping[str, str], name: str) -> bool:
    value = source.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(f"{name} must be 1 or 0, got {source[name]!r}")


def _read_int(source: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = source[name].strip()
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"{name} must be a number from {least} to {most}, got {text!r}")
    return int(text)


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
