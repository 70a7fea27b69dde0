"""What a new user does, with real processes on a real TLS port: serve, simulate, listen."""

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import G722
import numpy as np
import pytest
import soundfile

from streamsink.audio import Samples
from streamsink.codec import CodecSpec
from streamsink.simulator import encode_payloads, read_audio

ROOT = Path(__file__).parents[1]
SPEECH = ROOT / "tests/data/speech.wav"
TESTDATA = Path(os.environ.get("STREAMSINK_TESTDATA", ROOT.parent / "shared" / "testdata"))
LIBRIVOX = TESTDATA / "speech" / "librivox_0870_16k.wav"
CODECS = ["PCMU", "PCMA@40i", "G722", "L16@16000h", "L16@24000h@40i"]


# The simulator, but one that goes on waiting when the machine is busy with something else.
SIMULATOR = """
from streamsink.cli import main
from streamsink.simulator import simulation

simulation.GRACE = 5.0
simulation.QUIET = 3.0
main()
"""


class Served:
    """`python -m streamsink` as its own process."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.recordings = folder / "recordings"
        self.state = folder / "state"
        self.log = folder / "log"
        command = [sys.executable, "-m", "streamsink", "--port", "0", "--recordings", str(self.recordings)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--state", str(self.state), *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        match = re.match(r"listening on (wss?)://[^/]*:(\d+)/", first)
        assert match is not None, first + self.log.read_text()
        self.url = f"{match[1]}://localhost:{match[2]}/"

    def simulate(self, *arguments: str, file: Path = SPEECH) -> dict[str, Any]:
        command = [sys.executable, "-c", SIMULATOR, "simulate", str(file), "--json", "--url", self.url]
        result = subprocess.run(
            [*command, "--state", str(self.state), *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert result.returncode == 0, result.stderr + self.log.read_text()
        report: dict[str, Any] = json.loads(result.stdout)
        return report

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=30)
        return self.process.returncode


def without_holes(folder: Path) -> tuple[str, str]:
    """Flags that send audio so early that a busy machine makes no holes in it."""
    config = folder / "early.toml"
    config.write_text("playout_lead_ms = 2000\n")
    return "--config", str(config)


def reference(codec: str, file: Path = SPEECH) -> tuple[Samples, int]:
    """What somebody else's decoder makes of what the simulator sends; L16 is what it read."""
    spec = CodecSpec.parse(codec)
    audio = read_audio(file, spec.rate)
    sent = encode_payloads(audio, spec)
    octets = b"".join(sent)
    if spec.name == "L16":
        # The last message is filled up with silence.
        return np.pad(audio, (0, len(octets) // 2 - len(audio))), spec.rate
    if spec.name == "G722":
        return np.array(G722.G722(16_000, 64_000).decode(octets), np.int16), spec.rate
    ffmpeg = av.CodecContext.create("pcm_mulaw" if spec.name == "PCMU" else "pcm_alaw", "r")
    ffmpeg.sample_rate = spec.rate
    ffmpeg.layout = "mono"
    decoded = [part.to_ndarray()[0] for part in ffmpeg.decode(av.Packet(octets))]
    return np.concatenate(decoded), spec.rate


@pytest.mark.parametrize("file", [SPEECH, LIBRIVOX], ids=lambda file: file.stem)
def test_every_codec_is_recorded_to_the_sample(file: Path, tmp_path: Path) -> None:
    if not file.exists():
        pytest.skip(f"no speech in {file.parent}: set STREAMSINK_TESTDATA")
    served = Served(tmp_path)

    def call(codec: str) -> dict[str, Any]:
        return served.simulate("--codec", codec, "--name", codec, "--param", "agent=7", file=file)

    # All in the time of one.
    with ThreadPoolExecutor(len(CODECS)) as calls:
        for report in calls.map(call, CODECS):
            assert (report["lost"], report["close_code"]) == (0, 1000)
    assert served.url.startswith("wss:")
    assert served.stop() == 0
    assert "Traceback" not in served.log.read_text()
    assert len(list(served.recordings.iterdir())) == 2 * len(CODECS)
    for codec in CODECS:
        (sidecar,) = [p for p in served.recordings.glob("*.json") if json.loads(p.read_text())["name"] == codec]
        told = json.loads(sidecar.read_text())
        samples, rate = soundfile.read(sidecar.with_suffix(".wav"), dtype="int16")
        expected, expected_rate = reference(codec, file)
        assert rate == told["sample_rate"] == expected_rate
        assert np.abs(expected.astype(int)).max() > 1000
        assert samples.tolist() == expected.tolist()
        assert told["duration_seconds"] == pytest.approx(len(expected) / rate)
        assert told["codec"] == str(CodecSpec.parse(codec))
        assert (told["gaps"], told["complete"], told["close_code"]) == ([], True, 1000)
        assert told["custom_parameters"] == {"agent": "7"}


def test_echo_loses_nothing_at_a_hundred_streams(tmp_path: Path) -> None:
    served = Served(tmp_path, "-p", "echo")
    report = served.simulate("--streams", "100", "--expect-echo", "--seconds", "2")
    assert (report["streams"], report["frames_sent"], report["frames_received"], report["lost"]) == (
        100,
        10_000,
        10_000,
        0,
    )
    assert served.stop() == 0


def test_a_processor_of_ones_own_is_heard(tmp_path: Path) -> None:
    quiet = tmp_path / "question.wav"
    speech, rate = soundfile.read(SPEECH, dtype="int16")
    soundfile.write(quiet, np.concatenate([speech[:16_000], np.zeros(rate * 2, np.int16)]), rate)
    served = Served(tmp_path, "-p", f"{ROOT}/examples/answer.py:Answer:pause=0.3", *without_holes(tmp_path))
    served.simulate("--codec", "L16@16000h", "--save", str(tmp_path / "reply.wav"), file=quiet)
    assert served.stop() == 0
    reply, _ = soundfile.read(tmp_path / "reply.wav", dtype="int16")
    # What comes back is what was said, sample for sample, later.
    said = speech[:16_000][np.argmax(speech > 500) // 320 * 320 :][:3200]
    at = int(np.argmax(np.correlate(reply.astype(float), said.astype(float), "valid")))
    assert at > 16_000
    assert reply[at : at + 3200].tolist() == said.tolist()


def test_the_parrot_says_the_utterance_whole_and_once(tmp_path: Path) -> None:
    served = Served(tmp_path, "--processor", "parrot", *without_holes(tmp_path))
    back = tmp_path / "back.wav"
    report = served.simulate("--save", str(back))
    assert served.stop() == 0
    assert report["underruns"] == 0
    said, rate = reference("PCMU")
    heard, _ = soundfile.read(back, dtype="int16")
    # What was said is where both are most alike: there it comes back sample for sample, since coding it twice is
    # coding it once.
    size = len(said) + len(heard)
    likeness = np.fft.irfft(np.fft.rfft(heard, size) * np.conj(np.fft.rfft(said, size)), size)
    at = int(np.argmax(likeness))
    same = np.pad(heard, (0, len(said)))[at : at + len(said)] == said
    # The utterance is from 0.25 s to 2.8 s of the file, and its soft edges are in it.
    assert same[round(0.15 * rate) : round(2.9 * rate)].all()
    # It came after the pause that ends an utterance, and there is nothing else in the call.
    assert at > round((2.8 + 0.7 - 0.25) * rate)
    loud = np.flatnonzero(np.abs(heard) > 100)
    assert loud[0] >= at
    assert loud[-1] < at + len(said)


STUBBORN = """
import asyncio
import sys

from streamsink import Processor


class Stubborn(Processor):
    def on_frame(self, frame):
        # The real limit is ten seconds. By now what needs them has started.
        sys.modules["streamsink.processor"].HOOK_TIMEOUT = 0.5

    async def on_stop(self, reason):
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass
"""


def test_a_hook_that_never_ends_does_not_keep_the_process(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    served = Served(tmp_path, "-p", f"{tmp_path}/stubborn.py:Stubborn", "-p", "record")
    served.simulate("--seconds", "0.1")
    assert served.stop() == 0
    assert "took longer than 0.5 s" in served.log.read_text()
    assert [path.suffix for path in sorted(served.recordings.iterdir())] == [".json", ".wav"]
