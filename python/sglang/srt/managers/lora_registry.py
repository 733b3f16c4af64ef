"""Adapters by name: which requests may ask for them, and loading and unloading by users' wish.

The desk of the text side. Every adapter that is loaded gets a number that never comes again, so one
that is loaded under an old name shares nothing with its predecessor. Runs on the TokenizerManager's
loop, which tells it of requests that begin and end; the doors call `load` and `unload`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from sglang.srt.configs.lora_args import LoraRef, pinned_refusal
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import ControlReply

_LOAD_TIMEOUT_S = 600.0
NOT_SERVED = "LoRA adapters are not served; start the server with --enable-lora."


class Control(Protocol):
    """`TokenizerManager.control`."""

    def __call__(
        self, op: str, *, timeout_s: float = 30.0, **args: Any
    ) -> Coroutine[Any, Any, ControlReply]: ...


class LoadedAdapter:
    """An adapter that may be asked for, and how many requests run with it."""

    def __init__(self, number: int, ref: LoraRef) -> None:
        self.number = number
        self.ref = ref
        self._num_users = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def began(self) -> None:
        """One more request has it."""
        self._num_users += 1
        self._idle.clear()

    def ended(self) -> None:
        """A request that had it is gone."""
        self._num_users -= 1
        if self._num_users == 0:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Return when no request has it."""
        await self._idle.wait()


class LoraRegistry:
    """Loaded adapters by name; `args` are a `ServerArgs`, `control` asks all schedulers.

    Adapters of --lora-paths are there from the start, numbered from 1 in their order, as the
    schedulers number them.
    """

    def __init__(self, args: Any, control: Control) -> None:
        self.serves: bool = args.serves_lora
        self._base_name: str = args.served_model_name
        self._num_places: int = args.max_loras_per_batch
        self._most: int | None = args.max_loaded_loras
        self._control = control
        self._loaded = {
            ref.name: LoadedAdapter(number, ref) for number, ref in enumerate(args.lora_paths, 1)
        }
        # Those that wait for their last requests, too.
        self._by_number = {adapter.number: adapter for adapter in self._loaded.values()}
        self._last_number = len(self._loaded)
        self._lock = asyncio.Lock()

    # ---- requests

    @property
    def loaded(self) -> dict[str, LoraRef]:
        """What requests may ask for, by name, in the order of loading."""
        return {name: adapter.ref for name, adapter in self._loaded.items()}

    def name_in(self, model: str) -> str | None:
        """The adapter that the field `model` of an OpenAI request names; None: none.

        That is what follows "served name:", a loaded adapter's own name, or what follows the first
        colon. Without adapters a colon means nothing.
        """
        if not self.serves or model == self._base_name:
            return None
        if model.startswith(f"{self._base_name}:"):
            return model.removeprefix(f"{self._base_name}:").strip() or None
        if model in self._loaded:
            return model
        return model.partition(":")[2].strip() or None

    @contextmanager
    def held(self, names: Iterable[str | None]) -> Iterator[dict[str, int]]:
        """Keep the adapters of a call, some of whose sequences may begin late; numbers by name.

        RequestError as for `begin`.
        """
        found: dict[str, LoadedAdapter] = {}
        try:
            for name in names:
                adapter = None if name in found else self.begin(name)
                if adapter is not None and name is not None:
                    found[name] = adapter
            yield {name: adapter.number for name, adapter in found.items()}
        finally:
            for adapter in found.values():
                adapter.ended()

    def begin(self, name: str | None, number: int | None = None) -> LoadedAdapter | None:
        """Count a request that asks for adapter `name`; None: it asks for none.

        `number` is that of an adapter that is held for it, whatever the name stands for now. The
        request's end must be told to what is returned. RequestError 400 for a name that is not
        loaded.
        """
        if not name:
            return None
        if not self.serves:
            raise RequestError(f"{NOT_SERVED} The request asks for {name!r}.")
        adapter = self._loaded.get(name) if number is None else self._by_number.get(number)
        if adapter is None:
            there = ", ".join(map(repr, self._loaded)) or "none"
            raise RequestError(f"The LoRA adapter {name!r} is not loaded; loaded are: {there}.")
        adapter.began()
        return adapter

    # ---- loading

    async def load(self, name: str, path: str, pinned: bool) -> dict[str, Any]:
        """Load an adapter everywhere; SGLang's answer, `success` and why not.

        RequestError 503 when a scheduler is gone or silent.
        """
        async with self._lock:
            error = self._load_refusal(name, path, pinned)
            if error is None:
                self._last_number += 1
                number, ref = self._last_number, LoraRef(name, path, pinned)
                args = {"name": name, "path": path, "pinned": pinned}
                reply = await self._ask("load_lora_adapter", number, **args)
                if reply.success:
                    self._loaded[name] = self._by_number[number] = LoadedAdapter(number, ref)
                else:
                    error = reply.message
                    # Replicas that have it do not keep what others could not load.
                    await self._ask("unload_lora_adapter", number)
            return self._answer(error)

    def _load_refusal(self, name: str, path: str, pinned: bool) -> str | None:
        if not self.serves:
            return NOT_SERVED
        if not name or not path:
            return "lora_name and lora_path must be given."
        if name in self._loaded:
            return f"The LoRA adapter {name!r} is loaded already; unload it first."
        if self._most is not None and len(self._by_number) >= self._most:
            return f"No more than {self._most} LoRA adapters may be loaded (--max-loaded-loras)."
        num_pinned = sum(adapter.ref.pinned for adapter in self._loaded.values()) + pinned
        return pinned_refusal(num_pinned, self._num_places) if pinned else None

    async def unload(self, name: str) -> dict[str, Any]:
        """Unload an adapter once its last request has ended; new ones are refused at once.

        Its name may be loaded anew meanwhile. Who gives up waiting leaves it loaded, unless its
        name has been taken. RequestError 503 as for `load`.
        """
        adapter = self._loaded.pop(name, None)
        if adapter is None:
            return self._answer(
                f"The LoRA adapter {name!r} is not loaded." if self.serves else NOT_SERVED
            )
        try:
            await adapter.wait_idle()
            async with self._lock:
                reply = await self._ask("unload_lora_adapter", adapter.number)
        except BaseException:
            self._loaded.setdefault(name, adapter)
            raise
        if not reply.success:
            self._loaded.setdefault(name, adapter)
            return self._answer(reply.message)
        del self._by_number[adapter.number]
        return self._answer(None)

    async def _ask(self, op: str, number: int, **args: Any) -> ControlReply:
        return await self._control(op, timeout_s=_LOAD_TIMEOUT_S, adapter_id=number, **args)

    def _answer(self, error: str | None) -> dict[str, Any]:
        return {
            "success": error is None,
            "error_message": error or "",
            "loaded_adapters": {name: one.ref.path for name, one in self._loaded.items()},
        }
