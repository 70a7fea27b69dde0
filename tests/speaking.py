"""Having an engine speak."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamsink.audio import Samples
from streamsink.errors import SpeechError
from streamsink.speech.synthesis import Synthesizer, Utterance


@contextlib.asynccontextmanager
async def closing(engine: Synthesizer) -> AsyncIterator[Any]:
    try:
        yield engine
    finally:
        await engine.close()


async def spoken(engine: Synthesizer, text: str, voice: str | None = None) -> tuple[Samples, Utterance]:
    utterance = Utterance(engine, text, voice)
    pieces = [piece async for piece in utterance]
    return np.concatenate([np.zeros(0, np.int16), *pieces]), utterance


async def refused(engine: Synthesizer, text: str = "hello", voice: str | None = None) -> str:
    with pytest.raises(SpeechError) as caught:
        await spoken(engine, text, voice)
    return str(caught.value)


def loudness(samples: Samples) -> float:
    """RMS in dBFS."""
    return float(20 * np.log10(samples.astype(float).std() / 32768))


def ended(pid: int) -> None:
    """Wait until a process runs no more; for a thread."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            time.sleep(0.005)


def known(pid: int) -> bool:
    """Whether the system knows a process, be it a zombie."""
    return Path(f"/proc/{pid}").exists()
