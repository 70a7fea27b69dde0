"""Every benchmark runs, small, and what it reports is what happened. No duration is asserted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import __main__ as report
from benchmarks import bench_endpoint, bench_mixing, bench_path, bench_playout, bench_recording, rooms_over_nats
from benchmarks.bench_endpoint import SERVERS, ServerFailed, carried, load, running, search
from benchmarks.load import Result, Step, cpu_seconds, masked_frame, media_text, resident_bytes
from streamsink.codec import CodecSpec
from tests.nats_server import needs_nats

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the benchmarks read Linux's /proc")


def a_step(streams: int, p99_ms: float = 1.0, lost: int = 0, cut: int = 0, wrong: int = 0) -> Step:
    return Step(
        streams=streams,
        seconds=1.0,
        messages=streams * 50,
        lost=lost,
        cut=cut,
        wrong=wrong,
        p50_ms=0.1,
        p99_ms=p99_ms,
        p999_ms=p99_ms,
        worst_ms=p99_ms,
        server_cpu_us=20.0,
        server_share=0.5,
        load_share=0.4,
        load_late_ms=1.0,
        rss=50_000_000,
    )


@pytest.mark.parametrize("name", list(SERVERS))
def test_every_server_echoes_everything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "picows":
        pytest.importorskip("picows")
    monkeypatch.setattr(bench_endpoint, "WARMUP", 0.2)
    with running(SERVERS[name], SERVERS[name].memory_arguments) as (pid, port):
        result = load(pid, port, [2, 5], seconds=1.5, patience=30)
    assert [(step.streams, step.lost, step.cut, step.wrong) for step in result.steps] == [(2, 0, 0, 0), (5, 0, 0, 0)]
    assert all(step.messages > 0 for step in result.steps)
    assert all(0 < step.p50_ms <= step.p99_ms <= step.p999_ms <= step.worst_ms for step in result.steps)
    assert min(result.rss_start, result.rss_end, result.steps[0].rss) > 0


def test_a_refused_stream_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(SERVERS["common"]) as (pid, port):
        monkeypatch.setattr(bench_endpoint, "TOKEN", "another")
        with pytest.raises(ServerFailed, match="401"):
            load(pid, port, [1], seconds=0.1)


def test_a_server_that_does_not_start_is_told() -> None:
    broken = bench_endpoint.Server("broken", "", ("-c", "raise SystemExit('no port today')"))
    with pytest.raises(ServerFailed, match="no port today"), running(broken):
        pass


def test_what_is_carried() -> None:
    assert carried(a_step(1))
    assert not carried(a_step(1, p99_ms=20.0))
    assert not carried(a_step(1, lost=1))
    assert not carried(a_step(1, cut=1))
    assert not carried(a_step(1, wrong=1))


@pytest.mark.parametrize("limit", [3, 249, 250, 1000, 1337, 7000])
def test_search_closes_in_on_the_limit(limit: int) -> None:
    best, worst = search(lambda streams: a_step(streams, lost=int(streams > limit)), first=250, tolerance=0.05)
    assert best is not None
    assert worst is not None
    assert best.streams <= limit < worst.streams
    assert worst.streams - best.streams <= max(1, 0.05 * worst.streams)


def test_search_stops_where_nothing_is_carried_or_everything_is() -> None:
    best, worst = search(lambda streams: a_step(streams, lost=1), first=250, tolerance=0.05)
    assert (best, worst and worst.streams) == (None, 1)
    best, worst = search(a_step, first=250, tolerance=0.05)
    assert (best and best.streams, worst) == (8000, None)


def test_one_bad_second_fails_no_number() -> None:
    seen: list[int] = []

    def attempt(streams: int) -> Step:
        seen.append(streams)
        return a_step(streams, lost=int(streams > 400 or seen.count(streams) == 1))

    best, _ = search(attempt, first=250, tolerance=0.05)
    assert best is not None
    assert best.streams > 380


def test_tables_compare_with_the_common_server_and_the_floor() -> None:
    fast, slow = a_step(250), a_step(250)
    slow.server_cpu_us = 50.0
    assert bench_endpoint.cost_table({"common": slow, "streamsink": fast, "floor": fast}).splitlines()[3] == (
        "| **streamsink**, all guards and metrics, processor `echo` | 20.0 | 40% | 0.0 | 0.10 / 1.00 / 1.00 | 0 "
        "| 40% | 1.0 |"
    )
    found = {"common": (a_step(400), a_step(410, p99_ms=25)), "streamsink": (a_step(1200), a_step(1250, lost=7))}
    assert bench_endpoint.capacity_table(found).splitlines()[3] == (
        "| **streamsink**, all guards and metrics, processor `echo` | 1200 | 3.00 | 0.10 / 1.00 / 1.00 | 20.0 | 50% "
        "| 40% | 1250 (p99 1 ms, 7 lost) |"
    )


def test_memory_is_told_by_stream_and_after_each_round() -> None:
    rounds = (
        Result(rss_start=40_000_000, steps=[a_step(250)], rss_end=42_000_000),
        Result(rss_start=42_000_000, steps=[a_step(250, lost=3)], rss_end=43_000_000),
    )
    assert bench_endpoint.memory_table({"picows": rounds}) == (
        "| server | MB at start | kB a stream at 250 | MB after the last | MB after a second round | lost |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| the same work on `picows`, in Cython | 40 | 40 | 42 | 43 | 3 |"
    )


def test_what_the_load_sends_is_what_the_platform_sends() -> None:
    text = media_text(3)
    assert text.startswith(
        b'{"event":"media","sequenceNumber":"100003","media":{"track":"inbound","chunk":"100003",'
        b'"timestamp":"2000060","payload":"'
    )
    frame = masked_frame(text)
    assert frame[:2] == b"\x81\xfe"
    assert int.from_bytes(frame[2:4]) == len(text) == len(frame) - 8
    assert bytes(octet ^ frame[4 + i % 4] for i, octet in enumerate(frame[8:])) == text


def test_a_process_is_read() -> None:
    before = cpu_seconds(os.getpid())
    sum(range(1_000_000))
    assert cpu_seconds(os.getpid()) > before
    assert resident_bytes(os.getpid()) > 1_000_000


@pytest.mark.parametrize("codec", ["PCMU", "L16@24000h@40i"])
async def test_every_stage_of_the_path_is_timed(codec: str) -> None:
    timings = await bench_path.stages(CodecSpec.parse(codec), blocks=2)
    both_ways = {"in", "out", *bench_path.IN, *bench_path.OUT, "floor in", "floor out", "resample"}
    assert timings.keys() == both_ways
    assert len({line.count("|") for line in bench_path.tables({codec: timings}).splitlines() if codec in line}) == 2


def test_a_room_is_timed_and_its_delay_is_that_of_its_buffers() -> None:
    assert min(bench_mixing.cost(3, 10, mixed=True)) > 0
    late = bench_mixing.delays((8000, 16_000), (0.011, 0.003), 6.0)
    assert len(late) >= 20
    assert all(0.02 < each < 0.15 for each in late)
    assert late[-1] < late[0]


@needs_nats
def test_how_late_rooms_are_over_nats_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for row in rooms_over_nats.table(2, 4.5) if " ms" not in row and row.startswith(("| first", "| later"))]
    assert [0.03 < float(row.split("|")[2]) / 1000 < 0.5 for row in rows] == [True, True]
    monkeypatch.setattr(rooms_over_nats, "PROGRAM", None)
    assert "not installed" in rooms_over_nats.table(2, 3)[0]


async def test_a_codec_at_the_asked_rate_is_not_resampled() -> None:
    timings = await bench_path.stages(CodecSpec.parse("G722"), blocks=1)
    assert "resample" not in timings


@pytest.mark.parametrize("pacer", list(bench_playout.PACERS))
def test_streams_that_talk_are_listened_to(pacer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_playout, "WARMUP", 0.2)
    seen = bench_playout.measure(pacer, streams=3, lead_ms=60, seconds=2.0)
    assert seen.frames >= 3 * 15
    assert 0 <= seen.p50_ms <= seen.p99_ms <= seen.p999_ms <= seen.worst_ms
    assert seen.cpu_us > 0
    assert len(seen.silenced_ms) == len(seen.cleared_ms) == 3
    assert min(seen.cleared_ms) > 0
    lines = bench_playout.table({(3, 60, pacer): seen}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(bench_playout.barge_in_table({(3, 60, pacer): seen}).splitlines()) == (3 if pacer == "streamsink" else 2)


def test_lateness_is_counted_from_the_first_frame_and_the_lead() -> None:
    # Three frames of lead at once, then one each 20 ms, the last one 5 ms late and 10 ms too late for who plays them.
    arrivals = [10.0, 10.0, 10.0, 10.02, 10.045]
    assert bench_playout.lateness(arrivals, 3, since=0) == pytest.approx([0, 0, 0, 0, 0.005])
    assert bench_playout.lateness(arrivals, 3, since=10.04) == pytest.approx([0.005])
    assert bench_playout.underruns(arrivals, since=0) == 0
    assert bench_playout.underruns([*arrivals, 10.11, 10.12, 10.2], since=0) == 2
    assert bench_playout.underruns([*arrivals, 10.11, 10.12, 10.2], since=10.12) == 1


@pytest.mark.parametrize("way", ["record", "upload", "inline"])
def test_recording_is_measured(way: str) -> None:
    measured = bench_recording.measure(way, "flac", streams=3, seconds=0.5)
    assert measured.cpu > 0
    assert 0 < measured.stall_p999 <= measured.stall_max
    assert 0 < measured.idle_p999 <= measured.idle_max
    # One call has taken the first one's place.
    assert measured.recorded == 4


def test_kills_are_counted() -> None:
    files, worst = bench_recording.kills(2)
    assert files <= 10
    assert worst < 100_000


def test_the_report_names_the_machine_but_not_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "section", lambda name, out, quick: f"## {name} {quick}\n")
    written = report.write_report(["endpoint", "path"], tmp_path / "results", quick=True)
    text = written.read_text()
    assert "## endpoint True\n\n## path True\n" in text
    assert "msgspec" in text
    assert os.uname().nodename not in text
    assert str(Path.cwd()) not in text


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(["nonsense"])
    assert "no benchmark is called nonsense" in capsys.readouterr().err
