"""Announce: a file or a text, at the start of a call or at a digit."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from streamsink.audio import Samples
from streamsink.config import SpeechSettings
from streamsink.errors import ProcessorError, SpeechError
from streamsink.plugins import find
from streamsink.processors.announce import Announce
from streamsink.simulator import SimulateOptions, simulate
from streamsink.testing import Dtmf, Result, run_processor
from tests.conftest import Serve
from tests.peer import TOKEN
from tests.speaking import loudness
from tests.streams import Line, make_stream

SPEECH = Path(__file__).parent / "data" / "speech.wav"

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="espeakng-loader (extra speech) is not installed"
)


@pytest.fixture
def ramp(tmp_path: Path) -> Path:
    """A second of audio each of whose samples says where it belongs."""
    path = tmp_path / "ramp.wav"
    soundfile.write(path, np.arange(1, 8001, dtype=np.int16), 8000)
    return path


async def call(announce: Announce, *keys: Dtmf, seconds: float = 3.0, **options: Any) -> Result:
    return await run_processor(announce, np.zeros(round(seconds * 8000), np.int16), 8000, events=keys, **options)


def begun(result: Result) -> list[float]:
    """When it began from the beginning, in seconds."""
    return [float(at) / result.sample_rate for at in np.flatnonzero(result.heard == 1)]


async def test_a_file_is_played_at_the_start(ramp: Path) -> None:
    result = await call(Announce(file=ramp))
    assert result.played[:8000].tolist() == list(range(1, 8001))
    assert begun(result)[0] < 0.3
    assert not result.played[8000:].any()


async def test_a_digit_begins_it_and_any_ends_it(ramp: Path) -> None:
    result = await call(Announce(file=ramp, on=("1",)))
    assert len(result.played) == 0
    keys = (Dtmf(0.2, "1"), Dtmf(0.6, "5"), Dtmf(1.0, "2"), Dtmf(1.2, "#"), Dtmf(1.5, "1"), Dtmf(1.8, "1"))
    result = await call(Announce(file=ramp, on=("1", "#")), *keys, seconds=4.0)
    starts = begun(result)
    assert len(starts) == 4
    for start, key in zip(starts, (0.2, 1.2, 1.5, 1.8), strict=True):
        assert key <= start < key + 0.4
    # What is cut off is over within the lead; the last is played whole.
    assert 3000 < np.count_nonzero(result.heard[: round(1.1 * 8000)]) < 4300
    assert result.heard[round(starts[-1] * 8000) :][:8000].tolist() == list(range(1, 8001))


async def test_one_that_is_not_to_be_interrupted(ramp: Path) -> None:
    result = await call(Announce(file=ramp, interruptible=False), Dtmf(0.5, "5"))
    assert result.played[:8000].tolist() == list(range(1, 8001))


async def test_the_end_of_the_call_ends_it(ramp: Path) -> None:
    result = await call(Announce(file=ramp), seconds=0.5)
    assert 0 < len(result.played) < 8000


async def test_what_is_retired_is_silent(ramp: Path, tmp_path: Path) -> None:
    line = Line()
    announce = Announce(file=ramp)
    await announce.on_start(make_stream(tmp_path, line=line))
    await announce.on_stop("error")
    sent = len(line.sent)
    await asyncio.to_thread(lambda: None)
    assert len(line.sent) == sent < 50


@needs_espeak
async def test_a_text_is_said() -> None:
    result = await call(Announce(say="Please hold the line.", voice="en-gb"))
    assert 1.0 < len(result.played) / 8000 < 3.0
    assert -30 < loudness(result.played) < -10


async def test_one_that_fails_is_told_to_the_operator(ramp: Path, read_log: Callable[[], str]) -> None:
    announce = Announce(file=ramp)
    ramp.rename(ramp.with_name("gone"))  # noqa: ASYNC240
    result = await call(announce, seconds=0.5)
    assert len(result.played) == 0
    assert "announcement failed" in read_log()
    assert "No such file" in read_log()
    broken = SpeechSettings(synthesizer="command", command=f"{sys.executable} -c 'import sys; sys.exit(7)'")
    await call(Announce(say="the secret word"), speech=broken)
    assert "status 7" in read_log()
    assert "secret" not in read_log()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "announce needs either file=… or say=…"),
        (f":file={SPEECH},say=hello", "announce needs either file=… or say=…"),
        (":file=none.wav", "announce: the file 'none.wav' cannot be read: No such file or directory"),
        (f":file={Path(__file__)}", f"announce: '{Path(__file__)}' is no sound file that could be played"),
        (":file=/tmp", "announce: the file '/tmp' cannot be read: Is a directory"),
        (":say=?!", "announce: there is no word in say=…"),
        (":say=hello,on=end", "announce: on is 'end'; wanted start, or one of 0-9 * # A-D"),
        (":say=hello,on=", "announce: on is empty; wanted start, a digit, or several, separated by commas"),
    ],
)
async def test_bad_options_are_told_when_the_server_starts(serve: Serve, options: str, message: str) -> None:
    with pytest.raises(ProcessorError) as caught:
        await serve(processors=[f"announce{options}"])
    assert message in str(caught.value)


def test_its_options_are_written_as_any_processors() -> None:
    plugin = find(f"announce:file={SPEECH},on=start,*,interruptible=no")
    assert plugin.options == {"file": SPEECH, "on": ("start", "*"), "interruptible": False}
    assert find("announce:say=Hello, dear caller: 1=yes.").options == {"say": "Hello, dear caller: 1=yes."}


@needs_espeak
@pytest.mark.endpoint_loop
async def test_what_a_simulated_caller_saves_is_speech(serve: Serve, tmp_path: Path) -> None:
    text = "Please hold the line. The meeting has ended."
    running = await serve(processors=[f"announce:say={text}"])
    quiet, back = tmp_path / "quiet.wav", tmp_path / "back.wav"
    soundfile.write(quiet, np.zeros(1600, np.int16), 16_000)
    options = SimulateOptions(
        file=quiet,
        url=running.server.url.replace("127.0.0.1", "localhost"),
        token=TOKEN,
        cafile=running.server.certificate,
        codec="L16@16000h",
        save=back,
        seconds=6.0,
    )
    report = await simulate(options)
    assert (report.close_code, report.lost) == (1000, 0)
    samples, rate = soundfile.read(back, dtype="int16")
    loud = np.flatnonzero(np.abs(samples.astype(int)) > 1000) / rate
    assert rate == 16_000
    assert loud[0] < 3.0
    assert loud[-1] - loud[0] > 2.0
    assert -30 < loudness(samples[round(loud[0] * rate) : round(loud[-1] * rate)]) < -10
    assert await asyncio.to_thread(sentences_heard, samples) == "please hold the line the meeting has ended"


def sentences_heard(samples: Samples) -> str:
    """What pocketsphinx makes of it, held to half a dozen sentences."""
    pocketsphinx = pytest.importorskip("pocketsphinx", reason="pocketsphinx (extra speech) is not installed")
    choice = (
        "welcome to the conference | please hold the line | the meeting has ended | nobody is here today"
        " | press one to record | your message was saved"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".jsgf") as grammar:
        grammar.write(f"#JSGF V1.0;\ngrammar g;\npublic <g> = ({choice})+;\n")
        grammar.flush()
        decoder = pocketsphinx.Decoder(samprate=16_000, jsgf=grammar.name, loglevel="FATAL")
    decoder.start_utt()
    decoder.process_raw(samples.tobytes(), full_utt=True)
    decoder.end_utt()
    return str(decoder.hyp().hypstr)


@needs_espeak
@pytest.mark.endpoint_loop
async def test_a_voice_that_does_not_exist_is_told_when_the_server_starts(serve: Serve) -> None:
    with pytest.raises(SpeechError, match="espeak has no voice 'nosuch'; wanted a language such as en-us"):
        await serve(processors=["announce:say=hello,voice=nosuch"])
