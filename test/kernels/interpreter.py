"""Triton's interpreter without its largest cost, which checks nothing.

A launch swaps the functions of Triton's language for interpreted ones and swaps them back when it
ends. Every call of a device function in between (`tl.sum`, `tl.zeros`, our own) looks through the
whole language to swap them once more, and changes nothing: a third of the time of all tests in
the interpreter. Here a launch swaps the functions of a module once.

Used by a fixture of test/conftest.py. It never changes what a kernel computes.
"""

from __future__ import annotations

from types import FunctionType, ModuleType
from typing import Any


def swap_once_per_launch(interpreter: ModuleType) -> None:
    """Lets nested calls keep what their launch has swapped; a launch never runs inside another.

    `interpreter` is `triton.runtime.interpreter`, changed for the rest of the process. One that
    is built in another way is left as it is.
    """
    names = ("_patch_lang", "_LangPatchScope", "GridExecutor")
    if not all(hasattr(interpreter, name) for name in names):
        return
    swap: Any = interpreter._patch_lang  # type: ignore[attr-defined]
    scope: Any = interpreter._LangPatchScope  # type: ignore[attr-defined]
    executor: Any = interpreter.GridExecutor  # type: ignore[attr-defined]
    launch = executor.__call__
    swapped: set[frozenset[int]] = set()

    def swap_if_new(fn: FunctionType) -> Any:
        modules = frozenset(id(x) for x in fn.__globals__.values() if isinstance(x, ModuleType))
        if modules in swapped:
            return scope()
        swapped.add(modules)
        return swap(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        swapped.clear()
        try:
            launch(self, *args, **kwargs)
        finally:
            swapped.clear()

    interpreter._patch_lang = swap_if_new  # type: ignore[attr-defined]
    executor.__call__ = launch_anew
