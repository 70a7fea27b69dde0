"""What can be asked of a recording: layouts, formats, segments, length, trimming, pauses."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import soundfile

from streamsink.audio import Frame, Samples, Track
from streamsink.errors import ProcessorError
from streamsink.plugins import find
from streamsink.processors import formats, recording, writer
from streamsink.processors.formats import FormatName
from streamsink.processors.layout import choose
from streamsink.processors.record import Record
from streamsink.stream import Stream
from tests.streams import counting, frame, make_stream

STEM = "20261120T204218Z_front_desk"
IN, OUT, MIX = Track.INBOUND, Track.OUTBOUND, Track.MIX


async def started(stream: Stream, **options: Any) -> Record:
    processor = Record(**options)
    await processor.on_start(stream)
    return processor


async def ended(stream: Stream, processor: Record) -> None:
    stream.close_code, stream.close_reason = 1000, "stop"
    await processor.on_stop("stop")


def read(path: Path) -> Samples:
    samples: Samples = soundfile.read(path, dtype="int16")[0]
    return samples


def told(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def continued(directory: Path, ending: str) -> list[Path]:
    return sorted(directory.glob(f"*~*.{ending}"))


def filled(value: int, start: int = 0, *, track: Track = IN, n: int = 160, lost: int = 0) -> Frame:
    return frame(np.full(n, value, np.int16), start, track=track, lost=lost)


# --- Layouts ---------------------------------------------------------------------------------------------------------

LAYOUTS: list[tuple[str | None, tuple[Track, ...], bool, list[tuple[str, list[list[str]]]]]] = [
    (None, (IN,), False, [("", [["inbound"]])]),
    (None, (OUT,), False, [("", [["outbound"]])]),
    (None, (MIX,), False, [("", [["mix"]])]),
    (None, (IN,), True, [("", [["inbound"], ["outbound", "played"]])]),
    (None, (OUT,), True, [("", [["outbound", "played"]])]),
    (None, (MIX,), True, [("", [["mix"], ["outbound", "played"]])]),
    (None, (OUT, IN), False, [("", [["inbound"], ["outbound", "played"]])]),
    ("stereo", (IN,), False, [("", [["inbound"], ["outbound", "played"]])]),
    ("stereo", (OUT,), False, [("", [["inbound"], ["outbound", "played"]])]),
    ("mono-mix", (IN, OUT), True, [("", [["inbound", "outbound", "played"]])]),
    ("separate", (IN,), False, [("inbound.", [["inbound"]])]),
    ("separate", (OUT,), False, [("outbound.", [["outbound", "played"]])]),
    ("separate", (IN,), True, [("inbound.", [["inbound"]]), ("outbound.", [["outbound", "played"]])]),
]


@pytest.mark.parametrize(("wanted", "tracks", "may_speak", "files"), LAYOUTS)
def test_layouts(wanted: Any, tracks: tuple[Track, ...], may_speak: bool, files: object) -> None:
    assert list(choose(wanted, tracks, may_speak).files) == files


async def test_what_the_far_end_heard_joins_the_outbound_track_on_the_right(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, tracks=(IN, OUT), may_speak=True)
    processor = await started(stream)
    processor.on_frame(filled(1000))
    processor.on_frame(filled(30_000, track=OUT))
    processor.on_frame(filled(-500, 160, track=OUT))
    # Late, and too loud together.
    processor.on_played(filled(20_000, 80, track=OUT))
    await ended(stream, processor)
    right = [30_000] * 80 + [32_767] * 80 + [19_500] * 80 + [-500] * 80
    left = [1000] * 160 + [0] * 160
    assert read(tmp_path / f"{STEM}.wav").T.tolist() == [left, right]


async def test_nothing_of_ours_is_in_a_mono_recording_of_one_track(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream)
    processor.on_frame(filled(1))
    processor.on_played(filled(2, track=OUT))
    await ended(stream, processor)
    assert read(tmp_path / f"{STEM}.wav").tolist() == [1] * 160


async def test_a_mono_mix_is_the_sum_and_saturates(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, tracks=(IN, OUT), may_speak=True)
    processor = await started(stream, layout="mono-mix")
    processor.on_frame(filled(-30_000))
    processor.on_frame(filled(-10_000, track=OUT))
    processor.on_frame(filled(7, 160))
    processor.on_played(filled(5, 160, track=OUT))
    await ended(stream, processor)
    assert read(tmp_path / f"{STEM}.wav").tolist() == [-32_768] * 160 + [12] * 160


async def test_separate_files_are_equally_long_and_share_a_sidecar(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, tracks=(IN, OUT))
    processor = await started(stream, layout="separate")
    processor.on_frame(filled(1))
    processor.on_frame(filled(2, 160))
    processor.on_frame(filled(3, track=OUT))
    await ended(stream, processor)
    assert names(tmp_path) == [f"{STEM}.inbound.wav", f"{STEM}.json", f"{STEM}.outbound.wav"]
    assert read(tmp_path / f"{STEM}.inbound.wav").tolist() == [1] * 160 + [2] * 160
    assert read(tmp_path / f"{STEM}.outbound.wav").tolist() == [3] * 160 + [0] * 160
    sidecar = told(tmp_path / f"{STEM}.json")
    assert [file["name"] for file in sidecar["files"]] == [f"{STEM}.inbound.wav", f"{STEM}.outbound.wav"]
    assert sidecar["sha256"] == sidecar["files"][0]["sha256"]


# --- Formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracks", [(IN,), (IN, OUT)], ids=["mono", "stereo"])
@pytest.mark.parametrize(
    ("name", "codec", "rate", "wanted"),
    [
        ("flac", "PCMU", None, ("FLAC", "PCM_16", 8000)),
        ("ogg", "L16@24000h", None, ("OGG", "VORBIS", 24_000)),
        ("opus", "PCMU", None, ("OGG", "OPUS", 48_000)),
        ("opus", "L16@44100h", None, ("OGG", "OPUS", 48_000)),
        ("opus", "G722", 16_000, ("OGG", "OPUS", 16_000)),
        ("mp3", "G722", None, ("MP3", "MPEG_LAYER_III", 16_000)),
        ("wav", "L16@48000h", None, ("WAV", "PCM_16", 48_000)),
    ],
)
async def test_formats_open_with_length_channels_and_rate(
    name: FormatName,
    codec: str,
    rate: int | None,
    wanted: tuple[str, str, int],
    tracks: tuple[Track, ...],
    tmp_path: Path,
) -> None:
    stream = make_stream(tmp_path, codec=codec, tracks=tracks)
    processor = await started(stream, format=name, sample_rate=rate)
    native = rate or stream.codec.rate
    tone = (8000 * np.sin(np.arange(native) * 2 * np.pi * 440 / native)).astype(np.int16)
    for track in tracks:
        processor.on_frame(frame(tone[: native - 7], track=track, sample_rate=native))
    await ended(stream, processor)
    assert names(tmp_path) == sorted([f"{STEM}.json", f"{STEM}.{name}"])
    info = soundfile.info(tmp_path / f"{STEM}.{name}")
    frames = round((native - 7) * wanted[2] / native)
    assert (info.format, info.subtype, info.samplerate, info.frames, info.channels) == (*wanted, frames, len(tracks))
    samples = soundfile.read(tmp_path / f"{STEM}.{name}", dtype="int16", always_2d=True)[0]
    assert samples.shape == (frames, len(tracks))
    assert 7000 < samples.max() < 9000
    sidecar = told(tmp_path / f"{STEM}.json")
    assert (sidecar["format"], sidecar["sample_rate"], sidecar["complete"]) == (name, wanted[2], True)
    assert sidecar["duration_seconds"] == (native - 7) / native
    if formats._FORMATS[name].lossless:
        assert np.array_equal(samples[:, 0], tone[:-7])


async def test_an_empty_recording_stays_wav_which_can_be_empty(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    await ended(stream, await started(stream, format="flac"))
    assert names(tmp_path) == [f"{STEM}.json", f"{STEM}.wav"]
    assert told(tmp_path / f"{STEM}.json")["format"] == "wav"


async def test_what_cannot_be_encoded_stays_wav(tmp_path: Path) -> None:
    before = writer.failures.count
    stream = make_stream(tmp_path)
    processor = await started(stream, format="opus")
    processor.on_frame(frame(counting(0, 160)))
    # What is in the way cannot be deleted as a file is.
    (tmp_path / f"{STEM}.opus.part").mkdir()
    await ended(stream, processor)
    assert names(tmp_path) == [f"{STEM}.json", f"{STEM}.opus.part", f"{STEM}.wav"]
    assert read(tmp_path / f"{STEM}.wav").tolist() == list(range(160))
    sidecar = told(tmp_path / f"{STEM}.json")
    assert (sidecar["format"], sidecar["sample_rate"], sidecar["complete"]) == ("wav", 8000, False)
    assert sidecar["error"] == "Is a directory"
    assert writer.failures.count == before + 1


# --- Segments and length ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", get_args(FormatName)[:2])
async def test_segments_lose_and_repeat_nothing(format: str, tmp_path: Path) -> None:
    """Losses, a track that comes late, frames across the cuts, and what was heard told long after."""
    stream = make_stream(tmp_path, tracks=(IN, OUT), may_speak=True)
    processor = await started(stream, segment="1s", format=format)
    rng = np.random.default_rng(3)
    end = 8000 * 25 + 1234
    wanted = np.zeros((end, 2), np.int16)
    position, sent = 0, 0
    while position < end:
        n = min(int(rng.integers(1, 900)), end - position)
        lost = int(rng.choice([0, 0, 0, 200, 20_000])) if 8000 < position < end - 30_000 else 0
        position += lost
        samples = rng.integers(-9000, 9000, n).astype(np.int16)
        processor.on_frame(frame(samples, position, lost=lost))
        wanted[position : position + n, 0] = samples
        position += n
        # The other side is two seconds behind, what it heard of us five.
        for behind, track in ((16_000, OUT), (40_000, None)):
            at = position - behind
            if at > 0:
                samples = rng.integers(-9000, 9000, n).astype(np.int16)
                if track is None:
                    processor.on_played(frame(samples, at, track=OUT))
                else:
                    processor.on_frame(frame(samples, at, track=track))
                wanted[at : at + n, 1] = np.clip(wanted[at : at + n, 1].astype(int) + samples, -32_768, 32_767)
        sent += 1
        if sent % 50 == 0:
            await asyncio.sleep(0.01)
    await ended(stream, processor)
    parts = [tmp_path / f"{STEM}.{format}", *continued(tmp_path, format)]
    assert [path.stem for path in parts[1:]] == [f"{STEM}~{n:03}" for n in range(2, 27)]
    pieces = [read(path) for path in parts]
    assert [len(piece) for piece in pieces] == [8000] * 25 + [1234]
    assert np.array_equal(np.concatenate(pieces), wanted)
    sidecars = [told(path.with_name(f"{path.stem}.json")) for path in parts]
    assert [(s["segment"], s["start_seconds"], s["complete"]) for s in sidecars] == [
        (n + 1, float(n), True) for n in range(26)
    ]
    assert len(names(tmp_path)) == 52
    # Every gap is told, cut where the files are.
    lost_samples = sum(round(gap["seconds"] * 8000) for s in sidecars for gap in s["gaps"])
    assert lost_samples == int(8000 * sum(gap["seconds"] for s in sidecars for gap in s["gaps"]) + 0.5) > 0
    for sidecar, piece in zip(sidecars, pieces, strict=True):
        for gap in sidecar["gaps"]:
            first = round(gap["start_seconds"] * 8000)
            assert not piece[first : first + round(gap["seconds"] * 8000), 0].any()


async def test_a_segment_is_there_while_the_call_goes_on(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream, segment=0.5)
    processor.on_frame(frame(counting(0, 5000)))
    async with asyncio.timeout(50):
        while not (tmp_path / f"{STEM}.json").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert read(tmp_path / f"{STEM}.wav").tolist() == list(range(4000))
    assert (tmp_path / f"{STEM}~002.wav.part").exists()
    await ended(stream, processor)
    assert read(tmp_path / f"{STEM}~002.wav").tolist() == list(range(4000, 5000))


async def test_what_comes_long_after_its_time_is_told_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recording, "GRACE", 0.5)
    stream = make_stream(tmp_path, may_speak=True)
    processor = await started(stream, segment=1)
    processor.on_frame(frame(counting(0, 16_000)))
    async with asyncio.timeout(50):
        while not (tmp_path / f"{STEM}.json").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    processor.on_played(filled(9, 7900, track=OUT, n=200))
    await ended(stream, processor)
    assert "long after its time" in capsys.readouterr().out
    assert not read(tmp_path / f"{STEM}.wav")[:, 1].any()
    assert read(tmp_path / f"{STEM}~002.wav")[:200, 1].tolist() == [9] * 100 + [0] * 100
    assert told(tmp_path / f"{STEM}~002.json")["complete"] is False


async def test_names_that_are_taken_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"theirs")
    (tmp_path / f"{STEM}.wav").symlink_to(tmp_path / "nowhere")
    (tmp_path / f"{STEM}_2~002.json").write_bytes(b"theirs")
    (tmp_path / f"{STEM}_2~003.json.part").symlink_to(tmp_path / "elsewhere")
    stream = make_stream(tmp_path)
    processor = await started(stream, segment=0.02)
    processor.on_frame(frame(counting(0, 320)))
    await ended(stream, processor)
    assert read(tmp_path / f"{STEM}_2.wav").tolist() == list(range(160))
    assert read(tmp_path / f"{STEM}_2~004.wav").tolist() == list(range(160, 320))
    assert (tmp_path / "elsewhere").read_bytes() == b"theirs"
    assert (tmp_path / f"{STEM}_2~002.json").read_bytes() == b"theirs"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("ending", ["wav", "json"])
async def test_a_name_that_is_taken_meanwhile_is_not_overwritten(ending: str, tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream)
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / f"{STEM}.{ending}").symlink_to(tmp_path / "theirs")
    processor.on_frame(frame(counting(0, 160)))
    await ended(stream, processor)
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    assert (tmp_path / f"{STEM}.{ending}").is_symlink()
    left = tmp_path / (f"{STEM}.wav.part" if ending == "wav" else f"{STEM}.wav")
    assert soundfile.read(left.rename(tmp_path / "x.wav"), dtype="int16")[0].tolist() == list(range(160))


async def test_a_link_in_the_sidecars_place_is_not_followed(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream)
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / f"{STEM}.json.part").unlink()
    (tmp_path / f"{STEM}.json.part").symlink_to(tmp_path / "theirs")
    before = writer.failures.count
    await ended(stream, processor)
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    assert writer.failures.count > before


@pytest.mark.parametrize("segment", [None, 0.02])
async def test_a_recording_ends_after_its_longest_duration(segment: float | None, tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream, max_duration="50ms", segment=segment)
    for start in range(0, 1600, 160):
        processor.on_frame(frame(counting(start, 160), start))
    await ended(stream, processor)
    parts = [tmp_path / f"{STEM}.wav", *continued(tmp_path, "wav")]
    assert np.concatenate([read(path) for path in parts]).tolist() == list(range(400))
    assert len(parts) == (1 if segment is None else 3)
    assert told(tmp_path / f"{STEM}.json")["complete"] is True


@pytest.mark.parametrize("segment", [None, 0.0075])
async def test_a_loss_that_runs_beyond_the_longest_duration_is_silence_up_to_it(
    segment: float | None, tmp_path: Path
) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream, max_duration=0.05, segment=segment)
    processor.on_frame(frame(counting(1, 160)))
    processor.on_frame(frame(counting(0, 160), 800, lost=640))
    await ended(stream, processor)
    parts = [tmp_path / f"{STEM}.wav", *continued(tmp_path, "wav")]
    assert np.concatenate([read(path) for path in parts]).tolist() == [*range(1, 161), *[0] * 240]
    assert len(parts) == (1 if segment is None else 7)
    gaps = [gap for path in parts for gap in told(path.with_suffix(".json"))["gaps"]]
    assert sum(gap["seconds"] for gap in gaps) == pytest.approx(0.03)


async def test_a_recording_of_two_voices_that_has_its_longest_duration_is_there_while_the_call_goes_on(
    tmp_path: Path,
) -> None:
    stream = make_stream(tmp_path, may_speak=True)
    processor = await started(stream, max_duration=1)
    for start in range(0, 8000 * 12, 8000):
        processor.on_frame(frame(counting(start, 8000), start))
    async with asyncio.timeout(50):
        while not (tmp_path / f"{STEM}.json").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert len(read(tmp_path / f"{STEM}.wav")) == 8000
    await ended(stream, processor)
    assert names(tmp_path) == [f"{STEM}.json", f"{STEM}.wav"]


# --- Trimming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["wav", "flac"])
async def test_silence_is_cut_off_both_ends_and_told(format: str, tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream, trim="silence", format=format)
    processor.on_frame(filled(100, 0, n=8000))
    processor.on_frame(filled(1000, 8000, n=800))
    processor.on_frame(filled(1001, 16_800, n=800, lost=8000))
    processor.on_frame(filled(0, 24_000, n=8000, lost=6400))
    await ended(stream, processor)
    assert names(tmp_path) == [f"{STEM}.{ending}" for ending in sorted(["json", format])]
    whole = [100] * 8000 + [1000] * 800 + [0] * 8000 + [1001] * 800 + [0] * 14_400
    assert read(tmp_path / f"{STEM}.{format}").tolist() == whole[7200:18_400]
    sidecar = told(tmp_path / f"{STEM}.json")
    assert sidecar["trimmed"] == pytest.approx({"start_seconds": 0.9, "end_seconds": 1.7})
    assert sidecar["duration_seconds"] == pytest.approx(1.4)
    gaps = [(gap["start_seconds"], gap["seconds"]) for gap in sidecar["gaps"]]
    assert gaps == [pytest.approx((0.2, 1.0)), pytest.approx((1.3, 0.1))]
    assert sidecar["complete"] is True


async def test_a_recording_that_is_all_silence_is_left_whole(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream, trim="silence")
    processor.on_frame(filled(100, n=8000))
    await ended(stream, processor)
    assert read(tmp_path / f"{STEM}.wav").tolist() == [100] * 8000


async def test_a_side_that_never_speaks_is_as_long_as_the_other(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, tracks=(IN, OUT))
    processor = await started(stream, trim="silence", layout="separate")
    processor.on_frame(filled(0, n=8000))
    processor.on_frame(filled(1000, 8000, n=800))
    processor.on_frame(filled(0, 8800, n=8000))
    processor.on_frame(filled(0, n=16_800, track=OUT))
    await ended(stream, processor)
    assert read(tmp_path / f"{STEM}.inbound.wav").tolist() == [0] * 800 + [1000] * 800 + [0] * 800
    assert read(tmp_path / f"{STEM}.outbound.wav").tolist() == [0] * 2400


async def test_the_end_of_the_longest_duration_is_trimmed_as_the_recordings(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream, trim="silence", max_duration=2, segment=1)
    processor.on_frame(filled(1000, n=8100))
    processor.on_frame(filled(0, 8100, n=20_000))
    await ended(stream, processor)
    assert len(read(tmp_path / f"{STEM}.wav")) == 8000
    assert len(read(tmp_path / f"{STEM}~002.wav")) == 100 + 800
    assert [told(tmp_path / f"{STEM}{part}.json")["continues"] for part in ("", "~002")] == [True, False]


async def test_only_the_ends_of_the_whole_are_trimmed(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream, trim="silence", segment=1)
    processor.on_frame(filled(0, n=4000))
    processor.on_frame(filled(1000, 4000, n=100))
    processor.on_frame(filled(0, 4100, n=9900))
    processor.on_frame(filled(1000, 14_000, n=100))
    processor.on_frame(filled(0, 14_100, n=1000))
    await ended(stream, processor)
    assert len(read(tmp_path / f"{STEM}.wav")) == 8000 - 3200
    assert len(read(tmp_path / f"{STEM}~002.wav")) == 6100 + 800


# --- Pauses ----------------------------------------------------------------------------------------------------------


async def test_a_pause_is_silence_of_its_length_that_never_reaches_the_disk(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, tracks=(IN, OUT), may_speak=True)
    processor = await started(stream, pause_digit="*")

    def both(value: int, start: int) -> None:
        processor.on_frame(filled(value, start))
        processor.on_frame(filled(value + 1, start, track=OUT))

    both(10, 0)
    processor.on_dtmf("1", 100)
    processor.on_dtmf("*", 100)
    processor.pause()
    both(20, 160)
    both(20, 320)
    processor.on_dtmf("*", 100)
    processor.resume()
    # What was said during the pause, but came behind it.
    processor.on_frame(filled(99, 240, track=OUT))
    # What the far end heard of us before, during and after it.
    processor.on_played(filled(100, 80, track=OUT, n=600))
    both(30, 480)
    processor.pause()
    processor.on_frame(filled(50, 640))
    processor.on_played(filled(60, 640, track=OUT))
    await ended(stream, processor)

    left = [10] * 160 + [0] * 320 + [30] * 160 + [0] * 160
    right = [11] * 80 + [111] * 80 + [0] * 320 + [131] * 160 + [0] * 160
    # 600 samples from 80 on reach 40 into the second pause, which silences them.
    assert read(tmp_path / f"{STEM}.wav").T.tolist() == [left, [*right[:480], *right[480:640], *[100] * 40, *[0] * 120]]
    assert told(tmp_path / f"{STEM}.json")["pauses"] == [
        {"start_seconds": 0.02, "seconds": 0.04},
        {"start_seconds": 0.08, "seconds": 0.02},
    ]
    assert told(tmp_path / f"{STEM}.json")["complete"] is True


async def test_a_pause_spares_what_was_said_before_it_however_late_it_comes(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, tracks=(IN, OUT))
    processor = await started(stream)
    processor.on_frame(filled(1, n=800))
    processor.pause()
    # The other track is behind: it spoke before, and then during the pause.
    processor.on_frame(filled(2, n=600, track=OUT))
    processor.on_frame(filled(3, 600, n=600, track=OUT))
    processor.on_frame(filled(4, 800, n=400))
    await ended(stream, processor)
    assert read(tmp_path / f"{STEM}.wav").T.tolist() == [
        [1] * 800 + [0] * 400,
        [2] * 600 + [3] * 200 + [0] * 400,
    ]


async def test_what_was_said_in_a_pause_is_silenced_though_it_comes_after_it(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream)
    now = 100.0
    processor._clock = lambda: now
    processor.on_frame(filled(1, n=800))
    processor.pause()
    now += 0.25
    processor.resume()
    # The network held back what was said meanwhile: a quarter of a second, and what came after.
    for start in range(800, 4000, 160):
        processor.on_frame(filled(2, start))
    await ended(stream, processor)
    assert read(tmp_path / f"{STEM}.wav").tolist() == [1] * 800 + [0] * 2000 + [2] * 1200
    assert told(tmp_path / f"{STEM}.json")["pauses"] == [{"start_seconds": 0.1, "seconds": 0.25}]


async def test_a_pause_of_no_length_is_none(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream, pause_digit="#")
    processor.on_frame(filled(1))
    processor.on_dtmf("#", 100)
    processor.on_dtmf("#", 100)
    processor.on_frame(filled(2, 160))
    await ended(stream, processor)
    assert read(tmp_path / f"{STEM}.wav").tolist() == [1] * 160 + [2] * 160
    assert told(tmp_path / f"{STEM}.json")["pauses"] == []


async def test_pauses_are_told_in_each_segment_they_reach_into(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream, segment=1)
    processor.on_frame(filled(1, n=4000))
    processor.pause()
    processor.on_frame(filled(2, 4000, n=16_000))
    processor.resume()
    processor.on_frame(filled(3, 20_000, n=4000))
    await ended(stream, processor)
    paths = [tmp_path / f"{STEM}.json", tmp_path / f"{STEM}~002.json", tmp_path / f"{STEM}~003.json"]
    pauses = [[tuple(pause.values()) for pause in told(path)["pauses"]] for path in paths]
    assert pauses == [[(0.5, 0.5)], [(0.0, 1.0)], [(0.0, 0.5)]]


# --- Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("1h", 3600), ("2.5", 2.5), ("250ms", 0.25)])
def test_durations(text: str, seconds: float) -> None:
    assert find(f"record:segment={text}").options == {"segment": seconds}
    assert all(a < b for a, b in pairwise([0.0, Record(segment=text)._segment or 0]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("record:segment=often", "write 90s, 15m or 1h"),
        ("record:max_duration=0", "more than nothing"),
        ("record:format=aiff", "allowed are wav, flac, ogg, opus, mp3"),
        ("record:layout=quad", "allowed are mono-mix, stereo, separate"),
        ("record:pause_digit=x", "allowed are 0"),
        ("record:format=opus,sample_rate=44100", "choose among 8000, 12000, 16000, 24000, 48000"),
        ("record:format=mp3,sample_rate=96000", "format=mp3 cannot have sample_rate=96000"),
    ],
)
def test_options_that_cannot_be_are_told(spec: str, words: str) -> None:
    with pytest.raises(ProcessorError, match=words):
        find(spec).build()
