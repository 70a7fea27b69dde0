"""The codec benchmarks run, small, and name everyone they compare. No duration is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs the bench extra")
pytest.importorskip("samplerate", reason="needs the bench extra")

from benchmarks import bench_codecs, bench_resampler

PNG = b"\x89PNG"


def test_codecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_codecs, "FRAMINGS_MS", (20,))
    rows = [line.split(" | ") for line in bench_codecs.run(tmp_path, quick=True).splitlines() if " ms | " in line]
    assert [(row[0].strip("| "), row[1], row[3]) for row in rows] == [
        (codec, direction, who)
        for codec in bench_codecs.CODECS
        for direction in ("decode", "encode")
        for who in {
            "PCMU": ["streamsink", "audioop"],
            "PCMA": ["streamsink", "audioop"],
            "G722": ["streamsink", "G722", "PyAV"],
        }.get(codec, ["streamsink", "numpy"])
    ]
    assert (tmp_path / "codecs.png").read_bytes().startswith(PNG)


def test_resampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_resampler, "PAIRS", [(8000, 16_000)])
    report = bench_resampler.run(tmp_path, quick=True)
    ours = [line for line in report.splitlines() if line.startswith("| 8000 → 16000 | streamsink |")]
    assert len(ours) == 2
    assert ours[0].endswith("| 0.0 ms |")
    for name in ("resampler_sweep.png", "resampler_two_tones.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
