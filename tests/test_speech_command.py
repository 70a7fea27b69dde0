"""Any program as a synthesizer: small ones written here, and flite."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from streamsink.config import SpeechSettings
from streamsink.errors import SpeechError
from streamsink.speech import command
from streamsink.speech.synthesis import Synthesizer, Utterance, build
from tests.speaking import ended, known, loudness, refused, spoken

PROGRAM = """
import os, struct, subprocess, sys, time

def header(data=0xFFFFFFFF, channels=1, rate=16000, bits=16, form=1, extra=b""):
    fmt = struct.pack("<HHIIHH", form, channels, rate, rate * channels * bits // 8, channels * bits // 8, bits)
    return b"RIFF" + struct.pack("<I", 0xFFFFFFFF) + b"WAVE" + extra + b"fmt " + struct.pack("<I", 16) + fmt + (
        b"data" + struct.pack("<I", data))

def write(*pieces):
    for piece in pieces:
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
"""


def program(tmp_path: Path, source: str, arguments: str = "", voice: str | None = None) -> Synthesizer:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM + source)
    line = f"{sys.executable} {path} {arguments}"
    return build(SpeechSettings(synthesizer="command", command=line, voice=voice))


async def test_a_program_gets_the_text_on_its_standard_input(tmp_path: Path) -> None:
    engine = program(tmp_path, "write(header(), sys.stdin.buffer.read().decode().encode('utf-16-le'))")
    await engine.open()
    samples, utterance = await spoken(engine, "Grüße. {text}; $(id) 'x'")
    assert samples.tobytes().decode("utf-16-le") == "Grüße.{text}; $(id) 'x'"
    assert (utterance.sample_rate, utterance.heard) == (16000, [(6, "Grüße."), (23, " {text}; $(id) 'x'")])


async def test_a_program_gets_text_and_voice_as_arguments(tmp_path: Path) -> None:
    source = "write(header(), '|'.join(sys.argv[1:]).encode('utf-16-le'), sys.stdin.buffer.read())"
    engine = program(tmp_path, source, "-v '{voice} {text}' {text}", voice="anna")
    for voice, said in ((None, "anna"), ("{text}", "{text}")):
        samples, _ = await spoken(engine, "a 'b' {voice} c", voice)
        assert samples.tobytes().decode("utf-16-le") == f"-v|{said} a 'b' {{voice}} c|a 'b' {{voice}} c"
    engine = program(tmp_path, source, "{voice}")
    assert (await refused(engine)).startswith("the speech command has {voice} in it and there is none: set `voice`")
    engine = program(tmp_path, source)
    assert (await refused(engine, voice="anna")).startswith("the speech command takes no voice, got 'anna'")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("write(header(data=6), bytes((1, 0, 2, 0, 3, 0)) + b'LIST' * 50_000)", [1, 2, 3]),
        ("write(header(data=0), bytes((1, 0, 2)), bytes((0, 3)))", [1, 2]),
        ("write(header(channels=2), bytes((2, 0, 4, 0, 5, 0, 5, 0, 9)))", [3, 5]),
        ("write(header(extra=b'JUNK' + struct.pack('<I', 3) + b'abc' + bytes(1)), bytes((7, 0)))", [7]),
        (
            "write(b'RIFF0000WAVEfmt ' + struct.pack('<IHHIIHHHHIH', 40, 0xFFFE, 1, 16000, 32000, 2, 16, 22, 16, 4, 1)"
            " + bytes.fromhex('000000001000800000aa00389b71') + b'data' + bytes(4) + bytes((7, 0)))",
            [7],
        ),
    ],
)
async def test_wav_as_programs_write_it(tmp_path: Path, source: str, expected: list[int]) -> None:
    assert (await spoken(program(tmp_path, source), "hello"))[0].tolist() == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "ended before it had written a WAV"),
        ("sys.exit('no voice for hello there')", r"ended before .* a WAV \(status 1\): no voice for … there"),
        ("write(b'ID3' + bytes(50_000_000))", "wrote something else than WAV to standard output"),
        ("write(header(bits=8))", "wrote WAV of format 1, 8 bits, 1 channels, 16000 Hz; wanted 16-bit PCM"),
        ("write(header(rate=1000))", "1 channels, 1000 Hz; wanted 16-bit PCM .* of 8000 to 192000 Hz"),
        ("write(header(form=7))", "wrote WAV of format 7"),
        ("write(header(channels=0))", "0 channels"),
        ("write(b'RIFF0000WAVEdata' + bytes(100))", "wrote a WAV without a format or without samples"),
        ("write(b'RIFF0000WAVEfmt ' + bytes((255,)) * 4)", "wrote a WAV without a format or without samples"),
        ("write(b'RIFF0000WAVE' + b'JUNK0000'.replace(b'0', bytes(1)) * 10_000)", "wrote a WAV without a format"),
        ("write(b'RIFF0000WAVEfmt ' + struct.pack('<I', 2) + bytes(2))", "wrote a WAV whose format is cut off"),
        ("write(header(), bytes(2000)); sys.exit(3)", r"failed \(status 3\)"),
        ("os.kill(os.getpid(), 9)", r"\(status -9\)"),
    ],
)
async def test_a_program_that_fails(tmp_path: Path, source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "END_PATIENCE", 50.0)
    engine = program(tmp_path, source)
    with pytest.raises(SpeechError, match=message) as caught:
        await spoken(engine, "hello")
    assert "hello" not in str(caught.value)


async def test_what_is_no_program(tmp_path: Path) -> None:
    engine = build(SpeechSettings(synthesizer="command", command="nonesuch {text}"))
    with pytest.raises(SpeechError, match="the speech command 'nonesuch' is not installed, or not a program"):
        await engine.open()
    bad = tmp_path / "bad"
    bad.write_bytes(b"\x7fELF")
    bad.chmod(0o755)
    engine = build(SpeechSettings(synthesizer="command", command=str(bad)))
    assert "cannot be run: Exec format error" in await refused(engine)
    await engine.close()
    assert await refused(engine) == "the endpoint has ended: nothing can be spoken any more"


async def test_a_program_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PATIENCE", 0.05)
    engine = program(tmp_path, "time.sleep(60)")
    assert "wrote nothing for 0.05 s and was ended" in await refused(engine)


async def test_one_that_closes_its_output_and_stays_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "END_PATIENCE", 0.05)
    source = "write(header(), bytes(2)); sys.stdout.flush(); os.close(1); time.sleep(60)"
    assert "closed its output and did not end" in await refused(program(tmp_path, source))


async def test_a_program_nobody_listens_to_is_ended_with_all_it_started(tmp_path: Path) -> None:
    source = """
child = subprocess.Popen(["sleep", "60"])
write(header(), struct.pack("<ii", os.getpid(), child.pid))
while True:
    write(bytes(2000))
"""
    pieces = aiter(Utterance(program(tmp_path, source), "hello"))
    piece = await anext(pieces)
    while len(piece) < 4:
        piece = np.concatenate([piece, await anext(pieces)])
    pids = piece[:4].view(np.int32).tolist()
    assert all(map(known, pids))
    await pieces.aclose()
    # Not even a zombie is left of what was started here; what that had started is the system's to bury.
    assert not known(pids[0])
    await asyncio.to_thread(ended, pids[1])


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
async def test_flite_speaks() -> None:
    line = "flite -voice {voice} -t {text} -o /dev/stdout"
    engine = build(SpeechSettings(synthesizer="command", command=line, voice="slt"))
    samples, utterance = await spoken(engine, "Hello there. How are you?")
    assert utterance.sample_rate == 16000
    assert 1.0 < len(samples) / 16000 < 4.0
    assert -30 < loudness(samples) < -10
    assert [heard for _, heard in utterance.heard] == ["Hello there.", " How are you?"]
