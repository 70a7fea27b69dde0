"""Rooms that span processes: over a real NATS, with real sockets, through deaths and splits."""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import soundfile

from streamsink.audio import Frame, Samples, Track
from streamsink.bus import ProcessBus
from streamsink.config import Pipeline, RoomSettings, Settings
from streamsink.errors import ConfigError, RoomRefused
from streamsink.room import Mixer
from streamsink.room import link as link_module
from streamsink.room.link import Attendant, Link
from streamsink.server import Server
from streamsink.simulator import SimulateOptions
from streamsink.simulator.simulation import Simulation
from tests.conftest import Serve
from tests.nats_server import NatsServer, needs_nats
from tests.peer import TOKEN, eventually
from tests.process import Process, processes
from tests.test_mixer import levels, usual
from tests.test_rooms import CALLERS, tone

pytestmark = pytest.mark.endpoint_loop

ROOM = {
    "no_tls": True,
    "pipelines": {"default": Pipeline(processors=["mix:room=crew"])},
    "rooms": {"crew": RoomSettings(processors=["record"], grace_seconds=0.05)},
}


async def call(url: str, folder: Path, codec: str, hz: float, seconds: float, token: str = TOKEN) -> Path:
    """Somebody says a tone for so long; what they hear is kept."""
    back = folder / f"heard_{hz:g}.wav"
    said = await asyncio.to_thread(tone, folder / f"said_{hz:g}.wav", hz, seconds)
    options = SimulateOptions(file=said, url=url, token=token, codec=codec, name=codec, seconds=seconds, save=back)
    await Simulation(options).run()
    return back


def heard(back: Path, begin: float, end: float) -> dict[float, float]:
    """How loud each caller's tone is in a stretch of what somebody heard, dB."""
    samples, rate = soundfile.read(back, dtype="int16")
    tones = list(CALLERS.values())
    return dict(zip(tones, usual(samples[round(begin * rate) : round(end * rate)], rate, *tones), strict=True))


LOUD = 20 * float(np.log10(6000)) - 2
TALKING = LOUD - 4
"""The same where a machine that is busy may have lost a part of it."""


@needs_nats
async def test_callers_of_two_endpoints_hear_each_other(serve: Serve, tmp_path: Path) -> None:
    with NatsServer() as nats:
        folders = [tmp_path / "one", tmp_path / "two"]
        one, two = [await serve(**ROOM, bus=nats.url, recordings=folder) for folder in folders]
        places = {"PCMU": one, "G722": two, "L16@24000h": one}
        backs = await asyncio.gather(
            *(call(places[codec].server.url, tmp_path, codec, hz, 3.5) for codec, hz in CALLERS.items())
        )
        await eventually(lambda: any(list(folder.glob("*.json")) for folder in folders))
        for (codec, own), back in zip(CALLERS.items(), backs, strict=True):
            there = heard(back, 1.7, 3.0)
            self_heard = there.pop(own)
            assert min(there.values()) > LOUD, codec
            assert min(there.values()) - self_heard >= 40, codec
        # One of them has the room, and records all three.
        (sidecar,) = [path for folder in folders for path in folder.glob("*.json")]
        assert sorted(member["name"] for member in json.loads(sidecar.read_text())["members"]) == sorted(CALLERS)
        whole, rate = soundfile.read(sidecar.with_suffix(".wav"), dtype="int16")
        assert min(usual(whole[2 * rate : round(3 * rate)], rate, *CALLERS.values())) > LOUD


@pytest.fixture
async def endpoint(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Process]]]:
    """Starts an endpoint as a process, with a room over a bus."""
    async with processes(tmp_path) as spawn:
        (tmp_path / "streamsink.toml").write_text(
            "no_tls = true\n[pipelines.default]\nprocessors = ['mix:room=crew']\n"
            "[rooms.crew]\nprocessors = ['record']\ngrace_seconds = 0.05\n"
        )

        async def start(bus: str, recordings: str) -> Process:
            process = await spawn("--port", "0", "--token", TOKEN, "--bus", bus, "--recordings", recordings)
            await process.listening()
            return process

        yield start


@needs_nats
async def test_the_death_of_the_owner_leaves_the_others_talking(
    endpoint: Callable[..., Awaitable[Process]], tmp_path: Path
) -> None:
    with NatsServer() as nats:
        owner = await endpoint(nats.url, "one")
        (pcmu, lost), (g722, second), (l16, third) = CALLERS.items()
        victim = asyncio.ensure_future(call(f"ws://127.0.0.1:{owner.port}/", tmp_path, pcmu, lost, 30))
        await eventually(lambda: list((tmp_path / "one").glob("*.wav.part")))
        other = await endpoint(nats.url, "two")
        url = f"ws://127.0.0.1:{other.port}/"
        calls = [asyncio.ensure_future(call(url, tmp_path, *caller, 12)) for caller in ((g722, second), (l16, third))]
        await asyncio.sleep(3.5)
        owner.process.send_signal(signal.SIGKILL)
        # The room is the other's, which records it from now on.
        await eventually(lambda: list((tmp_path / "two").glob("*.wav.part")))
        backs = await asyncio.gather(*calls)
        await asyncio.gather(victim, return_exceptions=True)
        for back, own, partner in ((backs[0], second, third), (backs[1], third, second)):
            # All of them before; after the death the one who is left, all the time.
            before, after = heard(back, 1.2, 2.3), heard(back, 7.7, 8.6)
            assert min(before[lost], before[partner]) > TALKING
            assert after[partner] > TALKING
            assert after[partner] - max(after[lost], after[own]) >= 40
            for at in np.arange(2.0, 8.5, 0.5):
                assert heard(back, at, at + 0.4)[partner] > TALKING
        await eventually(lambda: list((tmp_path / "two").glob("*.json")))
        sidecar = max((tmp_path / "two").glob("*.json"))
        assert {member["name"] for member in json.loads(sidecar.read_text())["members"]} >= {g722, l16}
        whole, rate = soundfile.read(sidecar.with_suffix(".wav"), dtype="int16")
        assert min(usual(whole[2 * rate : 3 * rate], rate, second, third)) > TALKING


@needs_nats
async def test_a_lost_bus_splits_a_room_and_its_return_joins_it(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "BEAT", 0.2)
    with NatsServer() as nats:
        one, two = [await serve(**ROOM, bus=nats.url, recordings=tmp_path / name) for name in ("one", "two")]
        rooms = [running.server.endpoint.rooms for running in (one, two)]
        first = asyncio.ensure_future(call(one.server.url, tmp_path, "PCMU", 500.0, 7))
        await eventually(lambda: "crew" in rooms[0] and rooms[0]["crew"].audience is not None)
        calls = [asyncio.ensure_future(call(two.server.url, tmp_path, "G722", hz, 6.5)) for hz in (1000.0, 1750.0)]
        await eventually(lambda: "crew" in rooms[1] and rooms[1]["crew"].audience is None)
        await asyncio.to_thread(nats.stop)
        # Each side has a room of its own.
        await eventually(lambda: rooms[1]["crew"].audience is not None)
        assert rooms[0]["crew"].audience is not None
        await asyncio.sleep(0.5)
        await asyncio.to_thread(nats.start)
        # The older one has it all again, and what the younger one recorded is kept.
        await eventually(lambda: rooms[1]["crew"].audience is None)
        assert rooms[0]["crew"].audience is not None
        await eventually(lambda: list((tmp_path / "two").glob("*.json")))
        backs = await asyncio.gather(first, *calls)
        # Those on one side have heard each other all the time.
        for at in np.arange(1.0, 6.0, 0.5):
            assert heard(backs[1], at, at + 0.4)[1750.0] > TALKING
            assert heard(backs[2], at, at + 0.4)[1000.0] > TALKING
        assert min(heard(backs[0], 5.5, 6.2)[hz] for hz in (1000.0, 1750.0)) > TALKING
        (sidecar,) = (tmp_path / "two").glob("*.json")
        assert json.loads(sidecar.read_text())["complete"] is True


# --- With a bus within the process, and time that is told ------------------------------------------------------------


class Side:
    """One process's side of a room."""

    def __init__(self, bus: ProcessBus, name: str, clock: Callable[[], float]) -> None:
        self.mixer = Mixer(8000, 0.0)
        self.members = [Attendant(name, name)]
        self.changes = 0
        loop = asyncio.get_running_loop()
        self.link = Link("crew ä", bus, self.mixer, clock, loop, lambda: self.members, self.changed)

    def changed(self) -> None:
        self.changes += 1

    def who(self) -> list[str]:
        return sorted(member.sid for peer in self.link.peers.values() for member in peer.members)


@pytest.fixture
async def bus() -> AsyncIterator[ProcessBus]:
    bus = ProcessBus()
    await bus.open()
    yield bus
    await bus.close()


async def test_the_oldest_has_the_room(bus: ProcessBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "ANSWERS", 0.02)
    monkeypatch.setattr(link_module, "BEAT", 0.02)
    now = 0.0
    sides = []
    for number in range(3):
        monkeypatch.setattr(time, "time", lambda number=number: 1000.0 - number)
        sides.append(Side(bus, str(number), lambda: now))
    # Nothing is decided before the others could show themselves.
    assert [side.link.owner for side in sides] == [None] * 3
    await eventually(lambda: [side.link.owner for side in sides] == [False, False, True])
    assert [side.who() for side in sides] == [["1", "2"], ["0", "2"], ["0", "1"]]
    # Who leaves says so, and the next one has it at once.
    sides[2].link.close()
    await eventually(lambda: [side.link.owner for side in sides[:2]] == [False, True])
    assert sides[0].who() == ["1"]
    # Who dies does not: it has been silent for too long.
    sides[1].link._timer.cancel()
    sides[1].link._on_beat = lambda message: None  # type: ignore[method-assign]
    for subscription in sides[1].link._subscriptions:
        subscription.close()
    now += link_module.SILENT + 0.1
    await eventually(lambda: sides[0].link.owner is True and not sides[0].link.peers)
    sides[0].link.close()


async def test_who_stood_still_does_not_take_the_others_for_dead(
    bus: ProcessBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "ANSWERS", 0.02)
    monkeypatch.setattr(link_module, "BEAT", 0.05)
    now = 0.0
    sides = [Side(bus, str(number), lambda: now) for number in range(2)]
    await eventually(lambda: {side.link.owner for side in sides} == {False, True})
    dropped: list[str] = []
    for side in sides:
        monkeypatch.setattr(side.link, "_drop", dropped.append)
    now += link_module.SILENT + 0.1
    time.sleep(0.5)  # noqa: ASYNC251
    await eventually(lambda: all(peer.heard_at == now for side in sides for peer in side.link.peers.values()))
    assert dropped == []
    for side in sides:
        side.link.close()


async def test_a_leg_carries_what_is_said_here_alone(bus: ProcessBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "ANSWERS", 0.01)
    now = 0.0
    sides = [Side(bus, str(number), lambda: now) for number in range(3)]
    members = [side.mixer.join(str(number), None, 8000) for number, side in enumerate(sides)]
    await eventually(lambda: all(len(side.link.peers) == 2 for side in sides))
    at = np.arange(160) / 8000
    heard: list[list[Any]] = [[], [], []]
    for tick in range(100):
        for number, member in enumerate(members):
            hz = (500.0, 1000.0, 1750.0)[number]
            samples = np.rint(6000 * np.sin(2 * np.pi * hz * (at + tick * 0.02))).astype(np.int16)
            member.hear(Frame(samples, 8000, Track.INBOUND, 160 * tick, 0, 0), now)
        now += 0.02
        for side in sides:
            side.mixer.advance(now)
        for _ in range(5):
            await asyncio.sleep(0)
        for number, member in enumerate(members):
            heard[number].append(member.source(160, now))
    for number, own in enumerate((500.0, 1000.0, 1750.0)):
        there = dict(
            zip(CALLERS.values(), levels(np.concatenate(heard[number][40:]), 8000, *CALLERS.values()), strict=True)
        )
        self_heard = there.pop(own)
        assert min(there.values()) > LOUD
        assert min(there.values()) - self_heard >= 40
        # The one who is heard is told by name, wherever they are.
        told = {member.sid for member in sides[number].mixer.members if member.far}
        assert told <= {"", *(str(other) for other in range(3) if other != number)}
    # At another rate the leg begins anew.
    raised = sides[0].mixer.join("wide", None, 16_000)
    assert raised.rate == 16_000
    for _ in range(10):
        now += 0.02
        for side in sides:
            side.mixer.advance(now)
        for _ in range(5):
            await asyncio.sleep(0)
    assert sorted(member.rate for member in sides[1].mixer.members if member.far) == [16_000, 16_000]
    for side in sides:
        side.link.close()


class Call:
    """Two sides of a room, a member each, in time that is told; the second side's clock may run faster."""

    def __init__(self, bus: ProcessBus, ppm: float = 0) -> None:
        self.now = 0.0
        self.speed = [1.0, 1 + ppm * 1e-6]
        self.sides = [Side(bus, str(number), functools.partial(self.clock, number)) for number in range(2)]
        self.members = [side.mixer.join(f"s{number}", None, 8000) for number, side in enumerate(self.sides)]
        self.sent = [0, 0]
        self.says: list[float | None] = [500.0, 1000.0]
        self.heard: list[list[Samples]] = [[], []]

    def clock(self, number: int) -> float:
        return self.now * self.speed[number]

    async def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.01
            for number, (side, member) in enumerate(zip(self.sides, self.members, strict=True)):
                there = self.clock(number)
                # Each member goes by the clock of its own side.
                while self.sent[number] * 0.02 < there:
                    start, hz = 160 * self.sent[number], self.says[number]
                    self.sent[number] += 1
                    at = (start + np.arange(160)) / 8000
                    samples = np.rint(6000 * np.sin(2 * np.pi * hz * at)) if hz is not None else np.zeros(160)
                    member.hear(Frame(samples.astype(np.int16), 8000, Track.INBOUND, start, 0, 0), there)
                    self.heard[number].append(member.source(160, there))
                side.mixer.advance(there)
            for _ in range(3):
                await asyncio.sleep(0)

    def last(self, number: int, seconds: float) -> Samples:
        return np.concatenate(self.heard[number])[-round(8000 * seconds) :]

    def close(self) -> None:
        for side in self.sides:
            side.link.close()


@pytest.fixture
async def pair(bus: ProcessBus, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Call]:
    monkeypatch.setattr(link_module, "SILENT", 1000.0)
    pair = Call(bus)
    await eventually(lambda: all(side.link.peers for side in pair.sides))
    yield pair
    pair.close()


async def test_clocks_of_processes_that_differ(bus: ProcessBus, monkeypatch: pytest.MonkeyPatch) -> None:
    # Beats go by the loop's clock, which does not run ahead as ours does.
    monkeypatch.setattr(link_module, "SILENT", 1000.0)
    call = Call(bus, 500)
    await eventually(lambda: all(side.link.peers for side in call.sides))
    await call.run(150)
    for number in range(2):
        (leg,) = [member for member in call.sides[number].mixer.members if member.far]
        # 75 ms, in pitch periods.
        assert leg.jitter.inserted + leg.jitter.dropped >= 1
        assert leg.jitter.cuts == leg.jitter.concealed == 0
        # A tone has no pause: it is as late as may be mended in one.
        assert leg.jitter.delay < 0.07
        assert np.abs(np.diff(call.last(number, 145).astype(int))).max() < 6000 * 2 * np.pi * 1000 / 8000 * 1.1
    call.close()


async def test_a_peer_that_beats_and_says_nothing(pair: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    await pair.run(1)
    assert levels(pair.last(0, 0.5), 8000, 1000.0)[0] > LOUD
    with monkeypatch.context() as patch:
        patch.setattr(pair.sides[1].mixer.uplink, "on_block", lambda samples, position, at: None)
        await pair.run(2)
    # What was said last has faded; nobody else is hurt.
    assert not pair.last(0, 0.5).any()
    assert levels(pair.last(1, 0.5), 8000, 500.0)[0] > LOUD
    await pair.run(2)
    assert levels(pair.last(0, 0.5), 8000, 1000.0)[0] > LOUD
    assert np.abs(np.diff(pair.last(0, 4.9).astype(int))).max() < 6000 * 2 * np.pi * 1000 / 8000 * 1.1


async def test_what_others_write_on_the_bus_is_ignored(
    pair: Call, bus: ProcessBus, read_log: Callable[[], str]
) -> None:
    beats, audio = pair.sides[0].link._beats, pair.sides[0].link._audio
    other = pair.sides[1].link._id
    garbage = [
        (beats, b"garbage"),
        (beats, msgspec.msgpack.encode(["x", float("nan"), []])),
        (beats, msgspec.msgpack.encode(["x", 1.0, [["a", 1]]])),
        (audio, b""),
        (audio, msgspec.msgpack.encode([other, 8000, 0, b"odd", None, None])),
        (audio, msgspec.msgpack.encode([other, 1 << 40, 0, b"", None, None])),
        (audio, msgspec.msgpack.encode([other, 8000, 0, bytes(96_002), None, None])),
        (audio, msgspec.msgpack.encode([other, 8000, -1, b"", None, None])),
        (audio, msgspec.msgpack.encode([other, 8000, 1 << 60, b"", None, None])),
    ]
    await pair.run(1)
    for subject, octets in garbage * 2:
        bus.publish(subject, octets)
    # From somebody who has not been heard of.
    bus.publish(audio, msgspec.msgpack.encode(["x", 8000, 0, b"", None, None]))
    await pair.run(1)
    assert [side.link.ignored for side in pair.sides] == [2 * len(garbage)] * 2
    assert read_log().count("something else writes on the bus") == 2
    assert "Traceback" not in read_log()
    assert levels(pair.last(0, 0.5), 8000, 1000.0)[0] > LOUD


async def test_who_talks_elsewhere_is_told_by_name(pair: Call) -> None:
    told: list[str | None] = []
    pair.sides[0].mixer.on_speaker = lambda event: told.append(event.sid)
    pair.says[0] = None
    await pair.run(2)
    assert told == ["s1"]
    # Somebody else there goes on where the first one stops.
    second = pair.sides[1].mixer.join("s2", None, 8000)
    first, pair.members[1] = pair.members[1], second
    await pair.run(4)
    assert told == ["s1", "s2"]
    first.leave()
    pair.says[1] = None
    await pair.run(4)
    assert told == ["s1", "s2", None]


async def test_processes_share_the_limit_of_members(serve: Serve, bus: ProcessBus, tmp_path: Path) -> None:
    settings = {**ROOM, "rooms": {"crew": RoomSettings(max_members=3, processors=["record"], grace_seconds=0)}}
    sides = [await serve(**settings, recordings=tmp_path / name) for name in ("one", "two")]
    one, two = [running.server.endpoint.rooms for running in sides]
    one.bus = two.bus = bus
    room, first = one.join("crew", "a", None, 8000)
    there, second = two.join("crew", "b", None, 8000)
    await eventually(lambda: room.audience is not None and there.audience is None)
    # The same id in two processes is two members.
    _, third = two.join("crew", "a", "same", 8000)
    await eventually(lambda: sum(len(peer.members) for peer in room._peers) == 2)
    assert room.audience is not None
    assert [(member.sid, member.name) for member in room.audience.stream.members] == [
        ("a", None),
        ("b", None),
        ("a", "same"),
    ]
    with pytest.raises(RoomRefused, match="max_members"):
        one.join("crew", "c", None, 8000)
    metrics = sides[1].server.metrics.render()[0].decode()
    assert "streamsink_rooms_active 1.0" in metrics
    assert "streamsink_room_members 2.0" in metrics
    # A room that ends while a beat is on its way.
    there.leave(third)
    there.leave(second)
    room.leave(first)
    await eventually(lambda: "crew" not in one and "crew" not in two)


def test_workers_with_rooms_want_a_bus(tmp_path: Path) -> None:
    options: dict[str, Any] = {"state": tmp_path, "recordings": tmp_path / "r", "no_tls": True, "workers": 2}
    pipelines = {"agent": Pipeline(processors=["mix:room=a"]), "default": Pipeline(processors=["echo"])}
    with pytest.raises(ConfigError, match=r"pipeline agent has mix: .* --bus nats://127.0.0.1:4222"):
        Server(Settings(**options, pipelines=pipelines))
    Server(Settings(**options, pipelines=pipelines, bus="nats://127.0.0.1:4222"))
    Server(Settings(**options))
    with pytest.raises(ConfigError, match="got the scheme 'http'"):
        Server(Settings(**options, bus="http://a"))
