"""Files that are made once and never replaced: created exclusively, named without overwriting, links never followed."""

from __future__ import annotations

import errno
import functools
import math
import os
import threading
import time
from pathlib import Path

from streamsink.disk import give_way

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def create(path: Path) -> int:
    """Make a file that must not be there, 0600; returns its descriptor, for reading and writing.

    Raises:
        FileExistsError: Something has that name, if only a dangling link.
        OSError: It cannot be made.
    """
    give_way()
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def give_name(part: Path, path: Path) -> None:
    """Give a file its final name; done again after a crash it does no harm.

    Raises:
        FileExistsError: Another file has that name: it stays as it is.
        OSError: The disk is broken.
    """
    give_way()
    try:
        os.link(part, path, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_LINKS and not os.path.lexists(path):
            # exFAT and the like; the stem is reserved, so nobody comes in between.
            part.rename(path)
            return
        if error.errno != errno.EEXIST or not _same(part, path):
            raise
    part.unlink()


def _same(one: Path, other: Path) -> bool:
    return os.path.samestat(one.lstat(), other.lstat())


class _Folder:
    """A folder that many recordings bring to the disk together.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = threading.Lock()
        # When the last fsync that succeeded began.
        self._synced = -math.inf

    def sync(self) -> None:
        asked = time.monotonic()
        with self._turn:
            if self._synced > asked:
                # One that began while we waited took ours along.
                return
            began = time.monotonic()
            fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            self._synced = began


_folder = functools.lru_cache(maxsize=64)(_Folder)


def sync_folder(path: Path) -> None:
    """Put every name given in a folder so far on the disk for good.

    Raises:
        OSError: The disk is broken.
    """
    _folder(path).sync()
