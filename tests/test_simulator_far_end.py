from __future__ import annotations

import numpy as np
import pytest

from streamsink.codec import CodecSpec
from streamsink.simulator.far_end import PAUSE, Durations, EchoMatch, FarEnd

L16 = CodecSpec.parse("L16@8000h")


def test_percentiles_are_nearest_ranks() -> None:
    durations = Durations()
    assert durations.percentiles() is None
    for milliseconds in range(1000, 0, -1):
        durations.add(milliseconds / 1000)
    assert durations.percentiles() == {"p50": 500.0, "p99": 990.0, "p999": 999.0, "max": 1000.0}


def test_the_kth_frame_back_is_paired_with_the_kth_sent() -> None:
    durations = Durations()
    match = EchoMatch(durations)
    match.send(1.0)
    match.send(1.020)
    match.come_back(1.003)
    assert match.missing == 1
    match.come_back(1.030)
    match.come_back(1.050)  # one more than was sent: counted, and there is nothing to time it by
    assert (match.sent, match.returned, match.missing) == (2, 3, 0)
    assert durations.percentiles() == {"p50": 3.0, "p99": 10.0, "p999": 10.0, "max": 10.0}


def test_frames_further_back_than_the_window_are_counted_but_not_timed() -> None:
    durations = Durations()
    match = EchoMatch(durations)
    for frame in range(EchoMatch.WINDOW + 1):
        match.send(float(frame))
    match.come_back(EchoMatch.WINDOW + 1.0)
    assert durations.percentiles() is None
    match.come_back(EchoMatch.WINDOW + 1.0)
    assert durations.percentiles() == dict.fromkeys(("p50", "p99", "p999", "max"), EchoMatch.WINDOW * 1000.0)


@pytest.mark.parametrize(
    ("arrivals", "underruns", "starts"),
    [
        ([0.0, 0.02, 0.04], 0, [160, 320, 480]),
        ([0.0, 0.0, 0.0], 0, [160, 320, 480]),  # a burst is queued
        ([0.0, 0.039, 0.059], 0, [160, 320, 480]),  # 19 ms late: the cushion holds
        ([0.0, 0.050, 0.070], 1, [160, 560, 720]),  # 10 ms too late: a hole, and a new cushion
        ([0.0, 0.040 + PAUSE, 0.060 + PAUSE], 1, [160, 4480, 4640]),
        ([0.0, 0.041 + PAUSE, 0.061 + PAUSE], 0, [160, 4488, 4648]),  # a pause between two spurts is no hole
    ],
)
def test_audio_plays_one_frame_behind_and_a_dry_queue_is_an_underrun(
    arrivals: list[float], underruns: int, starts: list[int]
) -> None:
    far_end = FarEnd(L16, keep=True)
    expected = np.zeros(starts[-1] + 160, np.int16)
    for number, (arrival, start) in enumerate(zip(arrivals, starts, strict=True), start=1):
        samples = np.full(160, number, np.int16)
        far_end.media(samples.tobytes(), arrival)
        expected[start : start + 160] = number
    assert far_end.underruns == underruns
    np.testing.assert_array_equal(far_end.heard(), expected)


def test_a_mark_comes_back_when_the_audio_before_it_is_played() -> None:
    far_end = FarEnd(L16)
    far_end.mark("nothing queued")
    assert far_end.played(0.0) == ["nothing queued"]
    far_end.media(bytes(320), 0.0)
    far_end.mark("first")
    far_end.media(bytes(160), 0.01)
    far_end.mark("second")
    assert far_end.next_mark() == 0.04
    assert far_end.played(0.039) == []
    assert far_end.played(0.04) == ["first"]
    assert far_end.next_mark() == 0.05
    assert far_end.played(0.06) == ["second"]
    assert far_end.next_mark() is None
    far_end.mark("all played")
    assert far_end.played(0.06) == ["all played"]


def test_clear_drops_the_queue_and_gives_the_marks_back() -> None:
    far_end = FarEnd(L16, keep=True)
    for _ in range(3):
        far_end.media(np.ones(160, np.int16).tobytes(), 0.0)
    far_end.mark("a")
    far_end.mark("b")
    far_end.clear(0.05)  # 30 ms of the audio had been played
    assert far_end.played(0.05) == ["a", "b"]
    far_end.mark("c")
    assert far_end.played(0.05) == ["c"]
    far_end.media(np.full(160, 2, np.int16).tobytes(), 0.06)
    assert far_end.underruns == 0
    expected = np.concatenate((np.zeros(160), np.ones(240), np.zeros(240), np.full(160, 2))).astype(np.int16)
    np.testing.assert_array_equal(far_end.heard(), expected)


def test_clear_before_anything_played_leaves_silence() -> None:
    far_end = FarEnd(L16, keep=True)
    far_end.media(np.ones(160, np.int16).tobytes(), 0.0)
    far_end.clear(0.01)
    assert far_end.played(0.01) == []
    assert far_end.heard().size == 0


def test_it_tells_until_when_there_was_something_to_hear() -> None:
    far_end = FarEnd(L16, keep=True)
    assert far_end.sound_until == 0
    far_end.media(np.full(160, -101, np.int16).tobytes(), 0.0)
    far_end.media(np.full(160, 100, np.int16).tobytes(), 0.02)
    assert far_end.sound_until == 0.04
    far_end.clear(0.03)
    assert far_end.sound_until == 0.03
    # Audio that is not decoded may be anything.
    far_end = FarEnd(L16)
    far_end.media(np.full(160, 20_000, np.int16).tobytes(), 0.0)
    assert far_end.sound_until == 0
