"""The parrot: it waits for the talker to stop, then plays the last utterance back, whole and once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from streamsink.audio import Samples, Track
from streamsink.errors import ProcessorError
from streamsink.processors.parrot import ROLL, Parrot
from streamsink.testing import Loss, Result, run_processor

SPEECH = Path(__file__).parent / "data" / "speech.wav"
RATE = 16_000


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread takes part in these calls, so there is nothing to wait for."""
    monkeypatch.setattr("streamsink.testing.SPEED", 1e6)


@pytest.fixture(scope="module")
def sentence() -> Samples:
    """LibriVox's "he was not an ill disposed young man", 3 s at 16 kHz, speech from 0.25 s to 2.8 s."""
    samples: Samples = soundfile.read(SPEECH, dtype="int16")[0]
    return samples


def quiet(seconds: float) -> Samples:
    return np.zeros(round(seconds * RATE), np.int16)


def tone(seconds: float, hz: float = 440) -> Samples:
    return (8000 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.int16)


def place(part: Samples, whole: Samples) -> tuple[int, float]:
    """Where ``part`` is most like ``whole``, in samples, and how much: 1 is the same."""
    size = len(part) + len(whole)
    product = np.fft.irfft(np.fft.rfft(whole, size) * np.conj(np.fft.rfft(part, size)), size)
    at = int(np.argmax(product))
    offset = at if at < len(whole) else at - size
    there = whole[max(0, offset) : offset + len(part)].astype(float)
    here = part[max(0, -offset) : max(0, -offset) + len(there)].astype(float)
    return offset, float(here @ there / np.sqrt((here @ here) * (there @ there)))


def spurts(result: Result) -> list[tuple[float, float]]:
    """From when to when it spoke, in seconds; pauses below 0.5 s are its own."""
    loud = np.flatnonzero(np.abs(result.heard) > 500) / result.sample_rate
    breaks = np.flatnonzero(np.diff(loud) > 0.5)
    return list(
        zip(
            loud[np.concatenate([[0], breaks + 1])].tolist(),
            loud[np.concatenate([breaks, [-1]])].tolist(),
            strict=True,
        )
    )


async def test_an_utterance_comes_back_whole_and_once(sentence: Samples) -> None:
    result = await run_processor(Parrot(), np.concatenate([quiet(1), sentence]), RATE, silence_seconds=8)
    (begins, ends), *more = spurts(result)
    assert more == []
    # The pause that ends it comes first.
    assert begins > 1 + len(sentence) / RATE
    assert ends - begins == pytest.approx(2.55, abs=0.2)
    # What was said, from before its first sound to behind its last, sample by sample.
    at, likeness = place(result.played, np.concatenate([quiet(1), sentence]))
    assert likeness > 0.999
    assert at / RATE == pytest.approx(1.25 - ROLL, abs=0.1)
    assert (at + len(result.played)) / RATE == pytest.approx(3.85 + ROLL, abs=0.2)


async def test_each_utterance_comes_back_and_a_short_pause_is_part_of_it(sentence: Samples) -> None:
    first, second = np.concatenate([tone(0.5), quiet(0.4), tone(0.3)]), tone(1.0, 600)
    call = np.concatenate([quiet(1), first, quiet(4), second])
    result = await run_processor(Parrot(), call, RATE, silence_seconds=4)
    lengths = [end - begin for begin, end in spurts(result)]
    assert lengths == pytest.approx([1.2, 1.0], abs=0.03)
    assert place(first, result.played)[1] > 0.99
    assert place(second, result.played)[1] > 0.99


@pytest.mark.parametrize("late", [0.2, 0.5])
async def test_it_does_not_answer_itself(late: float) -> None:
    """Its own voice comes back on the line, 6 dB quieter: it was made before with the same input."""
    call = np.concatenate([quiet(1), tone(1.0), quiet(10)])
    alone = await run_processor(Parrot(), call, RATE)
    echo = np.zeros_like(call)
    delay = round(late * RATE)
    heard = alone.heard[: len(call) - delay]
    echo[delay : delay + len(heard)] = heard // 2
    result = await run_processor(Parrot(), call + echo, RATE)
    assert len(spurts(alone)) == len(spurts(result)) == 1


async def test_who_talks_on_interrupts_it_and_is_said_back(sentence: Samples) -> None:
    """The first utterance is to come back from about 3.7 s on."""
    other = np.ascontiguousarray(sentence[::-1])[RATE // 10 : RATE * 2]
    call = np.concatenate([sentence, quiet(1.5), other])
    result = await run_processor(Parrot(), call, RATE, silence_seconds=5)
    assert result.clears == 1
    (_, interrupted), (begins, ends) = spurts(result)
    assert interrupted < len(sentence) / RATE + 1.5 + 1.0
    assert begins > len(call) / RATE
    # Its first sound is there, from before the moment in which that was known.
    _, likeness = place(other, result.heard[round((begins - 0.5) * RATE) :])
    assert likeness > 0.95
    assert ends - begins == pytest.approx(len(other) / RATE, abs=0.3)


async def test_a_word_meanwhile_is_not_said_back(sentence: Samples) -> None:
    call = np.concatenate([sentence, quiet(1.5), tone(0.15)])
    result = await run_processor(Parrot(), call, RATE, silence_seconds=6)
    assert result.clears == 0
    assert len(spurts(result)) == 1


async def test_only_the_end_of_a_very_long_utterance_comes_back() -> None:
    call = np.concatenate([quiet(0.5), tone(3.0), tone(1.0, 600)])
    result = await run_processor(Parrot(longest_seconds=1.0), call, RATE, silence_seconds=4)
    (begins, ends), *more = spurts(result)
    assert more == []
    assert ends - begins == pytest.approx(1.0 + ROLL, abs=0.03)
    assert place(tone(1.0, 600), result.played)[1] > 0.99


async def test_what_was_lost_is_silence_in_its_place() -> None:
    call = np.concatenate([quiet(1), tone(1.0)])
    result = await run_processor(Parrot(), call, RATE, silence_seconds=4, events=[Loss(at=1.4, seconds=0.2)])
    (begins, ends), *more = spurts(result)
    assert more == []
    assert ends - begins == pytest.approx(1.0, abs=0.03)
    start = round(begins * RATE)
    assert not result.heard[start + round(0.41 * RATE) : start + round(0.59 * RATE)].any()


async def test_other_tracks_are_none_of_its_business() -> None:
    call = np.stack([quiet(3), np.concatenate([tone(1.0), quiet(2)])], axis=1)
    result = await run_processor(Parrot(), call, RATE, tracks=[Track.INBOUND, Track.OUTBOUND], silence_seconds=2)
    assert not len(result.played)


async def test_a_call_that_ends_while_it_speaks_ends(sentence: Samples) -> None:
    call = np.concatenate([sentence, quiet(1.5)])
    result = await run_processor(Parrot(), call, RATE)
    assert 0 < len(result.played) < len(sentence)
    # One that ends in the middle of an utterance hears nothing of it.
    result = await run_processor(Parrot(), sentence[: RATE * 2], RATE)
    assert not len(result.played)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -5.0, 0.0])
def test_a_length_that_cannot_be_kept_is_told(seconds: float) -> None:
    with pytest.raises(ProcessorError, match=r"parrot: longest_seconds is .*; wanted 1 to 300 seconds"):
        Parrot(longest_seconds=seconds)
