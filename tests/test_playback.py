import asyncio
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from streamsink.audio import Samples
from streamsink.codec import CodecSpec
from streamsink.errors import CodecError, PlayoutFull, StreamClosed
from streamsink.pacer import Pacer
from streamsink.playback import LEAD, Playback
from streamsink.playout import Outcome, Played, Playout
from streamsink.wire import Writer
from tests.far_end import FarEnd, ramp, wait


def test_a_frame_played_on_an_idle_stream_leaves_at_once() -> None:
    far_end = FarEnd()
    far_end.playback.play(ramp(160), 8000)
    assert far_end.events == "m"
    assert far_end.audio.tolist() == ramp(160).tolist()
    assert far_end.playback.due is None


def test_audio_is_sent_as_long_as_the_lead_allows_and_then_at_its_own_pace() -> None:
    far_end = FarEnd()
    far_end.playback.play(ramp(8000), 8000)
    assert far_end.frames == 5
    times: list[float] = []
    while far_end.playback.due is not None and len(times) < 100:
        far_end.now = far_end.playback.due
        far_end.playback.advance(far_end.now)
        times.append(round(far_end.now - 100, 3))
    # The pace is absolute: a frame each 20 ms from the start, never drifting.
    assert times == [round(k * 0.02, 3) for k in range(1, 46)]
    assert far_end.frames == 50
    assert far_end.audio.tolist() == ramp(8000).tolist()


def test_a_late_tick_sends_what_fell_due_meanwhile() -> None:
    far_end = FarEnd()
    far_end.playback.play(ramp(8000), 8000)
    far_end.now += 0.06
    far_end.playback.advance(far_end.now)
    assert far_end.frames == 5 + 3


def test_pieces_of_any_size_join_without_a_seam() -> None:
    far_end = FarEnd()
    audio = ramp(1600)
    for start in range(0, 1600, 70):
        far_end.playback.play(audio[start : start + 70], 8000)
    far_end.run(1)
    assert far_end.audio.tolist() == audio.tolist()


def test_a_last_frame_that_is_not_full_waits_for_more_and_then_leaves_with_silence() -> None:
    far_end = FarEnd()
    far_end.playback.play(ramp(200), 8000)
    assert far_end.frames == 1
    assert far_end.playback.due == pytest.approx(100.02)
    far_end.run(1)
    assert far_end.audio.tolist() == ramp(200).tolist() + [0] * 120


def test_another_rate_is_resampled_across_pieces() -> None:
    far_end = FarEnd()
    audio = (8000 * np.sin(np.arange(24_000) * 2 * np.pi * 440 / 24_000)).astype(np.int16)
    for start in range(0, 24_000, 999):
        far_end.playback.play(audio[start : start + 999], 24_000)
    far_end.run(3)
    heard = far_end.audio.astype(float)
    # One second and the filter's tail, in whole frames.
    assert len(heard) == 8160
    steady = heard[500:7500]
    phase = np.arange(len(steady)) * 2 * np.pi * 440 / 8000
    basis = np.stack([np.sin(phase), np.cos(phase)], axis=1)
    fit, *_ = np.linalg.lstsq(basis, steady, rcond=None)
    assert np.hypot(*fit) == pytest.approx(8000, rel=0.01)
    assert np.abs(steady - basis @ fit).max() < 20


@pytest.mark.parametrize("seconds", [0.4, 0.41, 0.419])
def test_the_tail_of_the_resampler_is_heard(seconds: float) -> None:
    far_end = FarEnd()
    audio = np.zeros(int(24_000 * seconds), np.int16)
    audio[-3:] = 20_000
    far_end.playback.play(audio, 24_000)
    far_end.run(2)
    # The pulse at the very end comes out whole: its sum is that of the input, at a third of the rate.
    assert far_end.audio.astype(int).sum() == pytest.approx(20_000, rel=0.05)


def test_rates_may_alternate() -> None:
    far_end = FarEnd()
    for rate in (8000, 16_000, 24_000, 8000):
        far_end.playback.play(ramp(rate // 10), rate)
    far_end.run(2)
    # Four times 100 ms, and at most the tails of two filters.
    assert 3200 <= len(far_end.audio) <= 3200 + 160


async def test_a_playout_tells_when_it_was_heard() -> None:
    far_end = FarEnd()
    playout = far_end.playback.play(ramp(1600), 8000)
    waiter = asyncio.ensure_future(wait(playout))
    await asyncio.sleep(0)
    far_end.run(0.05)
    assert playout.played_ms == 50
    assert not waiter.done()
    far_end.run(0.2)
    assert await waiter == Played(Outcome.FINISHED, 200)
    assert await playout == Played(Outcome.FINISHED, 200)
    assert playout.played_ms == 200


async def test_a_waiter_that_gives_up_does_not_end_it_for_others() -> None:
    far_end = FarEnd()
    playout = far_end.playback.play(ramp(160), 8000)
    first, second = (asyncio.ensure_future(wait(playout)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    far_end.run(0.1)
    assert await second == Played(Outcome.FINISHED, 20)


async def test_an_empty_playout_ends_when_what_is_before_it_does() -> None:
    far_end = FarEnd()
    assert await _run_with(far_end, far_end.playback.play(ramp(0), 8000)) == Played(Outcome.FINISHED, 0)
    far_end.playback.play(ramp(320), 8000)
    assert await _run_with(far_end, far_end.playback.play(ramp(0), 16_000)) == Played(Outcome.FINISHED, 0)


async def _run_with(far_end: FarEnd, playout: Any) -> Played:
    waiter = asyncio.ensure_future(wait(playout))
    await asyncio.sleep(0)
    far_end.run(1)
    return await waiter


async def test_cancel_takes_out_its_own_audio_and_what_followed_moves_up() -> None:
    far_end = FarEnd()
    first = far_end.playback.play(ramp(1600), 8000)
    far_end.playback.play(np.full(160, 7, np.int16), 8000)
    far_end.run(0.02)
    first.cancel()
    far_end.run(1)
    heard = far_end.audio
    assert heard[:960].tolist() == ramp(1600)[:960].tolist()
    assert heard[960:].tolist() == [7] * 160
    # 20 ms were heard when it was cancelled.
    assert await first == Played(Outcome.CANCELLED, 20)
    first.cancel()
    assert await first == Played(Outcome.CANCELLED, 20)


async def test_cancel_of_what_waits_in_the_queue() -> None:
    far_end = FarEnd()
    far_end.playback.play(ramp(1600), 8000)
    second = far_end.playback.play(ramp(160), 8000)
    second.cancel()
    far_end.run(1)
    assert far_end.frames == 10
    assert await second == Played(Outcome.CANCELLED, 0)


async def test_clear_drops_all_in_one_step() -> None:
    far_end = FarEnd()
    first = far_end.playback.play(ramp(1600), 8000)
    far_end.playback.mark("sent?")
    second = far_end.playback.play(ramp(100), 8000)
    far_end.run(0.05)
    assert far_end.playback.clear() == ["sent?"]
    assert far_end.events == "m" * 7 + "c"
    assert await first == Played(Outcome.INTERRUPTED, 50)
    assert await second == Played(Outcome.INTERRUPTED, 0)
    far_end.run(1)
    assert far_end.events == "m" * 7 + "c"
    # What comes after starts at once: the far end's queue is empty.
    far_end.playback.play(ramp(160), 8000)
    assert far_end.events == "m" * 7 + "cm"


async def test_clear_leaves_what_was_heard_finished() -> None:
    far_end = FarEnd()
    first = far_end.playback.play(ramp(160), 8000)
    far_end.now += 0.03
    far_end.playback.clear()
    assert await first == Played(Outcome.FINISHED, 20)


def test_marks_leave_behind_the_audio_before_them() -> None:
    far_end = FarEnd()
    far_end.playback.mark("at once")
    far_end.playback.play(ramp(200), 8000)
    far_end.playback.mark("behind")
    far_end.playback.play(ramp(440), 8000)
    far_end.run(1)
    assert far_end.events == "kmmkmm"
    assert [m.mark.name for m in far_end.sent if m.mark is not None] == ["at once", "behind"]


def test_an_echo_resolves_its_mark_once() -> None:
    far_end = FarEnd()
    far_end.playback.mark("m")
    assert far_end.playback.mark_echoed("m", far_end.now)
    assert not far_end.playback.mark_echoed("m", far_end.now)
    assert not far_end.playback.mark_echoed("never sent", far_end.now)


def test_a_late_echo_of_a_cleared_mark_is_none_of_a_new_one() -> None:
    far_end = FarEnd()
    far_end.playback.mark("m")
    assert far_end.playback.clear() == ["m"]
    far_end.playback.mark("m")
    assert not far_end.playback.mark_echoed("m", far_end.now)
    assert far_end.playback.mark_echoed("m", far_end.now)


def test_marks_of_one_name_resolve_in_order() -> None:
    far_end = FarEnd()
    for name in ("a", "b", "a"):
        far_end.playback.mark(name)
    assert far_end.playback.mark_echoed("b", far_end.now)
    assert far_end.playback.clear() == ["a", "a"]


async def test_close_ends_everything() -> None:
    far_end = FarEnd()
    playout = far_end.playback.play(ramp(1600), 8000)
    far_end.playback.mark("m")
    far_end.run(0.04)
    assert far_end.playback.close() == ["m"]
    assert await playout == Played(Outcome.CLOSED, 40)
    for use in (
        lambda: far_end.playback.play(ramp(1), 8000),
        lambda: far_end.playback.mark("m"),
        lambda: far_end.playback.clear(),
        lambda: far_end.playback.dtmf("1"),
    ):
        with pytest.raises(StreamClosed, match="the stream has ended"):
            use()


def test_a_digit_overtakes_the_queue() -> None:
    far_end = FarEnd()
    far_end.playback.play(ramp(8000), 8000)
    far_end.playback.dtmf("#")
    assert far_end.events == "mmmmmd"


def test_a_socket_that_takes_no_more_holds_audio_back() -> None:
    far_end = FarEnd()
    far_end.playback.set_writable(False)
    far_end.playback.play(ramp(160), 8000)
    assert far_end.events == ""
    assert far_end.playback.due is None
    far_end.playback.set_writable(True)
    assert far_end.events == "m"


def test_the_ptime_may_change() -> None:
    far_end = FarEnd("PCMU")
    far_end.playback.play(ramp(160), 8000)
    far_end.playback.set_ptime(40)
    far_end.playback.play(ramp(320), 8000)
    assert [len(m.media.payload) for m in far_end.sent if m.media is not None] == [160, 320]


def test_l16_goes_out_in_the_byte_order_asked_for() -> None:
    far_end = FarEnd("L16@8000h")
    far_end.playback.play(np.full(160, 0x0102, np.int16), 8000)
    far_end.playback.set_byteorder("big")
    far_end.playback.play(np.full(160, 0x0102, np.int16), 8000)
    first, second = (m.media.payload for m in far_end.sent if m.media is not None)
    assert (first[:2], second[:2]) == (b"\x02\x01", b"\x01\x02")


def test_what_was_heard_is_reported_when_its_time_has_passed() -> None:
    far_end = FarEnd(listen=True)
    far_end.playback.play(ramp(480), 8000)
    assert far_end.heard == []
    far_end.run(0.045)
    assert far_end.heard == [(100.0, 160), (100.02, 160)]
    far_end.run(0.5)
    assert far_end.heard == [(100.0, 160), (100.02, 160), (100.04, 160)]


def test_a_clear_cuts_what_was_heard_where_the_listener_is() -> None:
    far_end = FarEnd(listen=True)
    far_end.playback.play(ramp(480), 8000)
    far_end.run(0.03)
    far_end.playback.clear()
    assert far_end.heard == [(100.0, 160), (100.02, 80)]
    far_end.playback.play(ramp(160), 8000)
    far_end.playback.clear()
    assert far_end.heard == [(100.0, 160), (100.02, 80)]


def test_an_echo_that_comes_late_makes_hearing_later() -> None:
    far_end = FarEnd(listen=True)
    far_end.playback.play(ramp(160), 8000)
    far_end.playback.mark("m")
    far_end.playback.play(ramp(160), 8000)
    # The first frame ends at 100.02; its echo comes 15 ms after that.
    assert far_end.playback.mark_echoed("m", 100.035)
    far_end.run(0.2)
    assert far_end.heard == [(100.015, 160), (100.035, 160)]


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (np.zeros(160), 8000, r"wants a mono int16 array of shape \(n,\), or a float32 one from -1 to 1; got float64"),
        (np.zeros(160, np.int16), 0, "wants a rate of 8000 to 192000 Hz, got 0"),
        (np.zeros(160, np.int16), None, "wants a rate of 8000 to 192000 Hz, got None"),
        (np.zeros((160, 2), np.int16), 8000, r"got int16 array of shape \(160, 2\)"),
        (b"\x00\x00", 8000, "got <class 'bytes'>"),
        (np.zeros(160, np.int16), 4000, "wants a rate of 8000 to 192000 Hz, got 4000"),
        (np.zeros(160, np.int16), 16000.0, r"wants a rate of 8000 to 192000 Hz, got 16000\.0"),
    ],
)
def test_audio_that_cannot_be_played_is_refused(samples: Any, rate: int, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        FarEnd().playback.play(samples, rate)


def test_a_strided_array_is_played_as_it_reads() -> None:
    far_end = FarEnd()
    stereo = np.stack([ramp(160), np.zeros(160, np.int16)], axis=1)
    far_end.playback.play(stereo[:, 0], 8000)
    assert far_end.audio.tolist() == ramp(160).tolist()


async def test_a_playout_is_heard_as_much_later_as_echoes_tell() -> None:
    far_end = FarEnd(listen=True)
    playout = far_end.playback.play(ramp(160), 8000)
    far_end.playback.mark("m")
    assert far_end.playback.mark_echoed("m", 100.07)
    waiter = asyncio.ensure_future(wait(playout))
    await asyncio.sleep(0)
    far_end.run(0.06)
    assert playout.played_ms == 10
    assert not waiter.done()
    far_end.run(0.01)
    assert await waiter == Played(Outcome.FINISHED, 20)
    assert far_end.heard == [(100.05, 160)]


async def test_asking_late_how_a_playout_was_heard_takes_nothing_off() -> None:
    far_end = FarEnd()
    playout = far_end.playback.play(ramp(160), 8000)
    far_end.playback.mark("m")
    assert far_end.playback.mark_echoed("m", 100.07)
    far_end.now += 1
    far_end.playback.advance(far_end.now)
    assert playout.played_ms == 20
    assert await playout == Played(Outcome.FINISHED, 20)


def test_each_frame_is_told_as_it_leaves() -> None:
    far_end = FarEnd()
    told: list[tuple[float, int]] = []
    far_end.playback.on_sent = lambda samples, at: told.append((round(at, 3), int(samples[0])))
    far_end.playback.play(ramp(480), 8000)
    assert told == [(100.0, 1), (100.02, 161), (100.04, 321)]
    far_end.playback.lag = 0.2
    far_end.playback.play(ramp(160), 8000)
    assert told[3:] == [(100.26, 1)]


# --- Loudness ---


def steps(samples: Samples) -> int:
    return int(np.abs(np.diff(samples.astype(int))).max())


@pytest.mark.parametrize("codec", ["L16@8000h@10i", "L16@8000h", "L16@16000h@40i", "L16@48000h@60i"])
def test_ducking_slides_down_and_up_again_without_a_click(codec: str) -> None:
    far_end = FarEnd(codec)
    rate = far_end.spec.rate
    far_end.playback.play(np.full(rate, 8000, np.int16), rate)
    far_end.playback.duck(12)
    far_end.run(0.4)
    far_end.playback.duck(0)
    far_end.run(1)
    heard = far_end.audio[:rate]
    quiet = round(8000 * 10 ** (-12 / 20))
    # What has left before is heard as it was: the lead.
    assert set(heard[: round(0.06 * rate)].tolist()) == {8000}
    assert set(heard[round(0.15 * rate) : round(0.4 * rate)].tolist()) == {quiet}
    assert set(heard[round(0.56 * rate) :].tolist()) == {8000}
    assert steps(heard) <= (8000 - quiet) / (0.02 * rate) + 1
    assert far_end.playback._gain is None


def test_ducking_may_turn_round_on_its_way() -> None:
    far_end = FarEnd("L16@8000h@10i")
    far_end.playback.duck(0)
    far_end.playback.play(np.full(4000, 8000, np.int16), 8000)
    far_end.playback.duck(12)
    far_end.playback.duck(12)
    far_end.run(0.011)
    far_end.playback.duck(0)
    far_end.run(1)
    assert steps(far_end.audio[:4000]) <= 6000 / 160 + 1
    assert far_end.audio[:4000].min() == pytest.approx(8000 * (1 + 10 ** (-12 / 20)) / 2, abs=40)


def test_a_relayed_frame_is_ducked_too_and_a_clear_ends_it() -> None:
    far_end = FarEnd()
    far_end.playback.duck(6)
    for _ in range(3):
        far_end.playback.play(np.full(160, 8000, np.int16), 8000)
        far_end.now += 0.02
    assert far_end.audio[-1] == round(8000 * 10 ** (-6 / 20))
    far_end.playback.clear()
    far_end.playback.play(np.full(160, 8000, np.int16), 8000)
    assert far_end.audio[-160:].tolist() == [8000] * 160


def test_what_is_heard_is_what_was_sent() -> None:
    far_end = FarEnd()
    heard: list[int] = []
    far_end.playback.on_played = lambda samples, at: heard.extend(samples.tolist())
    far_end.playback.duck(12)
    far_end.playback.play(np.full(1600, 8000, np.int16), 8000)
    far_end.run(1)
    assert heard == far_end.audio.tolist()


# --- Marks ---


def test_a_mark_that_never_comes_back_is_given_up() -> None:
    far_end = FarEnd()
    lost: list[tuple[str, float]] = []
    far_end.playback.on_unconfirmed = lambda name: lost.append((name, round(far_end.now - 100, 3)))
    far_end.playback.mark("a")
    far_end.playback.play(ramp(1600), 8000)
    far_end.playback.mark("b")
    far_end.playback.mark("c")
    far_end.run(1)
    assert far_end.playback.mark_echoed("b", far_end.now)
    far_end.playback.lag = 0.0
    far_end.run(10)
    assert lost == [("a", 5.0), ("c", 5.2)]
    assert not far_end.playback.mark_echoed("a", far_end.now)
    assert far_end.playback.close() == []


def test_nobody_need_listen_for_lost_marks() -> None:
    far_end = FarEnd()
    far_end.playback.mark("a")
    far_end.run(6)
    assert far_end.playback.due is None


def test_a_mark_is_waited_for_while_the_socket_takes_no_more() -> None:
    far_end = FarEnd()
    lost: list[str] = []
    far_end.playback.on_unconfirmed = lost.append
    far_end.playback.mark("a")
    far_end.playback.set_writable(False)
    far_end.run(20)
    far_end.playback.set_writable(True)
    far_end.run(4)
    assert lost == []
    far_end.run(1)
    assert lost == ["a"]


def test_a_cleared_mark_whose_echo_never_came_does_not_swallow_another() -> None:
    far_end = FarEnd()
    far_end.playback.mark("m")
    far_end.playback.clear()
    far_end.run(6)
    far_end.playback.mark("m")
    assert far_end.playback.mark_echoed("m", far_end.now)


def test_an_echo_of_one_cleared_mark_is_none_of_another() -> None:
    far_end = FarEnd()
    for name in ("a", "b"):
        far_end.playback.mark(name)
    far_end.playback.clear()
    far_end.playback.mark("a")
    assert not far_end.playback.mark_echoed("b", far_end.now)
    assert not far_end.playback.mark_echoed("b", far_end.now)
    assert not far_end.playback.mark_echoed("a", far_end.now)
    assert far_end.playback.mark_echoed("a", far_end.now)


def test_a_mark_on_a_silent_stream_says_nothing_of_the_far_ends_lag() -> None:
    far_end = FarEnd()
    far_end.playback.mark("m")
    assert far_end.playback.mark_echoed("m", far_end.now + 0.04)
    assert far_end.playback.lag == pytest.approx(0.04)


@pytest.mark.parametrize("behind", [0, 8000])
def test_a_million_marks_are_refused(behind: int) -> None:
    far_end = FarEnd()
    far_end.playback.play(ramp(behind), 8000)
    taken = 0
    with pytest.raises(PlayoutFull, match="10,000 marks of this stream have not come back"):
        for taken in range(1_000_000):
            far_end.playback.mark(str(taken))
    assert taken == 10_000
    # Each that is settled makes room for one.
    far_end.run(1)
    assert far_end.playback.mark_echoed("5", far_end.now)
    far_end.playback.mark("one more")
    with pytest.raises(PlayoutFull):
        far_end.playback.mark("and another")
    far_end.playback.clear()
    far_end.playback.mark("after all")


# --- Stalls ---


def test_a_stalled_loop_catches_up_once() -> None:
    far_end = FarEnd()
    audio = ramp(8000)
    far_end.playback.play(audio, 8000)
    far_end.run(0.1)
    sent = far_end.frames
    far_end.now += 0.5
    far_end.playback.advance(far_end.now)
    # The lead is there again, and no more than that.
    assert far_end.frames == sent + 5
    assert far_end.playback.underruns == 1
    far_end.playback.advance(far_end.now)
    assert far_end.frames == sent + 5
    far_end.run(2)
    assert far_end.audio.tolist() == audio.tolist()
    assert far_end.playback.underruns == 1


def test_a_late_tick_within_the_lead_is_no_underrun() -> None:
    far_end = FarEnd()
    far_end.playback.play(ramp(8000), 8000)
    for _ in range(10):
        far_end.now += 0.075
        far_end.playback.advance(far_end.now)
    assert far_end.playback.underruns == 0


@pytest.mark.parametrize(("lead", "frames"), [(0.04, 2), (0.06, 3), (0.2, 10), (0.01, 2)])
def test_the_lead_is_what_the_settings_say_and_two_frames_at_least(lead: float, frames: int) -> None:
    far_end = FarEnd(lead=lead)
    far_end.playback.play(ramp(8000), 8000)
    assert far_end.frames == frames
    assert far_end.playback.ahead(far_end.now) == pytest.approx(frames * 0.02)


# --- A live source ---


class Counting:
    """A live source that hands out 1, 2, 3 …"""

    def __init__(self) -> None:
        self.next = 1
        self.asked: list[int] = []

    def __call__(self, count: int) -> Samples:
        self.asked.append(count)
        self.next += count
        return np.arange(self.next - count, self.next).astype(np.int16)


def test_a_live_source_is_pulled_each_ptime_just_ahead_of_the_listener() -> None:
    far_end, source = FarEnd(), Counting()
    far_end.playback.play_live(source)
    assert far_end.frames == 2
    far_end.run(0.1)
    assert far_end.frames == 7
    assert far_end.audio.tolist() == list(range(1, 7 * 160 + 1))
    assert source.asked == [160] * 7


def test_a_live_source_begins_when_told() -> None:
    far_end, source = FarEnd(), Counting()
    begin = far_end.now
    far_end.playback.play_live(source, 0.013)
    far_end.playback.play(np.full(160, 7, np.int16), 8000)
    assert far_end.frames == 0
    assert far_end.playback.due == pytest.approx(begin + 0.013)
    far_end.playback.advance(begin + 0.0129)
    assert far_end.frames == 0
    far_end.playback.advance(begin + 0.013)
    assert source.asked == [160] * 2
    assert far_end.playback.due == pytest.approx(begin + 0.033)


def test_a_live_source_is_quieter_while_queued_audio_plays() -> None:
    far_end = FarEnd()
    far_end.playback.play_live(lambda count: np.full(count, 4000, np.int16))
    far_end.playback.play(np.full(480, -500, np.int16), 8000)
    far_end.run(0.2)
    heard = far_end.audio
    ducked = round(4000 * 10 ** (-12 / 20))
    assert set(heard[:320].tolist()) == {4000}
    assert set(heard[480:800].tolist()) == {ducked - 500}
    assert set(heard[960:1600].tolist()) == {4000}
    # It slides there and back within a frame: no step is larger than that of what was queued.
    assert np.abs(np.diff(heard.astype(int))).max() <= 500 + 20


def test_a_live_source_ends_when_told_and_with_the_stream() -> None:
    far_end, source = FarEnd(), Counting()
    far_end.playback.play_live(source)
    far_end.playback.play_live(None)
    far_end.run(1)
    assert far_end.frames == 2
    far_end.playback.play_live(source)
    far_end.playback.close()
    far_end.playback.advance(far_end.now + 1)
    assert far_end.playback.due is None


@pytest.mark.parametrize(
    "source",
    [lambda count: 1 / 0, lambda count: np.zeros(count - 1, np.int16), lambda count: np.zeros(count)],
    ids=["raises", "too little", "wrong type"],
)
def test_a_live_source_that_fails_is_dropped(source: Any, capsys: pytest.CaptureFixture[str]) -> None:
    far_end = FarEnd()
    far_end.playback.play_live(source)
    assert far_end.frames == 0
    assert far_end.playback.due is None
    assert "live source dropped" in capsys.readouterr().out


# --- The pacer ---


class Timers:
    """The part of an event loop a pacer uses, on a clock the test turns."""

    def __init__(self) -> None:
        self.now = 100.0
        self.scheduled: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> "Timer":
        timer = Timer(when, callback)
        self.scheduled.append(timer)
        return timer

    def run(self, until: float) -> None:
        while live := [t for t in self.scheduled if not t.cancelled and t.at <= until]:
            timer = min(live, key=lambda t: t.at)
            self.scheduled.remove(timer)
            self.now = max(self.now, timer.at)
            timer.callback()
        self.now = until


class Timer:
    def __init__(self, at: float, callback: Callable[[], None]) -> None:
        self.at = at
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Paced:
    """Playbacks driven by a real pacer."""

    def __init__(self, streams: int) -> None:
        self.loop = Timers()
        self.late: list[float] = []
        self.leads: list[float] = []
        self.pacer = Pacer(self.loop, self.late.append, self.leads.append)  # type: ignore[arg-type]
        self.sent: list[list[float]] = [[] for _ in range(streams)]
        self.playbacks = [self._playback(index) for index in range(streams)]

    def _playback(self, index: int) -> Playback:
        spec = CodecSpec.parse("PCMU")
        made: list[Playback] = []
        made.append(
            Playback(
                spec,
                Writer(str(index)),
                lambda text: self.sent[index].append(self.loop.now) if "media" in json.loads(text) else None,
                lambda: self.pacer.wake(made[0]),
                self.loop.time,
            )
        )
        return made[0]


def test_the_pacer_drives_many_streams_each_on_its_own_deadlines() -> None:
    paced = Paced(3)
    for index, playback in enumerate(paced.playbacks):
        paced.loop.run(100 + index * 0.007)
        playback.play(ramp(1600), 8000)
    paced.loop.run(101)
    for index, times in enumerate(paced.sent):
        begin = 100 + index * 0.007
        expected = [begin] * 5 + [begin + k * 0.02 for k in range(1, 6)]
        assert times == pytest.approx(expected, abs=Pacer.SLACK * 2 + 1e-6)
    assert max(paced.late) < 0.003
    assert paced.leads == pytest.approx([0.08] * 15, abs=0.003)
    assert sum(playback.underruns for playback in paced.playbacks) == 0


def test_one_stream_that_fails_does_not_silence_another(capsys: pytest.CaptureFixture[str]) -> None:
    paced = Paced(2)
    for playback in paced.playbacks:
        playback.play(ramp(8000), 8000)

    def fail(text: bytes) -> None:
        raise ZeroDivisionError

    paced.playbacks[0]._send = fail
    paced.loop.run(102)
    assert [len(sent) for sent in paced.sent] == [5, 50]
    assert "a stream's outgoing audio failed" in capsys.readouterr().out


def test_a_forgotten_playback_is_left_alone() -> None:
    paced = Paced(1)
    paced.playbacks[0].play(ramp(8000), 8000)
    paced.pacer.forget(paced.playbacks[0])
    paced.loop.run(102)
    assert len(paced.sent[0]) == 5


def test_a_late_tick_is_told() -> None:
    paced = Paced(1)
    paced.playbacks[0].play(ramp(1600), 8000)
    timer = paced.loop.scheduled[-1]
    paced.loop.now = 100.5
    timer.callback()
    assert paced.late == [pytest.approx(0.48)]
    assert paced.leads == [0.0]
    assert paced.playbacks[0].underruns == 1
    assert len(paced.sent[0]) == 10


def test_lead_is_a_tenth_of_a_second() -> None:
    assert LEAD == 0.1


async def test_the_earliest_due_time_wins() -> None:
    paced = Paced(2)
    patient = asyncio.ensure_future(wait(paced.playbacks[0].play(ramp(800), 8000)))
    await asyncio.sleep(0)
    paced.playbacks[1].play(ramp(1600), 8000)
    paced.loop.run(100.05)
    assert len(paced.sent[1]) == 7
    assert not patient.done()
    paced.loop.run(100.2)
    assert await patient == Played(Outcome.FINISHED, 100)


def test_a_playback_with_nothing_due_is_not_waited_for() -> None:
    paced = Paced(1)
    paced.playbacks[0].play(ramp(1600), 8000)
    paced.playbacks[0].set_writable(False)
    paced.pacer.wake(paced.playbacks[0])
    paced.loop.run(101)
    assert len(paced.sent[0]) == 5
    assert paced.late == []


def test_who_answers_what_was_heard_of_a_clear_is_behind_it() -> None:
    far_end = FarEnd(listen=True)
    playback = far_end.playback
    answers: list[Playout] = []

    def answer(samples: Samples, at: float) -> None:
        if not answers:
            answers.append(playback.play(ramp(480), 8000))
            playback.mark("answer")

    playback.play(ramp(480), 8000)
    far_end.now += 0.03
    playback.on_played = answer
    assert playback.clear() == []
    far_end.run(1)
    # Nothing of the answer was before the clear, and nothing of it is forgotten.
    assert far_end.events == "mmm" + "c" + "mmmk"
    assert playback.mark_echoed("answer", far_end.now)
    assert answers[0].played_ms == 60


@pytest.mark.parametrize("name", ["", "x" * 1001, 5, None])
def test_a_mark_that_could_not_come_back_is_refused(name: Any) -> None:
    far_end = FarEnd()
    with pytest.raises(ValueError, match=r"mark\(\) wants a name as str, 1 to 1,000 characters long; got"):
        far_end.playback.mark(name)
    assert far_end.events == ""


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"barge_in": True}, r"wants barge_in=BargeIn\(\) or None; got True"),
        ({"text": "hello"}, "wants text as pairs of a position in samples and the words that end there"),
        ({"text": [("hello", 5)]}, "wants text as pairs"),
        ({"text": 5}, "wants text as pairs"),
    ],
)
def test_what_comes_with_audio_is_checked_before_the_call_meets_it(wishes: dict[str, Any], message: str) -> None:
    far_end = FarEnd()
    with pytest.raises(TypeError, match=message):
        far_end.playback.play(ramp(800), 8000, **wishes)
    assert far_end.playback.due is None


def test_a_live_source_is_something_that_can_be_called() -> None:
    nothing: Any = ramp(160)
    with pytest.raises(TypeError, match=r"play_live\(\) wants a function"):
        FarEnd().playback.play_live(nothing)
