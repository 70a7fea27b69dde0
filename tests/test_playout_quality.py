"""What is played in pieces arrives as if it had been played in one: measured on a swept sine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from streamsink.audio import Samples
from streamsink.codec import Resampler
from streamsink.playback import Playback
from streamsink.playout import Playout
from tests.far_end import FarEnd, settle

RATE = 22_050
SECONDS = 2.0
SIZES = (1, 7, 160, 333, 441, 1023, 4096)

# Codec, dB that its coding leaves between the sweep and what is wrong (L16 leaves all), Hz the sweep goes up to.
CODECS = [("PCMU", 36.0, 3000), ("PCMA", 36.0, 3000), ("G722", 27.0, 6000), ("L16@16000h", 120.0, 6000)]
CODECS += [("L16@24000h@40i", 120.0, 9000), ("L16@8000h@10i", 120.0, 3000)]


def sweep(top: float) -> NDArray[np.float32]:
    """A sine from 100 Hz to ``top``, at half of full scale."""
    at = np.arange(round(SECONDS * RATE)) / RATE
    phase = 2 * np.pi * (100 * at + (top - 100) * at**2 / (2 * SECONDS))
    return (0.5 * np.sin(phase)).astype(np.float32)


def odd_pieces(samples: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    pieces: list[NDArray[np.float32]] = []
    at = 0
    while at < len(samples):
        size = SIZES[len(pieces) % len(SIZES)]
        pieces.append(samples[at : at + size])
        at += size
    return pieces


def as_arrays(playback: Playback, samples: NDArray[np.float32]) -> list[Playout]:
    return [playback.play(piece, RATE) for piece in odd_pieces(samples)]


def as_int16(playback: Playback, samples: NDArray[np.float32]) -> list[Playout]:
    return [playback.play(np.rint(piece * 32768).astype(np.int16), RATE) for piece in odd_pieces(samples)]


def as_an_iterator(playback: Playback, samples: NDArray[np.float32]) -> list[Playout]:
    async def source() -> AsyncIterator[NDArray[np.float32]]:
        for piece in odd_pieces(samples):
            yield piece
            await asyncio.sleep(0)

    return [playback.play(source(), RATE)]


Way = Callable[[Playback, NDArray[np.float32]], list[Playout]]


@pytest.mark.parametrize("way", [as_arrays, as_int16, as_an_iterator])
@pytest.mark.parametrize(("codec", "least_db", "top"), CODECS)
async def test_a_sweep_in_odd_pieces_arrives_as_it_would_in_one(
    codec: str, least_db: float, top: int, way: Way
) -> None:
    far_end = FarEnd(codec)
    rate = far_end.spec.rate
    audio = sweep(top)
    way(far_end.playback, audio)
    while far_end.frames * far_end.spec.frame_samples < SECONDS * rate:
        await settle()
        far_end.run(0.02)
    far_end.run(0.2)
    heard = far_end.audio.astype(float)
    resampler = Resampler(RATE, rate)
    whole = [resampler.push(np.rint(audio * 32768).astype(np.int16)), resampler.flush()]
    wanted = np.concatenate(whole).astype(float)
    delay = delay_of(heard, wanted)
    wrong = heard[delay : delay + len(wanted)] - wanted[: len(heard) - delay]
    noise = float(np.sqrt(np.mean(wrong**2)))
    assert snr_db(wanted, wrong) > least_db
    # A seam is a step that the sweep itself never makes: its steepest is 2 pi f / rate of its height.
    steepest = 2 * float(np.pi) * top / rate * 16384
    coding = 4 * noise + 2
    assert float(np.abs(np.diff(heard)).max()) < min(steepest, 2 * 16384) + 2 * coding
    # And no stretch is worse than the rest: what is wrong is the coding's alone.
    assert float(np.abs(wrong).max()) < 16 * noise + 2


def delay_of(heard: NDArray[np.float64], wanted: NDArray[np.float64]) -> int:
    """Samples by which the codec is late: G.722's filters are, the others are not."""
    scores = [float(np.dot(heard[late : late + 4000], wanted[:4000])) for late in range(40)]
    return int(np.argmax(scores))


def snr_db(wanted: NDArray[np.float64], wrong: NDArray[np.float64]) -> float:
    return float(10 * np.log10(np.mean(wanted**2) / (np.mean(wrong**2) + 1e-9)))


def test_a_seam_would_be_noticed() -> None:
    """The measure itself: resampled piece by piece without state, the same sweep fails it."""
    audio = np.rint(sweep(3000) * 32768).astype(np.int16)
    pieces: list[Samples] = []
    for at in range(0, len(audio), 441):
        resampler = Resampler(RATE, 8000)
        pieces += [resampler.push(audio[at : at + 441]), resampler.flush()]
    whole = Resampler(RATE, 8000)
    wanted = np.concatenate([whole.push(audio), whole.flush()]).astype(float)
    heard = np.concatenate(pieces).astype(float)[: len(wanted)]
    assert snr_db(wanted[: len(heard)], heard - wanted[: len(heard)]) < 30
