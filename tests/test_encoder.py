"""Files of other formats are made in a process of their own: checked, retried, and no harm to whoever asked."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soundfile

from streamsink.child import BlockingChild
from streamsink.errors import NotEncoded
from streamsink.processors import encoder, encoder_process, formats
from streamsink.processors.formats import Made, Order, Source
from streamsink.processors.wav import WavPart
from tests.streams import counting
from tests.test_child import wait_for_the_end_of
from tests.test_delivery import until

FRAMES = 40_000


@pytest.fixture
def order(tmp_path: Path) -> Iterator[Order]:
    """A live file of another process's, locked as it is while it lives, that is to be FLAC."""
    wav = WavPart(tmp_path / "a.wav", 8000, 1)
    wav.write(counting(0, FRAMES), 0, 0)
    yield Order(
        sources=[Source(str(wav.part), 8000, 1, FRAMES)],
        parts=[str(tmp_path / "a.flac.part")],
        format="flac",
        sample_rate=8000,
    )
    wav.close()


def no_signs() -> None:
    pass


def made_here(order: Order) -> Made:
    """Without another process."""
    *steps, made = formats.make(order)
    assert steps == [None] * len(steps)
    assert made is not None
    return made


def test_what_is_made_is_whole_and_its_digest_true(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    # Were it made in this process it could not be.
    monkeypatch.delattr(soundfile.SoundFile, "write")
    (part,) = order.parts
    # An earlier attempt's.
    Path(part).write_bytes(b"fLaC")
    made = encoder.make(order, no_signs)
    assert made == Made((0, FRAMES), [hashlib.sha256(Path(part).read_bytes()).hexdigest()])
    assert Path(part).stat().st_mode & 0o777 == 0o600
    assert soundfile.read(part, dtype="int16")[0].tolist() == counting(0, FRAMES).tolist()


def test_it_never_competes_with_calls_for_a_core(order: Order) -> None:
    encoder.make(order, no_signs)
    assert encoder._encoders.child is not None
    assert os.sched_getscheduler(encoder._encoders.child.pid) == os.SCHED_IDLE


def test_it_begins_nothing_for_who_has_died(order: Order) -> None:
    command = [sys.executable, "-m", "streamsink.processors.encoder_process"]
    asked = msgspec.msgpack.encode(msgspec.to_builtins(order))
    # As by who was killed behind its question, before the process was ready to read it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        said, _ = process.communicate(struct.pack("<I", len(asked)) + asked)
    assert (process.returncode, said) == (0, b"")
    assert not Path(order.parts[0]).exists()


ASKING = """
import sys, threading
import msgspec
from streamsink.processors import encoder, formats
order = msgspec.json.decode(sys.argv[1], type=formats.Order)
asking = encoder.BlockingChild("streamsink.processors.encoder_process")
asking.send(msgspec.to_builtins(order))
print(asking.pid, asking._process.stdout.fileno(), flush=True)
threading.Event().wait()
"""


def test_it_goes_on_with_nothing_for_who_has_died(tmp_path: Path) -> None:
    # So long that nobody would wait for its end.
    frames = 2 * 10**8
    wav = WavPart(tmp_path / "a.wav", 8000, 1)
    os.truncate(wav.part, 44 + 2 * frames)
    part = tmp_path / "a.opus.part"
    order = Order([Source(str(wav.part), 8000, 1, frames)], [str(part)], "opus", 48_000)
    command = [sys.executable, "-c", ASKING, msgspec.json.encode(order).decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pid, answers = map(int, owner.stdout.readline().split())
        until(lambda: part.exists() and part.stat().st_size > 0)
        # By itself it would only notice with its next sign of life that nobody takes it, and here somebody does.
        with open(f"/proc/{owner.pid}/fd/{answers}", "rb"):
            owner.kill()
            wait_for_the_end_of(pid)
    wav.close()


def test_each_thread_has_a_process_and_keeps_it(order: Order) -> None:
    encoder.make(order, no_signs)
    first = encoder._encoders.child
    encoder.make(order, no_signs)
    assert encoder._encoders.child is first
    others: list[object] = []

    def elsewhere() -> None:
        encoder.make(order, no_signs)
        assert encoder._encoders.child is not None
        others.append(encoder._encoders.child.pid)
        encoder._encoders.child.close()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert first is not None
    assert others != [first.pid]


class Killing:
    """Kills the process that encodes whenever it has begun, so many times."""

    def __init__(self, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = times
        self.pids: list[int] = []
        ask = BlockingChild.send
        monkeypatch.setattr(BlockingChild, "send", lambda child, message: self.send(ask, child, message))

    def send(self, send: Callable[[BlockingChild, object], None], child: BlockingChild, message: object) -> None:
        self.pids.append(child.pid)
        if self.left:
            self.left -= 1
            os.kill(child.pid, signal.SIGSTOP)
            send(child, message)
            child.kill()
        else:
            send(child, message)


def test_a_process_that_dies_is_replaced(
    order: Order, monkeypatch: pytest.MonkeyPatch, read_log: Callable[[], str]
) -> None:
    killing = Killing(1, monkeypatch)
    made = encoder.make(order, no_signs)
    assert made.span == (0, FRAMES)
    assert len(set(killing.pids)) == 2
    assert "encoding failed" in read_log()
    assert "status -9" in read_log()


def test_what_kills_every_process_is_given_up(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    Killing(2, monkeypatch)
    with pytest.raises(NotEncoded, match="died"):
        encoder.make(order, no_signs)
    assert not Path(order.parts[0]).exists()


def test_a_full_disk_is_told_as_what_it_is(order: Order) -> None:
    # Whoever asks is not the one that is out of room.
    encoder.make(order, no_signs)
    assert encoder._encoders.child is not None
    limits = resource.prlimit(encoder._encoders.child.pid, resource.RLIMIT_FSIZE, (4096, 4096))
    assert limits[0] != 4096
    noise = np.random.default_rng(1).integers(-9000, 9000, FRAMES).astype(np.int16)
    with open(order.sources[0].path, "r+b") as file:
        file.seek(44)
        file.write(noise.tobytes())
    with pytest.raises(OSError, match="File too large") as caught:
        encoder.make(order, no_signs)
    assert caught.value.errno == errno.EFBIG
    assert not Path(order.parts[0]).exists()
    encoder._encoders.child.close()
    encoder._encoders.child = None


def test_what_cannot_be_made_is_told(order: Order) -> None:
    order.format = "cassette"
    with pytest.raises(NotEncoded, match="KeyError: 'cassette'"):
        encoder.make(order, no_signs)


def test_a_disk_that_takes_only_a_part_is_noticed(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(self: soundfile.SoundFile, data: object) -> None:
        raise AssertionError

    monkeypatch.setattr(soundfile.SoundFile, "write", short)
    with pytest.raises(OSError, match="took only a part"):
        made_here(order)


def test_what_reads_back_differently_is_not_kept(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    write = soundfile.SoundFile.write
    monkeypatch.setattr(soundfile.SoundFile, "write", lambda self, data: write(self, data + np.int16(1)))
    with pytest.raises(OSError, match="cannot be read back"):
        made_here(order)


def test_a_file_that_is_there_is_not_written_over(order: Order) -> None:
    Path(order.parts[0]).write_bytes(b"theirs")
    with pytest.raises(FileExistsError):
        made_here(order)
    assert Path(order.parts[0]).read_bytes() == b"theirs"


def test_long_work_gives_signs_of_life(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_process, "TELL", 0.0)
    *signs, made = encoder_process.reply(msgspec.to_builtins(order))
    # Written and read back a block at a time, then digested.
    assert signs == [None] * (2 * -(-FRAMES // formats.BLOCK) + 1)
    assert msgspec.convert(made, Made).span == (0, FRAMES)
