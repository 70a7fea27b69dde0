"""Upload: files to where they are kept, never over something else, and read back before they count as there.

Read back, and not compared by what the store says of itself: an S3 ETag is an MD5 only of what was sent in one part and
encrypted with no key of KMS, checksum headers differ from store to store, and what may be deleted here is a recording.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import hashlib
import importlib.util
import itertools
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from streamsink.errors import ConfigError

PART_BYTES = 8 * 2**20
"""What is sent and read at once: it bounds the memory an upload takes."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
_WANTED = "wanted s3://bucket/prefix, gs://bucket/prefix or file:///folder"


class UploadError(Exception):
    """What was read back is not what was sent, or nothing can be uploaded there; nothing may be deleted."""


class Local(NamedTuple):
    """A file to upload, as it is here."""

    path: Path
    size: int
    sha256: str
    """In hex."""


class Store(Protocol):
    """A folder somewhere. Every call blocks and raises what the store raises."""

    def check(self, folder: Path) -> None:
        """Raise UploadError where the files of ``folder`` cannot be uploaded."""

    def url(self, name: str) -> str:
        """Where a file of this name is, for people and programs."""

    def put(self, source: Path, name: str) -> None:
        """Make a file, whole or not at all; FileExistsError where there is one."""

    def size(self, name: str) -> int | None:
        """The size in bytes of what has that name; None where nothing has."""

    def open(self, name: str) -> IO[bytes]:
        """Read a file from its beginning."""

    def remove(self, name: str) -> None:
        """Delete a file."""


@functools.lru_cache(maxsize=64)
def parse_target(url: str) -> Store:
    """Find out where an ``upload`` option points; nothing is connected to yet.

    Raises:
        ConfigError: It is no such URL, or the package that knows its kind of store is not installed.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ConfigError(
            f"an upload URL {parts.scheme}://… must hold no credentials: they come from the environment, "
            f"as {'AWS' if parts.scheme == 's3' else 'the store'}'s own tools take them; {_WANTED}"
        )
    if parts.query or parts.fragment or any(not character.isprintable() for character in url):
        raise ConfigError(
            f"upload to {url!r}: a query, a fragment or control characters cannot be part of it; {_WANTED}"
        )
    if parts.scheme == "file":
        folder = Path(unquote(parts.path))
        if parts.netloc not in ("", "localhost") or not folder.is_absolute():
            raise ConfigError(f"upload to {url!r}: not the absolute path of a folder on this machine; {_WANTED}")
        return FolderStore(folder)
    if parts.scheme not in _EXTRAS:
        raise ConfigError(f"upload to {url!r}: the scheme is {parts.scheme!r}; {_WANTED}")
    if not _BUCKET.fullmatch(parts.netloc):
        raise ConfigError(f"upload to {url!r}: {parts.netloc!r} is no name of a bucket; {_WANTED}")
    module, extra = _EXTRAS[parts.scheme]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"upload to {parts.scheme}:// needs the package {module}: pip install 'streamsink[{extra}]'")
    return ObjectStore(parts.scheme, f"{parts.netloc}/{parts.path.strip('/')}".rstrip("/"))


def measure(path: Path) -> Local:
    """Take a file's size and SHA-256.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return Local(path, os.fstat(file.fileno()).st_size, _digest(file))


def upload(files: Sequence[Local], stem: str, store: Store) -> dict[Path, str]:
    """Bring all files of a recording there, under one stem, and see that they arrived; again after any crash.

    What is there already with the same content is done. Where something else has one of the names, all get ``_2``
    behind the stem, or ``_3`` …: two endpoints may share a bucket.

    Args:
        files: In the order in which they are to appear; each name begins with ``stem``.
        stem: What all names begin with.
        store: Where to.

    Returns:
        For each file the URL it has now.

    Raises:
        UploadError: What was read back is not what was sent, or nothing can be uploaded from there.
        FileExistsError: A name was taken meanwhile.
        Exception: Whatever the store raises.
    """
    store.check(files[0].path.parent)
    for number in itertools.count(1):
        names = {file: _numbered(file.path.name, stem, number) for file in files}
        there = {file: _holds(store, name, file) for file, name in names.items()}
        if False in there.values():
            continue
        for file, name in names.items():
            if there[file] is None:
                _put(store, name, file)
        return {file.path: store.url(name) for file, name in names.items()}
    raise AssertionError("unreachable: the numbers are endless")


def _numbered(name: str, stem: str, number: int) -> str:
    return name if number == 1 else f"{stem}_{number}{name.removeprefix(stem)}"


def _holds(store: Store, name: str, file: Local) -> bool | None:
    """Whether the store has this very file under a name; None where it has nothing."""
    size = store.size(name)
    if size is None:
        return None
    if size != file.size:
        return False
    with store.open(name) as there:
        return _digest(there) == file.sha256


def _put(store: Store, name: str, file: Local) -> None:
    # FileExistsError is for the next try: somebody else's came in between, or ours of an attempt whose answer was lost.
    store.put(file.path, name)
    if not _holds(store, name, file):
        # Ours, made just now and damaged on its way: away with it, so that the name is free again.
        store.remove(name)
        raise UploadError(f"what was read back of {name} is not what was sent")


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while data := file.read(2**20):
        digest.update(data)
    return digest.hexdigest()


class FolderStore:
    """A folder on this machine, or mounted on it.

    Args:
        folder: Made, 0700, where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def check(self, folder: Path) -> None:
        """Make the folder.

        Raises:
            UploadError: It is the very folder, however it is called: each file would count as uploaded, and be deleted.
            OSError: It cannot be made.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._folder.samefile(folder):
            raise UploadError(f"{folder} is both where recordings are made and where they are to be uploaded")

    def url(self, name: str) -> str:
        """The file's ``file://`` URL."""
        return (self._folder / name).as_uri()

    def put(self, source: Path, name: str) -> None:
        """Copy, bring to the disk, then give the name.

        Raises:
            FileExistsError: The name is taken.
            OSError: It cannot be written.
        """
        target = self._folder / name
        aside = self._folder / f".{name}.part"
        # What a crash has left of it is taken over.
        with source.open("rb") as reading, open(os.open(aside, _AFRESH, 0o600), "wb") as writing:
            shutil.copyfileobj(reading, writing, 2**20)
            writing.flush()
            os.fsync(writing.fileno())
        try:
            _rename_to_new(aside, target)
        finally:
            aside.unlink(missing_ok=True)
        _sync_folder(self._folder)

    def size(self, name: str) -> int | None:
        """As the file system has it."""
        path = self._folder / name
        try:
            return path.lstat().st_size
        except FileNotFoundError:
            return None

    def open(self, name: str) -> IO[bytes]:
        """Open it as it is."""
        return (self._folder / name).open("rb")

    def remove(self, name: str) -> None:
        """Delete it."""
        (self._folder / name).unlink(missing_ok=True)


_AFRESH = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


def _rename_to_new(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # Shares and FUSE mounts may have no links: there the name is taken first, empty.
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        os.replace(source, target)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _close_session(loop: asyncio.AbstractEventLoop, session: AbstractAsyncContextManager[object]) -> None:
    # s3fs would do it on whichever loop runs where the garbage is collected, and fail there.
    asyncio.run_coroutine_threadsafe(_leave(session), loop)


async def _leave(session: AbstractAsyncContextManager[object]) -> None:
    await session.__aexit__(None, None, None)


class ObjectStore:
    """A bucket, through fsspec; connected to when first used. Credentials are found as the store's own tools find them.

    Args:
        protocol: As fsspec calls it.
        path: Bucket, and prefix where there is one.
    """

    def __init__(self, protocol: str, path: str) -> None:
        self._protocol = protocol
        self._path = path

    @functools.cached_property
    def _files(self) -> Any:
        import fsspec

        # Listings are never kept: what others put there meanwhile counts.
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if self._protocol == "gs":
            from gcsfs.core import GCSFileSystem

            # Not the one with support for zonal buckets: before each call it asks, over gRPC and by a right that an
            # account which may upload need not have, what kind of bucket it is.
            return GCSFileSystem(**options)
        if self._protocol == "s3":
            # What is read back is judged here, by its own hash: a store's idea of a checksum must not get in the way.
            options["config_kwargs"] = {"response_checksum_validation": "when_required"}
        files = fsspec.filesystem(self._protocol, **options)
        if self._protocol == "s3":
            files.close_session = _close_session
        return files

    def check(self, folder: Path) -> None:
        """Any folder will do."""

    def url(self, name: str) -> str:
        """As the store's own tools write it."""
        return f"{self._protocol}://{self._path}/{name}"

    def put(self, source: Path, name: str) -> None:
        """Upload; the store itself refuses a name that is taken (``If-None-Match: *``), where it knows how to.

        Raises:
            FileExistsError: The name is taken.
        """
        bounds = {"chunksize": PART_BYTES}
        if self._protocol == "s3":
            # Its own bounds would take half a gigabyte.
            bounds["max_concurrency"] = 2
        self._files.put_file(str(source), self._at(name), mode="create", **bounds)

    def size(self, name: str) -> int | None:
        """As the store has it now."""
        self._files.invalidate_cache()
        try:
            return int(self._files.info(self._at(name))["size"])
        except FileNotFoundError:
            return None

    def open(self, name: str) -> IO[bytes]:
        """Read it from the store."""
        file: IO[bytes] = self._files.open(
            self._at(name), "rb", block_size=PART_BYTES, cache_type="readahead", cache_options={}
        )
        return file

    def remove(self, name: str) -> None:
        """Delete it."""
        self._files.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"
