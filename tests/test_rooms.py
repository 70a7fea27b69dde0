"""Rooms over real sockets: who hears whom, what is recorded, and how rooms begin, refuse and end."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import soundfile

from streamsink.audio import Frame, Track
from streamsink.codec import CodecSpec
from streamsink.config import Pipeline, RoomSettings
from streamsink.errors import ProcessorError, RoomRefused, TalkBackOff
from streamsink.processor import Processor
from streamsink.processors.mix import Mix
from streamsink.simulator import SimulateOptions
from streamsink.simulator.simulation import Simulation
from streamsink.speech.events import Speaker, Transcript
from streamsink.stream import Stream
from tests.conftest import Serve
from tests.peer import STOP, TOKEN, Listener, Running, eventually, media, start
from tests.test_mixer import usual

pytestmark = pytest.mark.endpoint_loop

CALLERS = {"PCMU": 500.0, "G722": 1000.0, "L16@24000h": 1750.0}


class Whole(Processor):
    """Keeps what a room's processor is told."""

    made: ClassVar[list[Whole]] = []

    def __init__(self) -> None:
        self.frames: list[tuple[Track, int, int]] = []
        self.speakers: list[Speaker] = []
        self.transcripts: list[Transcript] = []
        self.reason = ""

    async def on_start(self, stream: Stream) -> None:
        self.stream = stream
        self.made.append(self)

    def on_frame(self, frame: Frame) -> None:
        self.frames.append((frame.track, frame.start, frame.sample_rate))

    def on_speaker(self, event: Speaker) -> None:
        self.speakers.append(event)

    def on_transcript(self, transcript: Transcript) -> None:
        self.transcripts.append(transcript)

    async def on_stop(self, reason: str) -> None:
        self.reason = reason


class Speakers(Processor):
    """Keeps what a member's processor is told of the active speaker."""

    speaks = False
    told: ClassVar[list[Speaker]] = []

    def on_speaker(self, event: Speaker) -> None:
        self.told.append(event)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Whole.made.clear()
    Speakers.told.clear()


def tone(path: Path, hz: float, seconds: float) -> Path:
    rate = 48_000
    samples = np.rint(6000 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.int16)
    soundfile.write(path, samples, rate)
    return path


def in_room(**settings: object) -> dict[str, object]:
    pipelines = {"default": Pipeline(processors=["mix:room_parameter=room,pattern=crew-*", "tests.peer:Listener"])}
    return {"no_tls": True, "pipelines": pipelines, **settings}


async def call(server: Running, tmp_path: Path, codec: str, hz: float, seconds: float) -> Path:
    back = tmp_path / f"{hz:g}.wav"
    options = SimulateOptions(
        file=tone(tmp_path / f"said_{hz:g}.wav", hz, seconds),
        url=server.server.url,
        token=TOKEN,
        codec=codec,
        param=("room=crew-7",),
        name=codec,
        seconds=seconds,
        save=back,
    )
    await Simulation(options).run()
    return back


async def test_three_callers_hear_the_two_others_and_the_recording_holds_all(serve: Serve, tmp_path: Path) -> None:
    pipelines = {
        "default": Pipeline(processors=["mix:room_parameter=room,pattern=crew-*", "tests.test_rooms:Speakers"])
    }
    server = await serve(
        no_tls=True,
        pipelines=pipelines,
        rooms={"crew-*": RoomSettings(processors=["record", "tests.test_rooms:Whole"], grace_seconds=0.05)},
    )
    backs = await asyncio.gather(*(call(server, tmp_path, codec, hz, 4) for codec, hz in CALLERS.items()))
    recordings = tmp_path / "recordings"
    await eventually(lambda: list(recordings.glob("*.json")))
    for (codec, own), back in zip(CALLERS.items(), backs, strict=True):
        heard, rate = soundfile.read(back, dtype="int16")
        assert rate == CodecSpec.parse(codec).rate
        middle = heard[round(1.5 * rate) : round(3.3 * rate)]
        there = usual(middle, rate, *(hz for hz in CALLERS.values() if hz != own))
        assert min(there) > 20 * np.log10(6000) - 2
        # 40 dB and more between those who are heard and oneself.
        (self_heard,) = usual(middle, rate, own)
        assert min(there) - self_heard >= 40
    (sidecar,) = recordings.glob("*.json")
    assert "_crew-7" in sidecar.name
    told = json.loads(sidecar.read_text())
    assert (told["stream_sid"], told["complete"], told["close_code"]) == ("crew-7", True, 1000)
    assert sorted(member["name"] for member in told["members"]) == sorted(CALLERS)
    assert all(0 <= member["joined"] < 2 < member["left"] for member in told["members"])
    whole, rate = soundfile.read(sidecar.with_suffix(".wav"), dtype="int16")
    assert whole.ndim == 1
    assert min(usual(whole[round(1.5 * rate) : round(3.3 * rate)], rate, *CALLERS.values())) > 20 * np.log10(6000) - 2
    (processor,) = Whole.made
    assert {track for track, _, _ in processor.frames} == {Track.MIX}
    assert processor.reason == "stop"
    # All in, all out again, in the order of joining, on the room's clock.
    assert sorted(str(member.name) for member in processor.stream.members) == sorted(CALLERS)
    for member in processor.stream.members:
        assert member.left is not None
        assert 0 <= member.joined < 2 < member.left < 20
    # Somebody talked, and the room's processors and the members' were told the same.
    assert processor.speakers[0].sid in {member.sid for member in processor.stream.members}
    assert Speakers.told.count(processor.speakers[0]) == 3


async def test_who_may_not_join_goes_on_alone(serve: Serve) -> None:
    server = await serve(**in_room(rooms={"crew-*": RoomSettings(max_members=1, grace_seconds=0)}))
    first = await server.stream()
    first.send(start(first.sid, customParameters={"room": "crew-1"}))
    await eventually(lambda: "crew-1" in server.server.endpoint.rooms)
    alone = {"full": {"room": "crew-1"}, "strange": {"room": "board"}, "number": {"room": 5}, "none": {}}
    alone["unsafe"] = {"room": "crew-../../etc"}
    for parameters in alone.values():
        peer = await server.stream()
        peer.send(start(peer.sid, customParameters=parameters), media(0))
        listener = await Listener.of(peer.sid)
        await listener.until(lambda of: len(of.frames) == 1)
    assert len(server.server.endpoint.rooms) == 1
    assert len(server.server.endpoint.rooms["crew-1"].mixer.members) == 1
    told = server.log
    assert "the room has its 1 members (max_members)" in told
    assert told.count("the room's name does not fit the pattern `crew-*`") == 2
    assert "the stream has no custom parameter `room`" in told
    assert "a room's name is 1 to 64 letters, digits" in told
    for value in ("board", "etc"):
        assert value not in told
    first.send(STOP)
    await eventually(lambda: len(server.server.endpoint.rooms) == 0)
    # Nothing is left of it.
    await server.server.endpoint.rooms.close("shutdown")
    assert not server.server.endpoint.rooms._unfinished


async def test_a_room_waits_a_grace_and_is_taken_up_again(serve: Serve) -> None:
    server = await serve(
        **in_room(rooms={"crew-*": RoomSettings(processors=["tests.test_rooms:Whole"], grace_seconds=60)})
    )
    rooms = server.server.endpoint.rooms

    def so_far() -> int:
        audience = rooms["crew-1"].audience if "crew-1" in rooms else None
        return len(audience.stream.members) if audience is not None else 0

    for turn in (1, 2):
        peer = await server.stream()
        peer.send(start(peer.sid, customParameters={"room": "crew-1"}))
        await eventually(lambda turn=turn: so_far() == turn)  # type: ignore[misc]
        peer.send(STOP)
        await eventually(lambda: not rooms["crew-1"].mixer.members)
    (whole,) = Whole.made
    assert whole.reason == ""
    # What listens can say what it understood, and nothing else.
    with pytest.raises(TalkBackOff, match="a room's processors only listen"):
        whole.stream.play(np.zeros(8, np.int16), 8000)
    with pytest.raises(RoomRefused, match="a room cannot join a room"):
        _ = whole.stream.rooms
    transcript = Transcript(0, 0, "hello", True, 0.0, 1.0)
    whole.stream.transcribed(transcript)
    assert whole.transcripts == [transcript]
    await whole.stream.close("enough")
    room_closed = eventually(lambda: whole.reason == "closed")
    await room_closed
    assert len(rooms) == 0


async def test_the_end_of_the_endpoint_is_the_end_of_its_rooms(serve: Serve) -> None:
    server = await serve(
        **in_room(rooms={"crew-*": RoomSettings(processors=["tests.test_rooms:Whole"], grace_seconds=60)})
    )
    peer = await server.stream()
    peer.send(start(peer.sid, customParameters={"room": "crew-1"}))
    await eventually(lambda: Whole.made and Whole.made[0].frames)
    await server.server.endpoint.rooms.close("shutdown")
    assert Whole.made[0].reason == "shutdown"
    assert len(server.server.endpoint.rooms) == 0


async def test_a_room_may_be_named_after_the_path_or_in_the_settings(serve: Serve) -> None:
    pipelines = {
        "sales": Pipeline(processors=["mix:room_path=true,mode=listen"]),
        "lobby": Pipeline(processors=["mix:room=hall,gain_db=-6"]),
        "mute": Pipeline(processors=["mix:room=hall"], talk_back=False),
    }
    server = await serve(no_tls=True, pipelines=pipelines)
    rooms = server.server.endpoint.rooms
    for path in pipelines:
        peer = await server.stream(f"/{path}")
        peer.send(start(peer.sid))
        if path == "mute":
            break
        await eventually(lambda path=path: {"sales": "sales", "lobby": "hall"}[path] in rooms)  # type: ignore[misc]
    (member,) = rooms["sales"].mixer.members
    assert (member.mode, member.sid in server.server.endpoint.live) == ("listen", True)
    assert rooms["hall"].mixer.members[0].gain_db == pytest.approx(-6)
    assert rooms["hall"].mixer.rate == 8000
    # It cannot be sent anything: it is in no room, and the log says why.
    await eventually(lambda: "talk_back = false" in server.log)
    assert len(rooms["hall"].mixer.members) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "mix wants one of room=NAME"),
        ({"room": "a", "room_path": True}, "mix wants one of room=NAME"),
        ({"room": "a", "gain_db": 21.0}, "gain_db is 21; wanted -100 to 20 dB"),
        ({"room": "../../x"}, "wanted 1 to 64 letters"),
    ],
)
def test_options_that_do_not_fit_are_told(options: dict[str, object], message: str) -> None:
    with pytest.raises(ProcessorError, match=message):
        Mix(**options)  # type: ignore[arg-type]
