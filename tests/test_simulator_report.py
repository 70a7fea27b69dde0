from __future__ import annotations

import json
from collections import Counter

from streamsink.simulator import Report


def test_the_json_object_is_the_contract() -> None:
    report = Report(
        streams=2, frames_sent=10, frames_received=9, lost=1, underruns=3, close_code=1000, events=Counter(mark=4)
    )
    assert json.loads(report.to_json()) == {
        "streams": 2,
        "frames_sent": 10,
        "frames_received": 9,
        "lost": 1,
        "turnaround_ms": {"p50": None, "p99": None, "p999": None, "max": None},
        "underruns": 3,
        "close_code": 1000,
    }
    assert report.exit_status == 1
    report.turnaround_ms = {"p50": 1.0, "p99": 2.0, "p999": 3.0, "max": 4.0}
    assert json.loads(report.to_json())["turnaround_ms"] == report.turnaround_ms


def test_the_table_leaves_out_what_did_not_happen() -> None:
    report = Report(
        streams=1,
        frames_sent=10,
        turnaround_ms={"p50": 1.0, "p99": 2.0, "p999": 3.0, "max": 4.0},
        events=Counter(clear=2),
    )
    assert report.to_text().splitlines() == [
        "streams          1",
        "frames sent      10",
        "frames received  0",
        "lost             0",
        "turnaround       p50 1.00 · p99 2.00 · p99.9 3.00 · max 4.00 ms",
        "underruns        0",
        "clears           2",
    ]
