"""Mixing in virtual time: everybody hears all others and not themselves; loudness is held, nothing wraps or clicks."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.bench_mixing import delays
from streamsink.audio import Frame, Samples, Track
from streamsink.room.jitter import JitterBuffer
from streamsink.room.limiter import Limiter
from streamsink.room.mixer import TICK, Member, Mixer, Mode
from streamsink.room.speaker import ActiveSpeaker
from streamsink.speech.events import Speaker


def sine(hz: float, rate: int, start: int, n: int, level: float = 6000) -> Samples:
    wave: Samples = np.rint(level * np.sin(2 * np.pi * hz * np.arange(start, start + n) / rate)).astype(np.int16)
    return wave


class Leg:
    """A member with a voice: a tone on a clock of its own, in packets of its own length."""

    def __init__(
        self,
        room: Virtual,
        hz: float,
        rate: int = 8000,
        ptime: int = 20,
        ppm: float = 0,
        mode: Mode = "both",
        level: float = 6000,
        sid: str = "",
    ) -> None:
        self.member = room.mixer.join(sid or f"{hz:g}", None, rate, mode)
        self.hz, self.rate, self.level = hz, rate, level
        self.n = rate * ptime // 1000
        self.period = ptime / 1000 / (1 + ppm * 1e-6)
        self.began = room.now + 0.003
        self.sent = 0
        self.pulled = 0
        self.heard: list[Samples] = []
        room.legs.append(self)

    def go(self, now: float) -> None:
        while (at := self.began + (self.sent + 1) * self.period) <= now:
            start = self.sent * self.n
            samples = sine(self.hz, self.rate, start, self.n, self.level)
            self.member.hear(Frame(samples, self.rate, Track.INBOUND, start, 0, self.sent), at)
            self.sent += 1
        while (at := self.began + 0.007 + self.pulled * self.period) <= now:
            self.heard.append(self.member.source(self.n, at))
            self.pulled += 1

    def all(self, skip: float = 0.5) -> Samples:
        return np.concatenate(self.heard)[round(skip * self.rate) :]


class Virtual:
    def __init__(self, rate: int = 8000, *, fixed: bool = False) -> None:
        self.now = 100.0
        self.step = 0.005
        self.mixer = Mixer(rate, self.now, fixed=fixed)
        self.legs: list[Leg] = []

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += self.step
            for leg in self.legs:
                leg.go(self.now)
            self.mixer.advance(self.now)


class Broken(JitterBuffer):
    def pull(self, n: int, now: float) -> Samples:
        raise RuntimeError("its leg is broken")


def levels(samples: Samples, rate: int, *hz: float) -> list[float]:
    """How loud each tone is, in dB above the amplitude 1."""
    window = np.blackman(len(samples))
    spectrum = np.abs(np.fft.rfft(samples * window)) / window.sum() * 2
    found = []
    for each in hz:
        at = round(each * len(samples) / rate)
        found.append(20 * np.log10(spectrum[max(0, at - 4) : at + 5].max() + 1e-3))
    return found


def usual(samples: Samples, rate: int, *hz: float) -> list[float]:
    """The same in most tenths of a second: where a busy machine made a hole is one of the others."""
    blocks = np.array_split(samples, len(samples) * 10 // rate)
    return [float(level) for level in np.median([levels(block, rate, *hz) for block in blocks], axis=0)]


def steepest(samples: Samples) -> int:
    return int(np.abs(np.diff(samples.astype(np.int32))).max(initial=0))


def test_each_hears_the_others_at_every_rate_and_ptime() -> None:
    room = Virtual(24_000)
    legs = [Leg(room, 400), Leg(room, 700, 16_000, 60), Leg(room, 1000, 24_000, 10), Leg(room, 1300, 44_100, 40)]
    room.run(1)
    concealed = [leg.member.out.concealed for leg in legs]
    room.run(2)
    assert room.mixer.rate == 44_100
    for leg in legs:
        heard = leg.all(1.0)
        assert len(heard) > leg.rate
        for other in legs:
            (level,) = levels(heard, leg.rate, other.hz)
            wanted = 20 * np.log10(6000)
            assert (level < wanted - 50) if other is leg else (level == pytest.approx(wanted, abs=0.5))
        assert leg.member.jitter.concealed == 0
    assert [leg.member.out.concealed for leg in legs] == concealed


def test_modes() -> None:
    room = Virtual()
    listener, speaker, both = Leg(room, 400, mode="listen"), Leg(room, 700, mode="speak"), Leg(room, 1000)
    room.run(2)
    there, gone = pytest.approx(75.6, abs=0.5), pytest.approx(-60, abs=75)
    assert levels(listener.all(), 8000, 400, 700, 1000) == [gone, there, there]
    assert levels(both.all(), 8000, 400, 700, 1000) == [gone, there, gone]
    assert not speaker.all().any()


def test_mute_gain_and_deafen_at_run_time_without_a_click() -> None:
    room = Virtual()
    ears, voice = Leg(room, 400), Leg(room, 1000)
    room.run(1)
    voice.member.muted = True
    room.run(1)
    assert not np.concatenate(ears.heard)[-1600:].any()
    voice.member.gain_db = -20
    assert voice.member.muted
    assert voice.member.gain_db == pytest.approx(-20)
    voice.member.muted = False
    room.run(1)
    assert levels(np.concatenate(ears.heard)[-4000:], 8000, 1000) == [pytest.approx(55.6, abs=0.5)]
    voice.member.gain_db = 6
    room.run(1)
    assert levels(np.concatenate(ears.heard)[-4000:], 8000, 1000) == [pytest.approx(81.6, abs=0.5)]
    ears.member.deafened = True
    assert ears.member.deafened
    room.run(1)
    assert not np.concatenate(ears.heard)[-1600:].any()
    ears.member.deafened = False
    room.run(1)
    assert levels(np.concatenate(ears.heard)[-4000:], 8000, 1000) == [pytest.approx(81.6, abs=0.5)]
    assert steepest(ears.all(0)) <= 1.05 * steepest(sine(1000, 8000, 0, 800, 12_000))
    with pytest.raises(ValueError, match="gain_db is 21; wanted -100 to 20 dB"):
        voice.member.gain_db = 21


def test_who_leaves_fades_and_the_others_go_on() -> None:
    room = Virtual()
    ears, going, staying = Leg(room, 400), Leg(room, 1000), Leg(room, 700)
    room.run(1)
    room.legs.remove(going)
    going.member.leave()
    going.member.leave()
    assert going.member not in room.mixer.members
    room.run(1)
    end = np.concatenate(ears.heard)
    assert levels(end[-4000:], 8000, 700, 1000) == [pytest.approx(75.6, abs=0.5), pytest.approx(-60, abs=75)]
    assert steepest(end) <= steepest(sine(1000, 8000, 0, 800)) + steepest(sine(700, 8000, 0, 800))
    assert staying.member.level_dbfs == pytest.approx(20 * np.log10(6000 / np.sqrt(2) / 32768), abs=0.5)
    assert going.member.level_dbfs == -100


def test_a_higher_rate_comes_without_a_click_and_a_fixed_one_stays() -> None:
    room = Virtual()
    ears, voice = Leg(room, 400), Leg(room, 1000)
    whole: list[Samples] = []
    positions: list[int] = []

    def on_mix(samples: Samples, position: int, at: float) -> None:
        whole.append(samples)
        positions.append(position)

    room.mixer.on_mix = on_mix
    room.run(2)
    high = Leg(room, 6000, 24_000)
    room.run(2)
    assert room.mixer.rate == 24_000
    heard = ears.all(0)
    assert steepest(heard) <= 1.2 * steepest(sine(1000, 8000, 0, 800))
    assert levels(heard[-8000:], 8000, 1000) == [pytest.approx(75.6, abs=0.5)]
    assert levels(voice.all(3), 8000, 400) == [pytest.approx(75.6, abs=0.5)]
    assert levels(high.all(1), 24_000, 400, 1000) == [pytest.approx(75.6, abs=0.5)] * 2
    # What listens to the whole keeps the rate it began with.
    assert {len(block) for block in whole} == {160}
    assert positions == list(range(0, 160 * len(positions), 160))
    fixed = Virtual(8000, fixed=True)
    Leg(fixed, 400)
    Leg(fixed, 700, 48_000)
    fixed.run(0.1)
    assert fixed.mixer.rate == 8000


def test_a_member_that_fails_is_taken_out_and_the_others_hear_each_other() -> None:
    room = Virtual()
    ears, voice, broken, deaf = Leg(room, 400), Leg(room, 1000), Leg(room, 700), Leg(room, 1300)
    failures: list[tuple[Member, Exception]] = []
    room.mixer.failed = lambda member, error: failures.append((member, error))
    room.run(1)

    def fail(*args: object) -> None:
        raise RuntimeError("its leg is broken")

    deaf.member.on_block = fail
    broken.member.jitter = Broken(8000)
    room.run(1)
    assert {member for member, _ in failures} == {broken.member, deaf.member}
    assert room.mixer.members == [ears.member, voice.member]
    assert levels(np.concatenate(ears.heard)[-4000:], 8000, 1000) == [pytest.approx(75.6, abs=0.5)]


def test_who_does_not_read_hurts_nobody_else_and_hears_on_when_they_do() -> None:
    room = Virtual()
    ears, voice, slow = Leg(room, 400), Leg(room, 1000), Leg(room, 700)
    room.run(1)
    room.legs.remove(slow)
    room.run(10)
    assert slow.member.out.level < 8000 * 0.5
    assert levels(np.concatenate(ears.heard)[-4000:], 8000, 1000) == [pytest.approx(75.6, abs=0.5)]
    assert voice.member.out.concealed == ears.member.out.concealed
    slow.sent, slow.pulled = 0, 0
    slow.began = room.now
    slow.heard.clear()
    room.legs.append(slow)
    room.run(3)
    assert levels(slow.all(1), 8000, 400, 1000) == [pytest.approx(75.6, abs=0.5)] * 2
    assert slow.member.out.delay < 0.06


def test_a_leg_that_lives_elsewhere_gets_every_tick() -> None:
    room = Virtual(16_000)
    Leg(room, 1000)
    far = room.mixer.join("far", None, 16_000)
    blocks: list[tuple[int, int, float]] = []
    far.on_block = lambda samples, position, at: blocks.append((len(samples), position, at))
    room.run(1)
    assert [n for n, _, _ in blocks] == [320] * len(blocks)
    assert [position for _, position, _ in blocks] == list(range(0, 320 * len(blocks), 320))
    assert np.diff([at for _, _, at in blocks]) == pytest.approx(TICK)
    assert len(blocks) == 50


def test_what_is_far_behind_is_left_out() -> None:
    mixer = Mixer(8000, 0.0)
    positions: list[int] = []
    mixer.on_mix = lambda samples, position, at: positions.append(position)
    mixer.advance(0.1)
    mixer.advance(60.0)
    assert len(positions) <= 5 + 51
    assert positions[-1] == (mixer.ticks - 1) * 160
    assert mixer.due == pytest.approx(60.0, abs=2 * TICK)


@pytest.mark.timeout(600)
def test_two_whose_clocks_differ_talk_for_an_hour() -> None:
    room = Virtual()
    room.step = 0.02
    fast, slow = Leg(room, 210, ppm=100), Leg(room, 330, ppm=-100)
    usual = {fast: steepest(sine(330, 8000, 0, 8000)), slow: steepest(sine(210, 8000, 0, 8000))}
    room.run(2)
    for leg in (fast, slow):
        leg.heard.clear()
    for _ in range(60):
        room.run(60)
        for leg in (fast, slow):
            heard = np.concatenate(leg.heard)
            # Neither a skip nor a hole: the tone goes on through all that is mended, in both directions.
            assert steepest(heard) <= 1.05 * usual[leg]
            rms = np.sqrt(np.mean(heard[: len(heard) // 160 * 160].reshape(-1, 160).astype(float) ** 2, axis=1))
            assert rms.min() > 0.8 * 6000 / np.sqrt(2)
            leg.heard.clear()
    for leg in (fast, slow):
        for buffer in (leg.member.jitter, leg.member.out):
            assert (buffer.concealed, buffer.cuts) == (0, 0)
            assert buffer.inserted + buffer.dropped > 20


# --- The limiter ---


def distortion(samples: NDArray[np.int16], hz: float, rate: int) -> float:
    """Total harmonic distortion: the root of all power but the tone's, against the tone."""
    t = np.arange(len(samples)) / rate
    basis = np.array([np.cos(2 * np.pi * hz * t), np.sin(2 * np.pi * hz * t)]).T
    x = samples.astype(float)
    own = basis @ np.linalg.lstsq(basis, x, rcond=None)[0]
    return float(np.sqrt(np.mean((x - own) ** 2) / np.mean(own**2)))


def test_a_single_full_scale_talker_passes_undistorted() -> None:
    room = Virtual(16_000)
    ears = Leg(room, 400, 16_000, level=0)
    Leg(room, 1000, 16_000, level=32_767)
    room.run(3)
    heard = ears.all(1)[:16_000]
    assert distortion(heard, 1000, 16_000) < 0.001
    assert heard.max() == 32_767


@pytest.mark.parametrize("hz", [100, 1000, 3000])
def test_one_twice_as_loud_as_there_is_room_for_stays_a_sine(hz: float) -> None:
    limiter = Limiter(320)
    limiter.add()
    sums = np.rint(65_534 * np.sin(2 * np.pi * hz * np.arange(64_000) / 16_000)).astype(np.int32)
    out = np.concatenate([limiter.push(sums[None, at : at + 320])[0] for at in range(0, 64_000, 320)])
    assert np.abs(out.astype(int)).max() <= 32_768
    assert distortion(out[32_000:], hz, 16_000) < 0.01


def test_eight_full_scale_talkers_give_no_sample_over() -> None:
    room = Virtual(16_000)
    legs = [Leg(room, 300 + 170 * k, 16_000, level=32_767) for k in range(8)]
    room.run(3)
    for leg in legs:
        heard = leg.all(1)
        # Clipped, the tops would be flat; wrapped, they would jump.
        top = np.abs(heard.astype(int)) >= 32_766
        assert not (top[:-3] & top[1:-2] & top[2:-1] & top[3:]).any()
        assert steepest(heard) < 32_767
        own, *others = levels(heard, 16_000, leg.hz, *(other.hz for other in legs if other is not leg))
        assert own < min(others) - 30
        assert max(others) - min(others) < 1


@pytest.mark.parametrize("block", [160, 320, 480, 640, 882, 960])
def test_no_sums_whatever_leave_the_range(block: int) -> None:
    random = np.random.default_rng(block)
    limiter = Limiter(block)
    for _ in range(3):
        limiter.add()
    limiter.add()
    limiter.remove(1)
    blocks = []
    for k in range(60):
        scale = (40_000_000, 60_000, 100)[k // 20 % 3]
        sums = random.integers(-scale, scale, (3, block)).astype(np.int32)
        out = limiter.push(sums)
        assert out.dtype == np.int16
        blocks.append((sums, out))
    # The sign of nothing is turned: what wraps around is.
    for row in range(3):
        put = np.concatenate([sums[row] for sums, _ in blocks])[: -limiter.lag]
        got = np.concatenate([out[row] for _, out in blocks])[limiter.lag :]
        assert (np.sign(put) * np.sign(got) >= 0).all()


def test_what_needs_no_limiting_passes_bit_by_bit() -> None:
    random = np.random.default_rng(3)
    limiter = Limiter(160)
    limiter.add()
    sums = random.integers(-32_768 + 1, 32_767, (1, 1600)).astype(np.int32)
    out = np.concatenate([limiter.push(sums[:, at : at + 160])[0] for at in range(0, 1600, 160)])
    assert out[limiter.lag :].tolist() == sums[0, : -limiter.lag].tolist()


# --- Who talks ---


def test_the_active_speaker_is_told_with_hysteresis() -> None:
    room = Virtual()
    anna, ben = Leg(room, 400, sid="anna"), Leg(room, 700, sid="ben")
    told: list[Speaker] = []
    also: list[Speaker] = []
    room.mixer.on_speaker = told.append
    ben.member.on_speaker = also.append
    anna.level, ben.level = 3000.0, 0.0
    room.run(2)
    assert [event.sid for event in told] == ["anna"]
    assert told[0].since < 0.2
    assert told[0].level_dbfs == pytest.approx(20 * np.log10(3000 / np.sqrt(2) / 32768), abs=1)
    # Not much louder, and much louder but for a moment: neither takes over.
    ben.level = 3500.0
    room.run(1)
    ben.level = 9000.0
    room.run(0.15)
    ben.level = 0.0
    room.run(1)
    assert len(told) == 1
    anna.level, ben.level = 0.0, 3000.0
    room.run(2)
    assert [event.sid for event in told] == ["anna", "ben"]
    assert told[1].since == pytest.approx(4.2, abs=0.6)
    ben.level = 0.0
    room.run(3)
    assert [event.sid for event in told] == ["anna", "ben", None]
    assert told[2].level_dbfs == -100
    assert also == told


def test_a_speaker_who_leaves_makes_room() -> None:
    speaker: ActiveSpeaker[str] = ActiveSpeaker()
    for k in range(40):
        speaker.observe({"anna": 3000.0, "ben": 2900.0}, k * TICK, TICK)
    assert speaker.current == "anna"
    speaker.forget("anna")
    for k in range(40, 80):
        speaker.observe({"ben": 2900.0}, k * TICK, TICK)
    assert speaker.current == "ben"
    speaker.observe({"ben": 2900.0, "anna": 30000.0}, 1.6, TICK)
    speaker.forget("anna")
    assert speaker.level("anna") == -100


@pytest.mark.parametrize("ppm", [0, 200])
def test_a_room_adds_80_ms_at_most_from_mouth_to_ear(ppm: float) -> None:
    for number in range(10):
        phases = (0.0005 + 0.002 * number, 0.0193 - 0.0017 * number)
        found = delays((8000, 16_000), phases, 10, ppm * 1e-6)
        assert len(found) > 30
        assert max(found) <= 0.08
