"""An hour of a call in a few seconds: what is recorded has the audio's length, whatever clocks and networks do."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from streamsink.codec import CodecSpec
from streamsink.config import Pipeline, Settings
from streamsink.endpoint import Endpoint
from streamsink.metrics import Metrics
from streamsink.plugins import Plugin, find
from streamsink.processor import Processor
from streamsink.processors import writer
from streamsink.processors.record import Record
from streamsink.session import Session
from streamsink.stream import Stream
from streamsink.wire import PlatformWriter
from tests.recording_child import Outlet

HOUR = 3600
PTIME = 0.1
FRAME = 800


def spoken(number: int) -> bytes:
    """PCMU that is another in each frame, for a while."""
    return bytes([0x80 + number % 113]) * FRAME


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        # What another thread does tells nobody here.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("ppm", [-200, 200])
async def test_an_hour_is_an_hour_at_any_skew_and_through_a_step_of_the_wall_clock(
    ppm: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FLUSH_INTERVAL", 0.01)
    # Ten seconds of this machine's are hours of this call's: in so many, a busy machine alone makes five slow calls.
    monkeypatch.setattr(sys.modules["streamsink.processor"], "SLOW_CALL", 60.0)
    wall = time.time
    settings = Settings(recordings=tmp_path, pipelines={"default": Pipeline(processors=["record"])})
    endpoint = Endpoint(settings, {"default": [find("record:layout=stereo")]}, Metrics(), asyncio.get_running_loop())
    began = now = asyncio.get_running_loop().time()
    endpoint.clock = lambda: now
    session = Session(endpoint, Outlet(), path="/", pipeline="default", client="", token_name="", now=now)
    platform = PlatformWriter("sid")
    session.receive(platform.connected(), now)
    session.receive(platform.start(account_sid="a", call_sid="c", encoding="PCMU", sample_rate=8000), now)
    assert session._chain is not None
    recorder = session._chain._guards[0].processor
    assert isinstance(recorder, Record)
    starting = session._chain._guards[0].started
    assert starting is not None
    await starting
    rng = random.Random(ppm)
    beep = np.full(FRAME, 5000, np.int16)
    frames = round(HOUR / PTIME)
    late = 0.0
    for number in range(frames):
        if number == frames // 2:
            monkeypatch.setattr(time, "time", lambda: wall() - 3600)
        # The network delays, now and then for seconds, and what waited comes at once.
        late = rng.uniform(2, 5) if rng.random() < 0.001 else max(0.0, late - PTIME)
        due = began + (number + 1) * PTIME * (1 + ppm / 1e6) + rng.uniform(0, 0.02)
        now = max(now, due + late)
        if number == frames - 50:
            # Five seconds before the end the far end hears a beep of ours, by its own clock.
            session._on_played(beep, began + number * PTIME * (1 + ppm / 1e6))
        session.receive(platform.media(spoken(number), chunk=number + 1, timestamp_ms=number * 100), now)
        if number % 1500 == 0:
            # This clock is faster than the machine's, and the disk as fast as it is.
            await until(lambda: not recorder._pending)
    session.receive(platform.stop(), now)
    await session.done.wait()
    (path,) = await asyncio.to_thread(lambda: list(tmp_path.glob("*.wav")))
    samples = soundfile.read(path, dtype="int16")[0]
    assert abs(len(samples) / 8000 - HOUR) <= 0.02
    decode = CodecSpec.parse("PCMU").decoder().decode
    # Not one sample is lost, there twice or elsewhere.
    assert samples[:, 0].tobytes() == b"".join(decode(spoken(number)).tobytes() for number in range(frames))
    (heard,) = np.nonzero(samples[:, 1])
    assert abs(heard[0] / 8000 - (HOUR - 5)) <= 0.02
    assert len(heard) == FRAME
    told = json.loads(path.with_suffix(".json").read_text())
    assert (told["gaps"], told["complete"]) == ([], True)


class Talks(Processor):
    """Plays when it is told to."""

    async def on_start(self, stream: Stream) -> None:
        self.stream = stream


async def test_what_was_heard_is_recorded_lead_and_all_and_what_was_cleared_is_not(tmp_path: Path) -> None:
    settings = Settings(recordings=tmp_path, pipelines={"default": Pipeline(processors=["record", "talks"])})
    talking: list[Talks] = []

    class Kept(Talks):
        def __init__(self) -> None:
            talking.append(self)

    plugins = [find("record"), Plugin("talks", Kept, {})]
    endpoint = Endpoint(settings, {"default": plugins}, Metrics(), asyncio.get_running_loop())
    now = asyncio.get_running_loop().time()
    endpoint.clock = lambda: now
    session = Session(endpoint, Outlet(), path="/", pipeline="default", client="", token_name="", now=now)
    platform = PlatformWriter("sid")
    session.receive(platform.connected(), now)
    session.receive(platform.start(account_sid="a", call_sid="c", encoding="L16", sample_rate=8000), now)
    await until(lambda: bool(list(tmp_path.glob("*.wav.part"))))
    await writer.writer.run(lambda: None)
    ours = (np.arange(8000) % 3000 + 1).astype(np.int16)
    for number in range(100):
        now += 0.02
        payload = np.full(160, -number - 1, "<i2").tobytes()
        session.receive(platform.media(payload, chunk=number + 1, timestamp_ms=number * 20), now)
        if number == 20:
            talking[0].stream.play(ours, 8000)
        if number == 50:
            # 0.6 s of it were heard by now, and 0.1 s lie in the far end's queue.
            talking[0].stream.clear()
        endpoint.pacer.tick(now)
    session.receive(platform.stop(), now)
    await session.done.wait()
    (path,) = await asyncio.to_thread(lambda: list(tmp_path.glob("*.wav")))
    left, right = soundfile.read(path, dtype="int16")[0].T
    assert left[:16_000].tolist() == np.repeat(-np.arange(1, 101), 160).tolist()
    (heard,) = np.nonzero(right)
    # From its first sample on, from when it was played, in one piece.
    assert right[heard[0] : heard[-1] + 1].tolist() == ours[: len(heard)].tolist()
    assert abs(heard[0] - 21 * 160) <= 160
    assert abs(len(heard) - 0.6 * 8000) <= 320
    assert json.loads(path.with_suffix(".json").read_text())["complete"] is True
