"""Processes to be killed: each records a few streams through real sessions, in real time.

``python -m tests.recording_child FOLDER N`` forks N of them and prints their process ids. Child ``i`` records into
``FOLDER/i`` and keeps in ``FOLDER/fed-i``, which outlives it, how many samples each stream has been given.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from streamsink import log
from streamsink.codec import CodecSpec
from streamsink.config import Pipeline, Settings
from streamsink.endpoint import Endpoint
from streamsink.metrics import Metrics
from streamsink.plugins import find
from streamsink.session import Session
from streamsink.wire import PlatformWriter

FORMATS = ("wav", "wav", "flac", "wav", "flac")
PTIME = 0.02
_LAST = (None, None, None, 40, 60)
"""Frames after which a stream stops, so that kills come while files are finished too."""


def encoded(number: int, n: int) -> bytes:
    """PCMU that says where it belongs."""
    return bytes((np.arange(n) * 7 + np.arange(n) // 160 + number * 31).astype(np.uint8) | 0x80)


def spoken(number: int, n: int) -> np.ndarray[Any, Any]:
    """What it decodes to."""
    return CodecSpec.parse("PCMU").decoder().decode(encoded(number, n))


class Outlet:
    def send(self, text: bytes) -> None:
        pass

    def limit_unsent(self, octets: int) -> None:
        pass

    def close(self, code: int, reason: str) -> None:
        pass


async def record(folder: Path, fed: np.ndarray[Any, Any]) -> None:
    loop = asyncio.get_running_loop()
    named = {name: Pipeline(processors=[f"record:format={name}"]) for name in set(FORMATS)}
    settings = Settings(recordings=folder, pipelines={"default": named["wav"], **named})
    pipelines = {name: [find(s) for s in pipeline.processors] for name, pipeline in settings.pipelines.items()}
    endpoint = Endpoint(settings, pipelines, Metrics(), loop)
    sessions = []
    for number, name in enumerate(FORMATS):
        session = Session(endpoint, Outlet(), path="/", pipeline=name, client="", token_name="", now=loop.time())
        writer = PlatformWriter(str(number))
        session.receive(writer.connected(), loop.time())
        text = writer.start(account_sid="a", call_sid="c", encoding="audio/x-mulaw", sample_rate=8000)
        session.receive(text, loop.time())
        sessions.append((session, writer, encoded(number, 8000 * 10)))
    for step in range(500):
        # Not on absolute deadlines: a machine that stood still shall not send seconds in a moment.
        await asyncio.sleep(PTIME)
        for number, (session, writer, payload) in enumerate(sessions):
            if step == _LAST[number]:
                session.receive(writer.stop(), loop.time())
            if session.ended:
                continue
            piece = payload[step * 160 : step * 160 + 160]
            session.receive(writer.media(piece, chunk=step + 1, timestamp_ms=step * 20), loop.time())
            fed[number] += 160


def main(folder: Path, children: int) -> None:
    log.configure("text", "error")
    pids = []
    for number in range(children):
        path = folder / f"fed-{number}"
        path.write_bytes(bytes(8 * len(FORMATS)))
        pid = os.fork()
        if not pid:
            with path.open("r+b") as file:
                fed = np.frombuffer(mmap.mmap(file.fileno(), 0), np.int64)
            asyncio.run(record(folder / str(number), fed))
            os._exit(0)
        pids.append(pid)
    print(*pids, flush=True)  # noqa: T201
    for pid in pids:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
