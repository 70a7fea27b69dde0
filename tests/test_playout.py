"""What a playout can be made of, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from streamsink.audio import Samples
from streamsink.errors import CodecError, PlayoutFull
from streamsink.playout import PULL_AHEAD, Audio, BargeIn, Outcome, Played, Playout
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


async def test_a_source_that_only_iterates_needs_no_aclose() -> None:
    class Plain:
        def __init__(self) -> None:
            self.left = 3

        def __aiter__(self) -> Plain:
            return self

        async def __anext__(self) -> Samples:
            self.left -= 1
            if self.left < 0:
                raise StopAsyncIteration
            return ramp(160)

    far_end = FarEnd()
    far_end.playback.play(Plain(), 8000)
    await far_end.live(0.2)
    assert far_end.frames == 3


async def test_a_source_that_does_not_close_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    class Stubborn(Source):
        async def aclose(self) -> None:
            raise OSError("secret")

    far_end = FarEnd()
    far_end.playback.play(Stubborn([ramp(160)]), 8000)
    await far_end.live(0.1)
    logged = capsys.readouterr().out
    assert "a source of audio did not close" in logged
    assert "secret" not in logged


async def test_a_source_that_goes_on_after_it_was_cancelled_is_left() -> None:
    class Deaf(Source):
        async def __anext__(self) -> Audio:
            try:
                return await super().__anext__()
            except asyncio.CancelledError:
                return ramp(160)

    far_end = FarEnd()
    source = Deaf([], stuck=True)
    playout = far_end.playback.play(source, 8000)
    await far_end.live(0.02)
    playout.cancel()
    await settle()
    assert source.closed == 1
    assert far_end.frames == 0


async def test_a_source_that_cancels_itself_has_failed() -> None:
    far_end = FarEnd()
    playout = far_end.playback.play(Source([], fail=asyncio.CancelledError()), 8000)
    waiter = asyncio.ensure_future(wait(playout))
    await far_end.live(0.1)
    assert (await waiter).outcome is Outcome.FAILED


async def test_what_a_source_is_late_with_is_an_underrun() -> None:
    far_end = FarEnd()
    gate = asyncio.Event()

    async def source() -> AsyncIterator[Samples]:
        yield ramp(1000)
        await gate.wait()
        yield ramp(1000)

    playout = far_end.playback.play(source(), 8000)
    await far_end.live(0.3)
    # The rest of a frame does not wait for what may never come.
    assert far_end.frames == 7
    assert playout.played_ms == 125
    gate.set()
    await far_end.live(0.3)
    assert far_end.playback.underruns == 1
    assert far_end.audio[1120:2120].tolist() == ramp(1000).tolist()


async def test_a_source_tells_its_rate_with_its_first_chunk() -> None:
    class Rated(Source):
        sample_rate = 16_000

    far_end = FarEnd()
    waiter = asyncio.ensure_future(wait(far_end.playback.play(Rated([ramp(8000)]), None)))
    await far_end.live(1)
    assert await waiter == Played(Outcome.FINISHED, 500)
    silent = asyncio.ensure_future(wait(far_end.playback.play(Source([ramp(10)]), None)))
    await far_end.live(0.1)
    result = await silent
    assert result.outcome is Outcome.FAILED
    assert "wants a rate of 8000 to 192000 Hz, got None" in str(result.error)


async def test_several_sources_join_without_a_gap() -> None:
    far_end = FarEnd()
    audio = ramp(12_345)
    sources = [Source(pieces(part, 999)) for part in np.array_split(audio, 3)]
    for source in sources:
        far_end.playback.play(source, 8000)
    await far_end.live(2)
    assert far_end.audio[: len(audio)].tolist() == audio.tolist()
    assert far_end.playback.underruns == 0


@pytest.mark.parametrize("rate", [8000, 24_000])
async def test_text_is_heard_when_its_last_sound_was(rate: int) -> None:
    far_end = FarEnd()
    text = [(rate // 10, "one "), (rate // 5, "two ")]
    playout = far_end.playback.play(ramp(rate), rate, text=text)
    far_end.run(0.15)
    # It may grow meanwhile.
    text.append((rate, "three"))
    far_end.playback.clear()
    assert await playout == Played(Outcome.INTERRUPTED, 150, "one ")
    again = asyncio.ensure_future(wait(far_end.playback.play(ramp(rate), rate, text=text)))
    await settle()
    far_end.run(2)
    assert await again == Played(Outcome.FINISHED, 1000, "one two three")


def test_what_a_talker_may_do_is_told_while_it_plays() -> None:
    far_end = FarEnd()
    playback = far_end.playback
    told: list[BargeIn | None] = [playback.barge_in]
    first, second = BargeIn(), BargeIn(duck_db=6, clear_ms=100)
    playback.play(ramp(1600), 8000, barge_in=first)
    playback.play(ramp(800), 8000)
    playback.play(ramp(1600), 8000, barge_in=second)
    for seconds in (0.0, 0.19, 0.02, 0.1, 0.15, 0.1):
        far_end.run(seconds)
        told.append(playback.barge_in)
    assert told == [None, first, first, None, second, second, None]


def test_nothing_is_converted_before_it_is_due() -> None:
    far_end = FarEnd()
    long = np.zeros(8000 * 500, np.float32)
    far_end.playback.play(long, 8000)
    # As long as it is not played it is the caller's array, and changes with it.
    long[1600:] = 0.5
    far_end.run(0.5)
    assert set(far_end.audio[1600:].tolist()) == {16384}


def test_more_than_ten_minutes_are_refused() -> None:
    far_end = FarEnd()
    hours = np.zeros(8000 * 601, np.int16)
    with pytest.raises(PlayoutFull, match="0 s of audio in 0 pieces are queued, 601 s more are too much"):
        far_end.playback.play(hours, 8000)
    first = far_end.playback.play(hours[: 8000 * 400], 8000)
    with pytest.raises(PlayoutFull, match="a stream takes 600 s"):
        far_end.playback.play(hours[: 8000 * 250], 8000)
    second = far_end.playback.play(hours[: 8000 * 190], 8000)
    first.cancel()
    far_end.playback.play(hours[: 8000 * 400], 8000)
    second.cancel()
    far_end.playback.clear()
    far_end.playback.play(hours[: 8000 * 600], 8000)


def test_what_was_played_makes_room() -> None:
    far_end = FarEnd()
    minute = np.zeros(44_100 * 60, np.int16)
    for _ in range(10):
        far_end.playback.play(minute, 44_100)
    with pytest.raises(PlayoutFull):
        far_end.playback.play(minute, 44_100)
    far_end.run(60)
    far_end.playback.play(minute, 44_100)


def test_the_pieces_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamsink.playback.ITEMS_LIMIT", 100)
    far_end = FarEnd()
    far_end.playback.play(ramp(8000), 8000)
    with pytest.raises(PlayoutFull, match="in 100 pieces"):
        for _ in range(101):
            far_end.playback.play(ramp(0), 8000)
    far_end.run(2)
    far_end.playback.play(ramp(0), 8000)


async def test_an_empty_chunk_is_passed_over() -> None:
    far_end = FarEnd()
    far_end.playback.play(Source([ramp(0), ramp(160), ramp(0)]), 8000)
    await far_end.live(0.1)
    assert far_end.audio.tolist() == ramp(160).tolist()


async def test_marks_between_sources_hold_none_of_them_up() -> None:
    far_end = FarEnd()
    far_end.playback.play(ramp(1600), 8000)
    far_end.playback.mark("between")
    far_end.playback.play(Source([ramp(160)]), 8000)
    far_end.playback.mark("behind")
    await far_end.live(0.4)
    assert far_end.events == "m" * 10 + "k" + "m" + "k"


async def test_a_source_that_takes_its_time_to_close_is_not_cut_short() -> None:
    gate = asyncio.Event()

    class Slow(Source):
        async def aclose(self) -> None:
            await gate.wait()
            await super().aclose()

    far_end = FarEnd()
    source = Slow([ramp(160)])
    waiter = asyncio.ensure_future(wait(far_end.playback.play(source, 8000)))
    await far_end.live(0.1)
    assert await waiter == Played(Outcome.FINISHED, 20)
    gate.set()
    await settle()
    assert source.closed == 1


async def test_a_source_may_cancel_its_own_playout() -> None:
    far_end = FarEnd()
    made: list[Playout] = []

    class Fickle(Source):
        async def __anext__(self) -> Audio:
            chunk = await super().__anext__()
            made[0].cancel()
            return chunk

    source = Fickle([ramp(160)])
    made.append(far_end.playback.play(source, 8000))
    await far_end.live(0.1)
    assert await made[0] == Played(Outcome.CANCELLED, 0)
    assert (far_end.frames, source.closed) == (0, 1)
