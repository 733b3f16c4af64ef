"""An event loop on a thread of its own, for callers that have none or another one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines on its loop; safe to use from any thread but its own."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` there and wait for its result; an interrupt here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    async def acall(self, work: Coroutine[Any, Any, T]) -> T:
        """The same for a caller with a loop of its own, which is not blocked."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def iterate(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items of `source`, which runs there; closing the iterator closes it."""
        try:
            while True:
                try:
                    item = self.call(_next(source))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if not self._loop.is_closed():
                self.call(source.aclose())

    async def aiterate(self, source: AsyncGenerator[T, None]) -> AsyncIterator[T]:
        """The same for a caller with a loop of its own."""
        try:
            while True:
                try:
                    item = await self.acall(_next(source))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if not self._loop.is_closed():
                await self.acall(source.aclose())

    def close(self) -> None:
        """Cancel what still runs there and end the thread."""
        if self._loop.is_closed():
            return
        self.call(_cancel_others())
        self.call(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(source: AsyncGenerator[T, None]) -> T:
    return await anext(source)


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
