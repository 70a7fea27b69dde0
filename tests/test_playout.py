"""What a playout can be made of, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from streamsink.audio import Samples
from streamsink.errors import CodecError
from streamsink.playout import PULL_AHEAD, Audio, Outcome, Played
from tests.far_end import FarEnd, ramp, settle, wait


class Source:
    """An async iterator of chunks that tells how far it was pulled and whether it was closed."""

    def __init__(self, chunks: list[Any], fail: BaseException | None = None, stuck: bool = False) -> None:
        self.chunks = chunks
        self.fail = fail
        self.stuck = stuck
        self.given = 0
        self.closed = 0

    def __aiter__(self) -> AsyncIterator[Audio]:
        return self

    async def __anext__(self) -> Audio:
        if self.given == len(self.chunks):
            if self.stuck:
                await asyncio.Event().wait()
            raise self.fail or StopAsyncIteration
        self.given += 1
        chunk: Audio = self.chunks[self.given - 1]
        return chunk

    async def aclose(self) -> None:
        self.closed += 1


def pieces(samples: Samples, size: int) -> list[Samples]:
    return [samples[at : at + size] for at in range(0, len(samples), size)]


@pytest.mark.parametrize("size", [7, 160, 1111, 8000])
async def test_an_iterator_of_chunks_is_played_whole(size: int) -> None:
    far_end = FarEnd()
    source = Source(pieces(ramp(4000), size))
    playout = far_end.playback.play(source, 8000)
    waiter = asyncio.ensure_future(wait(playout))
    await far_end.live(1)
    assert far_end.audio.tolist() == ramp(4000).tolist()
    assert await waiter == await playout == Played(Outcome.FINISHED, 500)
    assert playout.played_ms == 500
    assert source.closed == 1
    assert far_end.playback.underruns == 0


async def test_an_iterator_is_pulled_a_second_ahead_and_no_more() -> None:
    far_end = FarEnd()
    far_end.playback.play(ramp(24_000), 8000)
    source = Source(pieces(ramp(80_000), 800))
    far_end.playback.play(source, 8000)
    await far_end.live(1.5)
    # What is queued before it lasts longer than that.
    assert source.given == 0
    for _ in range(10):
        await far_end.live(0.5)
        due = far_end.frames * 160 - 24_000
        assert source.given * 800 - due < PULL_AHEAD * 8000 + 800
        assert source.given * 800 - due >= PULL_AHEAD * 8000 - 800 or due < 0


async def test_floats_saturate_and_nan_is_silence() -> None:
    far_end = FarEnd()
    given = np.array([0.0, 0.5, -0.5, 1.0, -1.0, 3e38, -np.inf, np.inf, np.nan, 1e-9], np.float32)
    far_end.playback.play(given, 8000)
    far_end.run(1)
    assert far_end.audio[:10].tolist() == [0, 16384, -16384, 32767, -32768, 32767, -32768, 32767, 0, 0]


async def test_an_iterator_that_raises_ends_its_playout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    far_end = FarEnd()
    source = Source([ramp(800)], fail=ValueError("the secret words"))
    playout = far_end.playback.play(source, 8000)
    behind = far_end.playback.play(ramp(160), 8000)
    waiter = asyncio.ensure_future(wait(playout))
    await far_end.live(1)
    result = await waiter
    # What it gave before is played.
    assert (result.outcome, result.played_ms) == (Outcome.FAILED, 100)
    assert isinstance(result.error, ValueError)
    assert await behind == Played(Outcome.FINISHED, 20)
    assert source.closed == 1
    logged = capsys.readouterr().out
    assert "a source of audio failed" in logged
    assert "ValueError" in logged
    assert "secret" not in logged


@pytest.mark.parametrize("chunk", [np.zeros((2, 2), np.int16), b"ab", np.zeros(2)])
async def test_a_chunk_that_cannot_be_played_fails_its_playout(chunk: Any) -> None:
    far_end = FarEnd()
    playout = far_end.playback.play(Source([chunk]), 8000)
    await far_end.live(0.1)
    result = await playout
    assert (result.outcome, result.played_ms) == (Outcome.FAILED, 0)
    assert isinstance(result.error, CodecError)


@pytest.mark.parametrize("stuck", [True, False])
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize(
    ("end", "outcome"),
    [("cancel", Outcome.CANCELLED), ("clear", Outcome.INTERRUPTED), ("close", Outcome.CLOSED)],
)
async def test_an_iterator_is_closed_however_its_playout_ends(
    end: str, outcome: Outcome, started: bool, stuck: bool
) -> None:
    far_end = FarEnd()
    source = Source(pieces(ramp(16_000), 800)[: 2 if stuck else None], stuck=stuck)
    playout = far_end.playback.play(source, 8000)
    if started:
        await far_end.live(0.1)
    if end == "cancel":
        playout.cancel()
    elif end == "clear":
        far_end.playback.clear()
    else:
        far_end.playback.close()
    await settle()
    assert source.closed == 1
    assert await playout == Played(outcome, 100 if started else 0)
    assert far_end.playback.due is None or end == "cancel"
