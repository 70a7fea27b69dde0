"""The transcription benchmark runs, small, and tells what it did. No duration is asserted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_transcription as bench


def test_word_errors() -> None:
    assert bench.errors("and mister john dashwood", "and mr john dashwood") == (0, 4)
    assert bench.errors("one two three", "two three four") == (2, 3)
    assert bench.errors("one two three", "") == (3, 3)


def test_without_the_files_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TESTDATA", tmp_path)
    assert bench.run(tmp_path).startswith(f"## Transcription\n\nskipped: there is no {tmp_path}/speech;")


@pytest.mark.skipif(bench.missing() is not None, reason=str(bench.missing()))
def test_a_call_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pocketsphinx", reason="needs the speech extra")
    samples, _ = bench.speech("flite-rms_s1")
    short = np.concatenate([samples[8000 : 8000 + 16_000], np.zeros(12_000, np.int16)])
    monkeypatch.setattr(bench, "speech", lambda name: (short, 1.0))
    monkeypatch.setattr(bench, "TALKERS", 1)
    row = bench.load("PCMU", 1)
    assert row["codec"] == "PCMU"
    assert float(row["real-time factor"]) > 0
    assert row["holes"] == "0"
