"""Engines that the streams of a process share: loaded for the first that asks, let go a while after the last."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Loadable(Protocol):
    """What can be shared."""

    async def start(self) -> None:
        """Load."""

    async def close(self) -> None:
        """Let go."""


T = TypeVar("T", bound=Loadable)

LINGER = 60.0
"""Seconds an engine that nobody uses stays loaded."""


class Shared(Generic[T]):
    """Things of one kind, each with its key; a thing belongs to the event loop on which it was asked for."""

    def __init__(self) -> None:
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[object, _Kept[T]]]
        self._by_loop = weakref.WeakKeyDictionary()

    def take(self, key: object, make: Callable[[], T]) -> Use[T]:
        """Begin to use the thing of this key; it is made and loaded when nobody does yet."""
        kept_here = self._by_loop.setdefault(asyncio.get_running_loop(), {})
        kept = kept_here.get(key)
        if kept is None or kept.over:
            kept = kept_here[key] = _Kept(make())
        return Use(kept)


class Use(Generic[T]):
    """One stream's use of a thing."""

    def __init__(self, kept: _Kept[T]) -> None:
        self._kept = kept
        self._kept.users += 1
        self._kept.changed.set()

    async def ready(self) -> T:
        """Wait until it is loaded.

        Raises:
            Exception: What loading it raised.
        """
        return await asyncio.shield(self._kept.loaded)

    def end(self) -> None:
        """It is not needed any more."""
        self._kept.users -= 1
        self._kept.changed.set()


class _Kept(Generic[T]):
    """A thing, and the task in which it lives: an event loop that ends cancels it, and so lets the thing go."""

    def __init__(self, thing: T) -> None:
        self.thing = thing
        self.users = 0
        self.over = False
        self.changed = asyncio.Event()
        self.loaded: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        # Nobody may have waited for it.
        self.loaded.add_done_callback(lambda loaded: loaded.cancelled() or loaded.exception())
        self._task = asyncio.ensure_future(self._live())

    async def _live(self) -> None:
        try:
            await self.thing.start()
            self.loaded.set_result(self.thing)
            while not await self._idle():
                pass
        except Exception as error:
            self.loaded.set_exception(error)
        finally:
            self.over = True
            self.loaded.cancel()
            await self.thing.close()

    async def _idle(self) -> bool:
        """Wait for a change; whether nobody has used it for long."""
        self.changed.clear()
        try:
            async with asyncio.timeout(None if self.users else LINGER):
                await self.changed.wait()
        except TimeoutError:
            return self.users == 0
        return False
