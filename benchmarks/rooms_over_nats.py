"""How late those in one process hear those in another: both mix, a real NATS ties them, in real time; no stream."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.pulses import PULSE, next_said, pulse
from streamsink.audio import Frame, Samples, Track
from streamsink.bus import Bus, open_bus
from streamsink.codec import CodecSpec
from streamsink.playback import Playback
from streamsink.room import Mixer
from streamsink.room.link import Attendant, Link
from streamsink.room.mixer import FETCH, TICK
from streamsink.wire import Writer

RATE = 8000
# Debian puts it beside root's programs.
PROGRAM = shutil.which("nats-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class Side:
    """One process's side of a room: its mixer, its timer and its link."""

    def __init__(self, name: str, bus: Bus, who: str) -> None:
        loop = asyncio.get_running_loop()
        self.clock = loop.time
        self.mixer = Mixer(RATE, self.clock())
        members = [Attendant(who, None)]
        self.link = Link(name, bus, self.mixer, self.clock, loop, lambda: members, lambda: None)
        self.member = self.mixer.join(who, None, RATE)
        self._timer = loop.call_at(self.mixer.due, self._tick)

    def _tick(self) -> None:
        self.mixer.advance(self.clock())
        self._timer = asyncio.get_running_loop().call_at(self.mixer.due, self._tick)


async def repeat(first: float, steps: int, step: Callable[[int, float], None]) -> None:
    """Call a step every 20 ms."""
    loop = asyncio.get_running_loop()
    for number in range(steps):
        at = first + number * TICK
        await asyncio.sleep(at - loop.time())
        step(number, loop.time())


async def talk(url: str, rooms: int, seconds: float, spread: float) -> list[list[float]]:
    """Send bursts to every room; returns when each was said."""
    bus = open_bus(url)
    await bus.open()
    said: list[list[float]] = [[] for _ in range(rooms)]

    async def room(index: int) -> None:
        await asyncio.sleep(index * spread)
        side = Side(f"r{index}", bus, "talker")

        def step(number: int, now: float) -> None:
            frame = pulse(RATE, number)
            if frame.any():
                said[index].append(now + float(np.argmax(frame > 0)) / RATE)
            side.member.hear(Frame(frame, RATE, Track.INBOUND, number * len(frame), 0, number), now)

        await repeat(side.clock() + 0.0031 * index % TICK, round(seconds / TICK), step)
        side.link.close()

    await asyncio.gather(*(room(index) for index in range(rooms)))
    await bus.close()
    return said


async def listen(url: str, rooms: int, seconds: float, spread: float) -> list[list[float]]:
    """Be a listener in every room; returns when each burst was heard."""
    bus = open_bus(url)
    await bus.open()
    heard: list[list[float]] = [[] for _ in range(rooms)]

    async def room(index: int) -> None:
        await asyncio.sleep(index * spread)
        side = Side(f"r{index}", bus, "listener")

        def took(samples: Samples, at: float) -> None:
            loud = np.flatnonzero(samples > PULSE // 2)
            if len(loud) and (not heard[index] or at - heard[index][-1] > 5 * TICK):
                heard[index].append(at + float(loud[0]) / RATE)

        playback = Playback(CodecSpec("L16", RATE, 20), Writer(""), lambda message: None, lambda: None, side.clock)
        playback.on_sent = took
        playback.play_live(lambda n: side.member.source(n, side.clock()), side.mixer.due + FETCH - side.clock())
        end = side.clock() + seconds
        while side.clock() < end:
            due = playback.due
            assert due is not None
            await asyncio.sleep(due - side.clock())
            playback.advance(max(side.clock(), due))
        side.link.close()

    await asyncio.gather(*(room(index) for index in range(rooms)))
    await bus.close()
    return heard


def _talk(pipe: Connection, url: str, rooms: int, seconds: float, spread: float) -> None:
    pipe.send("ready")
    pipe.send(asyncio.run(talk(url, rooms, seconds, spread)))


def delays(rooms: int, seconds: float, spread: float = 0.037) -> tuple[list[float], list[float]]:
    """Seconds from mouth to ear: in the first two seconds of each room, and later."""
    assert PROGRAM is not None
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    server = subprocess.Popen([PROGRAM, "-a", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        url = f"nats://127.0.0.1:{port}"
        ours, theirs = multiprocessing.Pipe()
        talker = multiprocessing.get_context("spawn").Process(target=_talk, args=(theirs, url, rooms, seconds, spread))
        talker.start()
        # A process takes a while to begin.
        ours.recv()
        heard = asyncio.run(listen(url, rooms, seconds, spread))
        said: list[list[float]] = ours.recv()
        talker.join()
    finally:
        server.kill()
        server.wait()
    first: list[float] = []
    later: list[float] = []
    for mouths, ears in zip(said, heard, strict=True):
        for ear in ears:
            if mouths and ear > mouths[0]:
                (first if ear < ears[0] + 2 else later).append(ear - next_said(mouths, ear))
    return first, later


def table(rooms: int, seconds: float) -> list[str]:
    """Mouth to ear across NATS, or why there is no figure."""
    if PROGRAM is None:
        return ["Across NATS: not measured, nats-server is not installed (Debian: nats-server)."]
    lines = [f"Across NATS, two processes, {rooms} rooms, in real time:", ""]
    lines += ["| | p50 ms | p99 ms |", "|---|--:|--:|"]
    for name, found in zip(("first 2 s", "later"), delays(rooms, seconds), strict=True):
        p50, p99 = np.percentile(np.array(found) * 1000, (50, 99))
        lines.append(f"| {name} | {p50:.1f} | {p99:.1f} |")
    return lines
