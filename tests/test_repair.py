"""What a crash leaves: made playable, once, by whoever comes, and never at the cost of anything else."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from streamsink.audio import Track
from streamsink.processors import files, segment
from streamsink.processors import repair as repair_module
from streamsink.processors import sidecar as sidecar_module
from streamsink.processors.record import Record
from streamsink.processors.repair import JUST_MADE, Repaired, repair, repair_all
from streamsink.processors.wav import WavPart
from streamsink.processors.writer import writer
from tests.conftest import Serve
from tests.recording_child import FORMATS, PTIME, spoken
from tests.streams import counting, frame, make_stream

STEM = "20261120T204218Z_front_desk"
KILLS = 20
BOTH = (Track.INBOUND, Track.OUTBOUND)


@pytest.fixture(autouse=True)
def written_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded in this process; children keep the real interval."""
    monkeypatch.setattr("streamsink.processors.writer.FLUSH_INTERVAL", 0.01)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def told(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def later() -> float:
    return time.time() + 2 * JUST_MADE


async def left_behind(folder: Path, to: Path, tracks: tuple[Track, ...] = (Track.INBOUND,), **options: Any) -> None:
    """What lies on the disk while a recording lives, as a crash would leave it: copied, since no lock goes along."""
    stream = make_stream(folder, tracks=tracks)
    processor = Record(**options)
    await processor.on_start(stream)
    for track in tracks:
        processor.on_frame(frame(counting(0, 4000), track=track))
        processor.on_frame(frame(counting(4000, 4000), 4800, lost=800, track=track))
        if options.get("trim"):
            processor.on_frame(frame(np.zeros(8000, np.int16), 8800, track=track))
    async with asyncio.timeout(50):
        while processor._pending:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0)
    # The header is written in the same turn as the audio; another job comes after it.
    await writer.run(lambda: None)
    await asyncio.to_thread(shutil.copytree, folder, to)
    await processor.on_stop("stop")


WANTED = [*range(4000), *[0] * 800, *range(4000, 8000)]


@pytest.mark.parametrize("format", ["wav", "flac"])
async def test_a_crashed_recording_becomes_what_it_was_to_be(format: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    await left_behind(tmp_path / "live", there, format=format)
    assert names(there) == [f"{STEM}.json.part", f"{STEM}.wav.part"]
    assert list(repair(there)) == [Repaired(STEM, (f"{STEM}.{format}", f"{STEM}.json"))]
    assert names(there) == sorted([f"{STEM}.json", f"{STEM}.{format}"])
    audio = there / f"{STEM}.{format}"
    assert soundfile.read(audio, dtype="int16")[0].tolist() == WANTED
    sidecar = told(there / f"{STEM}.json")
    assert (sidecar["complete"], sidecar["format"], sidecar["stream_sid"]) == (False, format, "7d56")
    assert sidecar["sha256"] == hashlib.sha256(audio.read_bytes()).hexdigest()
    assert sidecar["duration_seconds"] == 1.1
    assert "ended before" in sidecar["error"]
    assert list(repair(there)) == []


def rest(path: Path) -> bytes:
    return path.read_bytes()[44:]


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "an odd tail": lambda wav, sidecar: wav.write_bytes(wav.read_bytes() + b"x"),
    "a header that says it is empty": lambda wav, sidecar: os.truncate(wav, 44 + 17_600),
    "a header of zeros": lambda wav, sidecar: wav.write_bytes(bytes(44) + rest(wav)),
    "no sidecar": lambda wav, sidecar: sidecar.unlink(),
    "an empty sidecar": lambda wav, sidecar: sidecar.write_bytes(b""),
    "a torn sidecar": lambda wav, sidecar: sidecar.write_bytes(sidecar.read_bytes()[:200]),
    "a sidecar of zeros": lambda wav, sidecar: sidecar.write_bytes(bytes(4096)),
    "a sidecar that is something else": lambda wav, sidecar: sidecar.write_bytes(b'["a"]'),
    "an encoding that was begun": lambda wav, sidecar: wav.with_name(f"{STEM}.flac.part").write_bytes(b"fLaC"),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_damage_of_any_kind_leaves_a_file_that_plays(damage: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    await left_behind(tmp_path / "live", there)
    DAMAGE[damage](there / f"{STEM}.wav.part", there / f"{STEM}.json.part")
    (done,) = repair(there, later)
    assert done == Repaired(STEM, (f"{STEM}.wav", f"{STEM}.json"))
    assert names(there) == [f"{STEM}.json", f"{STEM}.wav"]
    assert soundfile.read(there / f"{STEM}.wav", dtype="int16")[0].tolist() == WANTED
    sidecar = told(there / f"{STEM}.json")
    assert (sidecar["complete"], sidecar["sample_rate"]) == (False, 8000)
    assert sidecar["started_at"].startswith("2026-11-20T20:42:18")


async def test_a_live_recording_is_left_alone(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = Record()
    await processor.on_start(stream)
    processor.on_frame(frame(counting(0, 160)))
    assert list(repair(tmp_path, later)) == [Repaired(STEM, problem="in use", in_use=True)]
    await processor.on_stop("stop")
    assert soundfile.read(tmp_path / f"{STEM}.wav", dtype="int16")[0].tolist() == list(range(160))
    assert told(tmp_path / f"{STEM}.json")["complete"] is True
    assert list(repair(tmp_path)) == []


class Crash(BaseException):
    """The process ends here."""


ENDINGS: dict[str, dict[str, Any]] = {
    "wav": {},
    "flac": {"format": "flac"},
    "opus": {"format": "opus"},
    "trimmed": {"trim": "silence"},
    "separate": {"layout": "separate"},
    "separate flac": {"layout": "separate", "format": "flac"},
}


def crashing(step: int, patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let what is done to names and sidecars end with a crash at a step; gives how many there were."""
    steps = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step:
                raise Crash
            return function(*args, **options)

        return call

    for module in (segment, repair_module):
        for name in ("give_name", "sync_folder"):
            patch.setattr(module, name, counted(getattr(module, name)))
    patch.setattr("streamsink.processors.sidecar.write", counted(sidecar_module.write))
    patch.setattr("os.link", counted(os.link))
    patch.setattr("os.unlink", counted(os.unlink))
    return lambda: steps


def let_go(folder: Path) -> None:
    """What a dead process had open is closed."""
    gc.collect()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{folder}/"):
                os.close(int(descriptor))
        except OSError:
            continue


def content(folder: Path) -> dict[str, Any]:
    """What is there: for each sidecar what it tells, but for digests, and every file's samples."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            sidecar = found[path.name] = told(path)
            for file in sidecar["files"]:
                assert file.pop("sha256") == hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest()
            del sidecar["sha256"]
        elif path.suffix == ".opus":
            # Each stream of it has a serial number of its own.
            found[path.name] = soundfile.info(path).frames
        else:
            found[path.name] = soundfile.read(path, dtype="int16")[0].tolist()
    return found


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_crash_between_any_two_steps_of_the_end_is_made_good(ending: str, tmp_path: Path) -> None:
    """What a crash has left is finished, which crashes after each of its steps on the disk; then it is done again."""
    left = tmp_path / "left"
    tracks = BOTH if "separate" in ending else (Track.INBOUND,)
    await left_behind(tmp_path / "live", left, tracks=tracks, **ENDINGS[ending])
    shutil.copytree(left, tmp_path / "whole")
    list(repair(tmp_path / "whole"))
    wanted = content(tmp_path / "whole")
    assert len(wanted) == 1 + len(tracks)
    step, crashed = 0, True
    while crashed:
        step += 1
        there = tmp_path / str(step)
        shutil.copytree(left, there)
        crashed = False
        with pytest.MonkeyPatch.context() as patch:
            steps = crashing(step, patch)
            try:
                list(repair(there))
            except Crash:
                crashed = True
        let_go(there)
        list(repair(there, later))
        assert content(there) == wanted, f"after step {step}"
        assert list(repair(there, later)) == []
    # Unlinking what was there before, two sidecars, a link and an unlink a name, the folder, and what is left over.
    assert steps() == step - 1 > 12


@pytest.mark.parametrize("ending", [ending for ending in ENDINGS if ending != "wav"])
async def test_a_live_recording_that_dies_while_it_is_named_is_what_it_was_to_be(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder as it is before each name is given, without the locks of who lived: nothing of it is lost."""
    live = tmp_path / "live"
    give_name = files.give_name
    copies: list[Path] = []

    def copied(part: Path, path: Path) -> None:
        if part.suffix == ".part" and live in path.parents:
            copies.append(tmp_path / f"crash-{len(copies)}")
            shutil.copytree(live, copies[-1])
        give_name(part, path)

    monkeypatch.setattr(segment, "give_name", copied)
    tracks = BOTH if "separate" in ending else (Track.INBOUND,)
    await left_behind(live, tmp_path / "unused", tracks=tracks, **ENDINGS[ending])
    wanted = content(live)
    assert wanted[f"{STEM}.json"]["complete"] is True
    assert len(copies) == 1 + len(tracks)
    for there in copies:
        list(repair(there, later))
        assert content(there) == wanted
        assert list(repair(there, later)) == []


async def test_what_another_process_is_naming_is_taken_for_what_it_is_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    await left_behind(tmp_path / "live", there)
    shutil.copytree(there, tmp_path / "whole")
    list(repair(tmp_path / "whole"))
    reopened = repair_module._reopened

    def named_meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(repair_module, "_reopened", reopened)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segment, "give_name", stopping_at(f"{STEM}.json"))
            with contextlib.suppress(Crash):
                list(repair(there))
        let_go(there)
        return reopened(*args)

    monkeypatch.setattr(repair_module, "_reopened", named_meanwhile)
    list(repair(there, later))
    assert content(there) == content(tmp_path / "whole")


async def test_made_files_that_are_not_what_was_made_are_made_again(tmp_path: Path) -> None:
    there = tmp_path / "there"
    await left_behind(tmp_path / "live", there, layout="separate", format="flac", trim="silence", tracks=BOTH)
    shutil.copytree(there, tmp_path / "whole")
    list(repair(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "give_name", stopping_at(f"{STEM}.outbound.flac"))
        with contextlib.suppress(Crash):
            list(repair(there))
    let_go(there)
    # One has its name, the other was not kept.
    (there / f"{STEM}.outbound.flac.part").write_bytes(b"fLaC")
    list(repair(there, later))
    assert content(there) == content(tmp_path / "whole")


def stopping_at(name: str) -> Callable[[Path, Path], None]:
    give_name = files.give_name

    def stopping(part: Path, path: Path) -> None:
        if path.name == name:
            raise Crash
        give_name(part, path)

    return stopping


async def test_only_the_recordings_end_is_trimmed_of_what_a_crash_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment whose successor has begun, when the process dies before it is finished."""
    live, there = tmp_path / "live", tmp_path / "there"
    settle = segment.Segment._settle

    def crash() -> None:
        shutil.copytree(live, there)

    both_written = threading.Barrier(2, action=crash, timeout=50)

    def copied(self: segment.Segment) -> None:
        both_written.wait()
        settle(self)

    monkeypatch.setattr(segment.Segment, "_settle", copied)
    stream = make_stream(live)
    processor = Record(trim="silence", segment=1)
    await processor.on_start(stream)
    processor.on_frame(frame(np.full(400, 2000, np.int16)))
    processor.on_frame(frame(np.zeros(11_600, np.int16), 400))
    processor.on_frame(frame(np.full(400, 2000, np.int16), 12_000))
    await processor.on_stop("stop")
    monkeypatch.undo()
    list(repair(there, later))
    first, second = sorted(there.glob("*.wav"))
    assert (first.stem, second.stem) == (STEM, f"{STEM}~002")
    assert len(soundfile.read(first)[0]) == 8000


async def test_pauses_and_losses_are_told_of_by_what_a_crash_leaves(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "live")
    processor = Record()
    await processor.on_start(stream)
    processor._recording._synced_at = time.monotonic()
    processor.on_frame(frame(np.full(800, 5, np.int16)))
    processor.pause()
    processor.on_frame(frame(np.full(32_000, 5, np.int16), 800))
    processor._resume_at(processor._head)
    processor.on_frame(frame(np.full(800, 5, np.int16), 32_800 + 800, lost=800))
    async with asyncio.timeout(50):
        while processor._pending:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await writer.run(lambda: None)
    await asyncio.to_thread(shutil.copytree, tmp_path / "live", tmp_path / "there")
    await processor.on_stop("stop")
    list(repair(tmp_path / "there"))
    for folder in ("live", "there"):
        sidecar = told(tmp_path / folder / f"{STEM}.json")
        assert sidecar["pauses"] == [{"start_seconds": 0.1, "seconds": 4.0}]
        assert sidecar["gaps"] == [{"track": "inbound", "start_seconds": 4.1, "seconds": 0.1}]


async def test_a_name_that_ends_like_one_side_of_anothers_is_nobodys_side(tmp_path: Path) -> None:
    live, there = tmp_path / "live", tmp_path / "there"
    processors = []
    for number, name in enumerate(("x", "x.inbound")):
        processors.append(Record())
        await processors[-1].on_start(make_stream(live, name=name, sid=name))
        processors[-1].on_frame(frame(counting(number, 800)))
    async with asyncio.timeout(50):
        while any(processor._pending for processor in processors):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await writer.run(lambda: None)
    await asyncio.to_thread(shutil.copytree, live, there)
    for processor in processors:
        await processor.on_stop("stop")
    list(repair(there, later))
    for number, name in enumerate(("x", "x.inbound")):
        stem = f"20261120T204218Z_{name}"
        assert told(there / f"{stem}.json")["stream_sid"] == name
        assert soundfile.read(there / f"{stem}.wav", dtype="int16")[0].tolist() == counting(number, 800).tolist()


def test_what_is_no_file_keeps_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{STEM}.json.part")
    (done,) = repair(tmp_path, later)
    assert done.problem is not None


async def test_what_is_there_already_is_not_overwritten(tmp_path: Path) -> None:
    there = tmp_path / "there"
    await left_behind(tmp_path / "live", there)
    (there / f"{STEM}.wav").write_bytes(b"theirs")
    (done,) = repair(there)
    assert done.problem is not None
    assert (there / f"{STEM}.wav").read_bytes() == b"theirs"
    assert len(rest(there / f"{STEM}.wav.part")) == 2 * len(WANTED)


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "x.wav.part").symlink_to(tmp_path / "theirs")
    (tmp_path / "y.json.part").symlink_to(tmp_path / "theirs")
    os.mkfifo(tmp_path / "z.wav.part")
    assert all(done.problem for done in repair(tmp_path, later))
    assert (tmp_path / "theirs").read_bytes() == b"theirs"


def test_what_was_only_just_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.json.part").touch()
    (tmp_path / "b.wav.part").touch()
    assert list(repair(tmp_path)) == []
    assert list(repair(tmp_path, later)) == [Repaired("a"), Repaired("b", ("b.wav", "b.json"))]
    assert names(tmp_path) == ["b.json", "b.wav"]


def test_both_sides_of_a_separate_recording_share_a_sidecar(tmp_path: Path) -> None:
    for side, n in (("inbound", 100), ("outbound", 70)):
        wav = WavPart(tmp_path / f"x.{side}.wav", 8000, 1)
        wav.write(counting(1, n), 0, 0)
        wav.close()
    alone = WavPart(tmp_path / "y.inbound.wav", 8000, 1)
    alone.close()
    (tmp_path / "y.inbound.json.part").touch()
    repair_all([tmp_path, tmp_path / "missing"])
    assert names(tmp_path) == ["x.inbound.wav", "x.json", "x.outbound.wav", "y.inbound.json", "y.inbound.wav"]
    assert [file["channels"] for file in told(tmp_path / "x.json")["files"]] == [
        [["inbound"]],
        [["outbound", "played"]],
    ]
    assert soundfile.info(tmp_path / "x.outbound.wav").frames == 100


async def test_the_command_tells_what_it_did(tmp_path: Path) -> None:
    there = tmp_path / "there"
    await left_behind(tmp_path / "live", there)
    command = [sys.executable, "-m", "streamsink", "repair"]

    def run(folder: Path) -> tuple[int, str, str]:
        done = subprocess.run([*command, str(folder)], check=False, capture_output=True, text=True)
        return done.returncode, done.stdout.split("\n")[-2] if done.stdout else "", done.stderr

    status, out, err = await asyncio.to_thread(run, there)
    assert (status, out, err) == (0, f"{STEM}: {STEM}.wav, {STEM}.json", "")
    (there / "x.wav.part").symlink_to(there / "nowhere")
    status, _, err = await asyncio.to_thread(run, there)
    assert status == 1
    assert "x: left as it is:" in err
    status, _, err = await asyncio.to_thread(run, tmp_path / "missing")
    assert status == 1
    assert "is no folder" in err


REPAIRING = """
import sys, time
from pathlib import Path
from streamsink import log
from streamsink.processors.repair import JUST_MADE, repair

log.configure("text", "error")
print("ready", flush=True)
sys.stdin.readline()
for done in repair(Path(sys.argv[1]), lambda: time.time() + 2 * JUST_MADE):
    if done.problem is None:
        print(done.stem, *done.files)
    elif not done.in_use:
        sys.exit(done.problem)
"""


def repaired_at_once(folder: Path, count: int = 2) -> list[list[str]]:
    """Let so many processes repair a folder; for each recording that one of them has mended, its stem and files."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REPAIRING, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(count)
    ]
    # Nobody begins before all can.
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return [line.split() for lines in said for line in lines.splitlines()]


@pytest.mark.parametrize("format", ["wav", "flac"])
async def test_processes_that_repair_the_same_folder_at_once_share_the_work(format: str, tmp_path: Path) -> None:
    crashed = tmp_path / "crashed"
    await left_behind(tmp_path / "live", crashed, format=format)
    there = tmp_path / "there"
    there.mkdir()
    stems = [f"{number:02}" for number in range(40)]
    for stem in stems:
        text = (crashed / f"{STEM}.json.part").read_text()
        (there / f"{stem}.json.part").write_text(text.replace(STEM, stem))
        shutil.copy(crashed / f"{STEM}.wav.part", there / f"{stem}.wav.part")
    lines = await asyncio.to_thread(repaired_at_once, there)
    # Each was mended once, by one of them, and nothing is left over.
    assert sorted(lines) == [[stem, f"{stem}.{format}", f"{stem}.json"] for stem in stems]
    assert names(there) == sorted(f"{stem}.{ending}" for stem in stems for ending in (format, "json"))
    for stem in stems:
        audio = there / f"{stem}.{format}"
        assert soundfile.read(audio, dtype="int16")[0].tolist() == WANTED
        assert told(audio.with_suffix(".json"))["sha256"] == hashlib.sha256(audio.read_bytes()).hexdigest()


async def test_the_next_start_repairs_what_a_crash_has_left_wherever_recordings_go(
    serve: Serve, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    await left_behind(tmp_path / "live", tmp_path / "recordings")
    await left_behind(tmp_path / "live-too", elsewhere, format="flac")
    await serve(processors=["record", f"record:directory={elsewhere}"])
    for folder, ending in ((tmp_path / "recordings", "wav"), (elsewhere, "flac")):
        wanted = sorted([f"{STEM}.json", f"{STEM}.{ending}"])
        async with asyncio.timeout(50):
            while names(folder) != wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert soundfile.read(folder / f"{STEM}.{ending}", dtype="int16")[0].tolist() == WANTED
        assert told(folder / f"{STEM}.json")["complete"] is False


# --- Twenty kills ----------------------------------------------------------------------------------------------------


def test_twenty_kills_at_random_moments_lose_a_second_at_most(tmp_path: Path) -> None:
    rng = random.Random(5)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.recording_child", str(tmp_path), str(KILLS)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    moments = sorted((rng.uniform(0.3, 3.5), pid) for pid in pids)
    began = time.monotonic()
    for moment, pid in moments:
        time.sleep(max(0.0, began + moment - time.monotonic()))
        os.kill(pid, signal.SIGKILL)
    process.stdout.close()
    assert process.wait(60) == 0
    worst = 0.0
    checked = 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        fed = np.fromfile(tmp_path / f"fed-{number}", np.int64)
        assert all(done.problem is None for done in repair(folder, later))
        assert list(repair(folder, later)) == []
        for stream in range(len(FORMATS)):
            found = sorted(p for p in folder.glob(f"*_{stream}.*") if p.suffix != ".json")
            if not found:
                assert fed[stream] <= 8000
                continue
            (audio,) = found
            samples = soundfile.read(audio, dtype="int16")[0]
            sidecar = told(audio.with_suffix(".json"))
            assert len(samples) == round(sidecar["duration_seconds"] * 8000)
            assert np.array_equal(samples, spoken(stream, len(samples)))
            # A frame may have been fed and not yet told.
            lost = (int(fed[stream]) - len(samples)) / 8000
            assert lost <= 1.0 + PTIME
            worst = max(worst, lost)
            checked += 1
        assert not list(folder.glob("*.part"))
    assert checked > KILLS * 3


async def test_a_track_pair_survives_too(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "live", tracks=(Track.INBOUND, Track.OUTBOUND))
    processor = Record()
    await processor.on_start(stream)
    processor.on_frame(frame(counting(0, 800)))
    processor.on_frame(frame(counting(5, 800), track=Track.OUTBOUND))
    async with asyncio.timeout(50):
        while (tmp_path / "live" / f"{STEM}.wav.part").stat().st_size < 44 + 3200:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.to_thread(shutil.copytree, tmp_path / "live", tmp_path / "there")
    await processor.on_stop("stop")
    list(repair(tmp_path / "there"))
    samples = soundfile.read(tmp_path / "there" / f"{STEM}.wav", dtype="int16")[0]
    assert samples.shape == (800, 2)
    assert samples[:, 0].tolist() == list(range(800))
