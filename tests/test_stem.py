from __future__ import annotations

import itertools
import multiprocessing
import os
import stat
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from streamsink.stem import reserve, safe
from tests.streams import STARTED_AT

NAMES = {
    "front-desk_2.b": "front-desk_2.b",
    "front desk": "front_desk",
    "../../x": "_.._x",
    "/etc/passwd": "_etc_passwd",
    "..": "_",
    "": "_",
    ".hidden": "hidden",
    "a\0b": "a_b",
    "\x1b[31mred\r\n": "__31mred__",
    "Zürich ☎": "Z_rich__",
    "日本": "__",
    "CON": "CON",
    "a" * 4096: "a" * 80,
    "é" * 4096: "_" * 80,
    "C:\\x": "C__x",
    "-rf": "-rf",
}


@pytest.mark.parametrize(("name", "wanted"), NAMES.items(), ids=[ascii(name)[:20] for name in NAMES])
def test_any_name_becomes_one_safe_part_of_a_file_name(name: str, wanted: str, tmp_path: Path) -> None:
    assert safe(name) == wanted
    stem = reserve(tmp_path / "in", STARTED_AT, name)
    assert stem == f"20261120T204218Z_{wanted}"
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [
        f"in/{stem}.json.part"
    ]


def test_the_time_is_utc(tmp_path: Path) -> None:
    local = STARTED_AT.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert reserve(tmp_path, local, "x") == "20261120T204218Z_x"
    assert reserve(tmp_path, datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC), "x") == "20270102T030405Z_x"


def test_what_is_made_is_private(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "recordings"
    stem = reserve(directory, STARTED_AT, "x")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / f"{stem}.json.part").stat().st_mode) == 0o600


@pytest.mark.parametrize("ending", ["json.part", "json", "wav", "wav.part", "flac", "ogg", "opus", "mp3", "mp3.part"])
def test_a_stem_is_taken_when_any_of_its_files_is_there(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"20261120T204218Z_x.{ending}").write_bytes(b"theirs")
    (tmp_path / f"20261120T204218Z_x_2.{ending}").write_bytes(b"theirs")
    assert reserve(tmp_path, STARTED_AT, "x") == "20261120T204218Z_x_3"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [
            f"20261120T204218Z_x.{ending}",
            f"20261120T204218Z_x_2.{ending}",
            "20261120T204218Z_x_3.json.part",
        ]
    )


def _reserve_many(directory: Path) -> list[str]:
    return [reserve(directory, STARTED_AT, "same") for _ in range(50)]


def test_processes_that_reserve_at_once_never_share_a_stem(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        stems = [stem for stems in pool.map(_reserve_many, [tmp_path] * 4) for stem in stems]
    assert len(set(stems)) == 200
    assert {f"{stem}.json.part" for stem in stems} == {path.name for path in tmp_path.iterdir()}


def test_many_of_one_name_try_each_number_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2, 12):
        (tmp_path / f"20261120T204218Z_same_{number}.json").write_bytes(b"theirs")
    tried = itertools.count()
    really_open = os.open

    def counted_open(path: Path, flags: int, mode: int = 0o777) -> int:
        # Threads of other tests may open files, too.
        if Path(path).parent == tmp_path:
            next(tried)
        return really_open(path, flags, mode)

    monkeypatch.setattr(os, "open", counted_open)
    stems = [reserve(tmp_path, STARTED_AT, "same") for _ in range(100)]
    assert stems == [f"20261120T204218Z_same{suffix}" for suffix in ("", *(f"_{n}" for n in range(12, 111)))]
    # Ten were theirs.
    assert next(tried) == 110


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        reserve(tmp_path / "file", STARTED_AT, "x")
