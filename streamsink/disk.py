"""What disks are asked and threads that use them mind: how much room there is, and whose turn it is."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import structlog
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from streamsink.errors import ConfigError

log = structlog.get_logger(__name__)


def give_way() -> None:
    """Let the event loop have this core, should it wait for it; for the threads that work on files, between two steps.

    A thread that goes from one system call to the next keeps its core for a whole slice of time, 3 ms and more, and the
    kernel gives it to nobody who wakes up in between. Measured on one core, while a file was being hashed: the loop was
    kept waiting for 4 ms, and with this between pieces for 0.3.
    """
    os.sched_yield()


def free(folder: Path) -> int:
    """Tell how many bytes may still be written to a folder, or to where it would be made.

    Raises:
        OSError: The disk does not say.
    """
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


class DiskFull(OSError):
    """There is less space on the disk than must be left for a new file (ENOSPC)."""


class DiskSpace(Collector):
    """The space that must be left on the disk for a new file to be opened. Any thread may ask.

    Args:
        least: Bytes; 0 asks for none.

    Attributes:
        refused: How often a new file was refused.
    """

    def __init__(self, least: int) -> None:
        self.least = least
        self.refused = 0
        self._lock = threading.Lock()
        # Folders that were short of room when last asked about: each is told once until it has room again.
        self._short: set[Path] = set()

    def require(self, folder: Path) -> None:
        """Ask for room for a new file.

        Raises:
            DiskFull: There is less than must be left.
            OSError: The disk does not say.
        """
        if not self.least:
            return
        there = free(folder)
        with self._lock:
            if there >= self.least:
                self._short.discard(folder)
                return
            self.refused += 1
            told = folder in self._short
            self._short.add(folder)
        if not told:
            log.error("no new recordings: the disk is nearly full", folder=str(folder), free=there, min_free=self.least)
        raise DiskFull(
            errno.ENOSPC, f"{_megabytes(there)} free, {_megabytes(self.least)} must be left", os.fspath(folder)
        )

    def collect(self) -> Iterator[Metric]:
        """What Prometheus is told."""
        yield CounterMetricFamily(
            "streamsink_recordings_refused", "Files not opened since the disk is nearly full.", value=self.refused
        )

    def check(self, folder: Path) -> None:
        """Ask the same when the endpoint starts.

        Raises:
            ConfigError: There is less than must be left, or the disk does not say.
        """
        try:
            there = free(folder)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot tell how much room is there: {error.strerror}") from None
        if there < self.least:
            raise ConfigError(
                f"{folder}: {_megabytes(there)} free, at least {_megabytes(self.least)} are wanted; make room, "
                "name another folder with --recordings, or ask for less with --min-free (0 for none)"
            )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
