from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from streamsink import disk
from streamsink.disk import DiskSpace
from streamsink.errors import ConfigError


class Usage(NamedTuple):
    free: int


class Disk:
    """What the system says of the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 10**9
        self.asked: list[Path] = []
        monkeypatch.setattr(shutil, "disk_usage", self.usage)

    def usage(self, path: Path) -> Usage:
        self.asked.append(path)
        if self.free < 0:
            raise OSError(errno.EIO, "Input/output error")
        return Usage(self.free)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_the_real_disk_tells_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert 0 < disk.free(tmp_path / "not" / "there") <= shutil.disk_usage(tmp_path).total


def test_a_new_file_needs_room_and_is_told_once_until_there_is(
    machine: Disk, tmp_path: Path, read_log: Callable[[], str]
) -> None:
    disk = DiskSpace(200_000_000)
    disk.require(tmp_path)
    machine.free = 199_999_999
    for _ in range(3):
        with pytest.raises(OSError, match="200 MB free, 200 MB must be left") as caught:
            disk.require(tmp_path)
        assert caught.value.errno == errno.ENOSPC
    assert read_log().count("no new recordings: the disk is nearly full") == 1
    machine.free = 200_000_000
    disk.require(tmp_path)
    machine.free = 0
    with pytest.raises(OSError, match="0 MB free"):
        disk.require(tmp_path)
    assert read_log().count("no new recordings: the disk is nearly full") == 2
    registry = CollectorRegistry()
    registry.register(disk)
    assert b"streamsink_recordings_refused_total 4.0" in generate_latest(registry)


def test_nothing_is_asked_where_nothing_must_be_left(machine: Disk, tmp_path: Path) -> None:
    DiskSpace(0).require(tmp_path)
    assert machine.asked == []


def test_an_endpoint_without_room_does_not_start(machine: Disk, tmp_path: Path) -> None:
    DiskSpace(200_000_000).check(tmp_path)
    machine.free = 1_234_567
    with pytest.raises(ConfigError) as caught:
        DiskSpace(200_000_000).check(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: 1 MB free, at least 200 MB are wanted; make room, name another folder with --recordings, "
        "or ask for less with --min-free (0 for none)"
    )
    DiskSpace(0).check(tmp_path)
    machine.free = -1
    with pytest.raises(ConfigError, match="cannot tell how much room is there: Input/output error"):
        DiskSpace(1).check(tmp_path)
