import pytest

from streamsink.audio import Track
from streamsink.codec import CodecSpec
from streamsink.track import SharedCounter, TrackClock

RATE = 8000
FRAME = 160
PCMU = CodecSpec.parse("PCMU")


def track(name: Track = Track.INBOUND, position: int = 0) -> TrackClock:
    return TrackClock(name, PCMU.decoder(), RATE, position, now=0.0)


def feed(clock: TrackClock, chunks: list[int], pace: float = 0.02) -> list[tuple[int, int] | None]:
    """What becomes of each chunk of 20 ms: its (start, lost) in samples, or None for a duplicate."""
    results: list[tuple[int, int] | None] = []
    for index, chunk in enumerate(chunks):
        missing = clock.missing(chunk)
        if missing is None:
            results.append(None)
        else:
            clock.accept(chunk, missing, now=index * pace)
            results.append(clock.advance(FRAME))
    return results


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([1, 2, 3], [(0, 0), (160, 0), (320, 0)]),
        ([0, 1, 2], [(0, 0), (160, 0), (320, 0)]),
        ([700, 701], [(0, 0), (160, 0)]),
        ([1, 2, 5, 6], [(0, 0), (160, 0), (640, 320), (800, 0)]),
        ([1, 2, 2, 3], [(0, 0), (160, 0), None, (320, 0)]),
        ([60, 61, 11, 62], [(0, 0), (160, 0), None, (320, 0)]),
        ([60, 61, 10, 11], [(0, 0), (160, 0), (320, 0), (480, 0)]),
    ],
    ids=["from 1", "from 0", "any base", "a jump", "a repeat", "a step back of 50", "a step back of 51 rebases"],
)
def test_chunks_place_frames(chunks: list[int], expected: list[tuple[int, int] | None]) -> None:
    assert feed(track(), chunks) == expected


def test_a_gap_is_never_longer_than_the_time_since_the_first_frame_and_a_second() -> None:
    clock = track()
    clock.accept(1, 0, now=0.0)
    clock.advance(FRAME)
    clock.accept(1_000_000, 999_998, now=2.0)
    assert clock.advance(FRAME) == (3 * RATE, 3 * RATE - FRAME)
    # Nothing is left of the allowance.
    assert clock.accept(2_000_000, 999_999, now=2.0) == 0
    assert clock.advance(FRAME) == (3 * RATE + FRAME, 0)


def test_an_hour_of_absence_is_an_hour_of_gap() -> None:
    clock = track()
    clock.accept(1, 0, now=0.0)
    clock.advance(FRAME)
    clock.accept(180_002, 180_000, now=3600.02)
    assert clock.advance(FRAME) == (FRAME + 180_000 * FRAME, 180_000 * FRAME)


def test_a_gap_takes_the_duration_before_it() -> None:
    clock = track()
    clock.accept(1, 0, now=0.0)
    clock.advance(320)
    clock.accept(3, 1, now=0.08)
    assert clock.advance(160) == (640, 320)


def test_a_loss_waits_for_the_frame_behind_it() -> None:
    clock = track()
    clock.accept(1, 0, now=0.0)
    clock.advance(FRAME)
    # Two octets that make no sample yet come between.
    clock.accept(3, 1, now=0.1)
    clock.accept(5, 1, now=0.2)
    assert clock.advance(FRAME) == (3 * FRAME, 2 * FRAME)


class Interleaved:
    """Two tracks as a session sees them; `send` returns the chunks counted as lost."""

    def __init__(self) -> None:
        self.clocks = {"a": track(Track.INBOUND), "b": track(Track.OUTBOUND)}
        self.counter = SharedCounter()
        self.now = 0.0

    def send(self, name: str, chunk: int) -> int:
        self.now += 0.02
        clock = self.clocks[name]
        missing = clock.missing(chunk)
        assert missing is not None
        others = [other for other in self.clocks.values() if other is not clock]
        lost = self.counter.lost(clock, chunk, missing, others)
        self.counter.saw(chunk, clock.track)
        clock.accept(chunk, lost, self.now)
        clock.advance(FRAME)
        return lost


@pytest.mark.parametrize(
    ("sent", "lost"),
    [
        ("a1 b1 a2 b2 a3 b3", [0, 0, 0, 0, 0, 0]),
        ("a1 b2 a3 b4 a5 b6", [0, 0, 0, 0, 0, 0]),
        ("b1 a2 b3 a4 b5 a6", [0, 0, 0, 0, 0, 0]),
        ("a1 b1 a2 b2 b3 a4", [0, 0, 0, 0, 0, 1]),
        ("a1 b2 a3 b4 b6 a7 b8", [0, 0, 0, 0, 0, 1, 0]),
        ("a1 b2 a3 b4 a5 a7 b8", [0, 0, 0, 0, 0, 0, 1]),
        ("a1 b2 a3 b4 a7 b8", [0, 0, 0, 0, 1, 1]),
        ("a1 b2 a3 b4 a9 b10", [0, 0, 0, 0, 2, 2]),
    ],
    ids=[
        "a count each",
        "one count",
        "one count, the other first",
        "a count each, one lost",
        "one count, one of a lost",
        "one count, one of b lost",
        "one count, one each lost",
        "one count, two each lost",
    ],
)
def test_tracks_that_share_a_counter_lose_only_their_own(sent: str, lost: list[int]) -> None:
    tracks = Interleaved()
    assert [tracks.send(word[0], int(word[1:])) for word in sent.split()] == lost


def test_old_numbers_are_forgotten() -> None:
    counter = SharedCounter()
    for chunk in range(1000):
        counter.saw(chunk, Track.INBOUND)
    assert len(counter._owners) == 256
    assert counter.together is None


def test_a_jump_counts_no_more_chunks_than_it_makes_silence() -> None:
    clock = track()
    clock.accept(1, 0, now=0.0)
    clock.advance(FRAME)
    assert clock.accept(2**53, 2**53 - 2, now=0.085) == 54
    # The last of them only in part: 1.085 s in all.
    assert clock.advance(FRAME) == (8680, 8680 - FRAME)


def test_a_number_on_two_tracks_settles_that_each_counts_its_own() -> None:
    counter = SharedCounter()
    counter.together = True
    counter.saw(7, Track.INBOUND)
    counter.saw(7, Track.OUTBOUND)
    assert counter.together is False
