import asyncio
import threading
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from structlog.testing import capture_logs

from streamsink.watchdog import BEAT, BLOCKED, Watchdog

PATIENCE = 50.0


def block(until: Callable[[], object]) -> None:
    """Hold up the event loop."""
    deadline = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def by_block(logs: list[MutableMapping[str, Any]]) -> list[MutableMapping[str, Any]]:
    """What was logged of :func:`block`; a machine that is busy may block the loop too."""
    return [log for log in logs if "in block" in log.get("exception", "")]


class Lags:
    """What the watchdog measures, and the heartbeats it does so with."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self._new: asyncio.Queue[float] = asyncio.Queue()

    def __call__(self, lag: float) -> None:
        self.seen.append(lag)
        self._new.put_nowait(lag)

    async def beat(self) -> None:
        """Wait for the next heartbeat from now on."""
        while not self._new.empty():
            self._new.get_nowait()
        async with asyncio.timeout(PATIENCE):
            await self._new.get()


async def test_what_blocks_the_loop_is_named_once() -> None:
    lags = Lags()
    watchdog = Watchdog(asyncio.get_running_loop(), lags)
    with capture_logs() as logs:
        watchdog.start()
        await lags.beat()
        block(lambda: by_block(logs))
        begun = time.monotonic()
        # For as long again: it is not told twice.
        block(lambda: time.monotonic() > begun + BLOCKED + 2 * BEAT)
        await lags.beat()
        watchdog.stop()
    (told,) = by_block(logs)
    assert (told["event"], told["log_level"]) == ("event loop blocked", "error")
    assert told["seconds"] >= BLOCKED
    assert "block(lambda: by_block(logs))" in told["exception"]
    assert max(lags.seen) > BLOCKED
    assert min(lags.seen) >= 0.0


async def test_each_time_it_is_told() -> None:
    lags = Lags()
    watchdog = Watchdog(asyncio.get_running_loop(), lags)
    with capture_logs() as logs:
        watchdog.start()
        for count in (1, 2):
            block(lambda count=count: len(by_block(logs)) >= count)  # type: ignore[misc]
            await lags.beat()
        watchdog.stop()
    assert [log["event"] for log in by_block(logs)] == ["event loop blocked"] * 2


async def test_it_is_gone_when_it_is_stopped() -> None:
    lags = Lags()
    before = set(threading.enumerate())
    watchdog = Watchdog(asyncio.get_running_loop(), lags)
    watchdog.start()
    assert [thread.name for thread in set(threading.enumerate()) - before] == ["streamsink-watchdog"]
    await lags.beat()
    watchdog.stop()
    assert set(threading.enumerate()) <= before
    count = len(lags.seen)
    await asyncio.sleep(0)
    assert len(lags.seen) == count


async def test_a_loop_on_time_is_left_alone() -> None:
    watchdog = Watchdog(asyncio.get_running_loop(), lambda lag: None)
    beaten_at = watchdog._beaten_at
    with capture_logs() as logs:
        assert watchdog.look(beaten_at, 0.0) == 0.0
        assert watchdog.look(beaten_at + BEAT + BLOCKED - 0.001, 0.0) == 0.0
        assert not [log for log in logs if log["event"] == "event loop blocked"]
        reported = watchdog.look(beaten_at + BEAT + BLOCKED + 0.001, 0.0)
        assert reported == beaten_at
        assert watchdog.look(beaten_at + 9.0, reported) == reported
    assert [log["seconds"] for log in logs] == [0.101]


async def test_a_thread_that_is_gone_has_no_stack() -> None:
    watchdog = Watchdog(asyncio.get_running_loop(), lambda lag: None)
    watchdog._loop_thread = -1
    with capture_logs() as logs:
        watchdog.look(watchdog._beaten_at + 1.0, 0.0)
    assert [log["exception"] for log in logs] == [""]
