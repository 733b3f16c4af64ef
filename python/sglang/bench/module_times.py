"""Where a forward's time goes, by the class of the module that spent it.

Forward hooks stop the clock of the calling module while the called one runs, so times add up to the
whole: what is a module's own is what it did between its parts. The hooks cost time themselves, so a
run that is timed should not be one that is profiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@dataclass(slots=True)
class OwnTime:
    """Seconds that modules of one class spent themselves, and how often they were called."""

    seconds: float = 0.0
    calls: int = 0


class ModuleTimes:
    """Measures while it is entered; `own` maps class names to what they spent themselves.

    One thread may run the model meanwhile. `clock` gives seconds.
    """

    def __init__(self, model: nn.Module, clock: Callable[[], float] = time.perf_counter) -> None:
        self.own: dict[str, OwnTime] = {}
        self._model = model
        self._clock = clock
        self._since = 0.0  # when the innermost running module began or went on
        self._running: list[OwnTime] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> ModuleTimes:
        for module in self._model.modules():
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()

    @property
    def total_seconds(self) -> float:
        """All that was spent inside the model."""
        return sum(own.seconds for own in self.own.values())

    def _enter(self, module: nn.Module, _: Any) -> None:
        now = self._clock()
        if self._running:
            self._running[-1].seconds += now - self._since
        own = self.own.setdefault(type(module).__name__, OwnTime())
        own.calls += 1
        self._running.append(own)
        self._since = self._clock()

    def _leave(self, *_: Any) -> None:
        now = self._clock()
        self._running.pop().seconds += now - self._since
        self._since = self._clock()
