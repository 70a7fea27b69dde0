"""The state folder: small private files that are made once and kept."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from streamsink.errors import ConfigError

log = structlog.get_logger()


def read_private(path: Path) -> bytes | None:
    """Read a file that only its owner may read; None where there is none.

    A file that others may read is mended to 0600, with a warning, since what it holds may have been seen.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                os.fchmod(file.fileno(), 0o600)
                log.warning(
                    "a private file could be read by others; it is 0600 now, delete it to have a new one made",
                    path=str(path),
                    mode=f"{mode:04o}",
                )
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read or made private: {error.strerror}") from error


def create_private(path: Path, content: bytes) -> bool:
    """Make a 0600 file in one step; False where it is there already, made by whoever was first.

    Raises:
        ConfigError: It cannot be written.
    """
    with _written_aside(path, content) as made:
        try:
            # A link appears with its whole content or not at all, and never in place of another file.
            os.link(made, path)
        except FileExistsError:
            return False
        return True


def replace_private(path: Path, content: bytes) -> None:
    """Make a 0600 file in one step, in place of the one that may be there.

    Raises:
        ConfigError: It cannot be written.
    """
    with _written_aside(path, content) as made:
        os.replace(made, path)


@contextmanager
def only_one_process(folder: Path) -> Iterator[None]:
    """Keep other processes that ask the same for the same folder waiting; the folder is made if need be.

    Raises:
        ConfigError: The folder cannot be made or opened.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be used: {error.strerror}; name a folder that can be written to with --state"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _written_aside(path: Path, content: bytes) -> Iterator[Path]:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkstemp opens with O_EXCL and 0600.
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be made: {error.strerror}; name a folder that can be written to with --state"
        ) from error
