"""Files go where they are told, whole, over nothing else, and count as there only when they were read back."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import stat
import sys
from pathlib import Path

import pytest

from streamsink.delivery.upload import (
    FolderStore,
    Local,
    ObjectStore,
    Store,
    UploadError,
    measure,
    parse_target,
    upload,
)
from streamsink.errors import ConfigError
from tests.stores import S3, Bucket

STEM = "20261120T204218Z_desk"


def recording(folder: Path, size: int = 5000) -> list[Local]:
    """Audio and sidecar, as delivery hands them over."""
    folder.mkdir(exist_ok=True)
    (folder / f"{STEM}.wav").write_bytes(b"RIFF" + os.urandom(size))
    (folder / f"{STEM}.json").write_bytes(b"{}\n")
    return [measure(folder / f"{STEM}.wav"), measure(folder / f"{STEM}.json")]


def content(store: Store, name: str) -> bytes:
    with store.open(name) as file:
        return file.read()


@pytest.fixture(params=["folder", "memory", "s3", "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind; what is true of one is true of all."""
    if request.param == "folder":
        return FolderStore(tmp_path / "there" / "deep")
    if request.param == "memory":
        return ObjectStore("memory", f"/{tmp_path.name}")
    bucket: Bucket = request.getfixturevalue(request.param)
    return bucket.store(tmp_path.name)


@pytest.fixture(params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    """A bucket of each kind, the way to which may have faults."""
    made: Bucket = request.getfixturevalue(request.param)
    return made


def test_all_files_arrive_and_are_read_back(store: Store, tmp_path: Path) -> None:
    files = recording(tmp_path / "here")
    urls = upload(files, STEM, store)
    assert urls == {file.path: store.url(file.path.name) for file in files}
    assert [content(store, file.path.name) for file in files] == [file.path.read_bytes() for file in files]
    # Again, after a crash that left everything: nothing is sent twice, nothing gets another name.
    assert upload(files, STEM, store) == urls


def test_what_others_put_there_stays_and_ours_gets_a_name_of_its_own(store: Store, tmp_path: Path) -> None:
    others = recording(tmp_path / "here")
    upload(others, STEM, store)
    kept = content(store, f"{STEM}.wav")
    # Same size, other content; its sidecar is the same, yet goes along.
    ours = recording(tmp_path / "here")
    urls = upload(ours, STEM, store)
    assert list(urls.values()) == [store.url(f"{STEM}_2.wav"), store.url(f"{STEM}_2.json")]
    assert content(store, f"{STEM}.wav") == kept
    # Another size is another file without reading it.
    third = recording(tmp_path / "here", 6000)
    assert upload(third, STEM, store)[third[0].path] == store.url(f"{STEM}_3.wav")
    # And a crash in the midst finds its own again.
    assert upload(ours[1:], STEM, store) == {ours[1].path: store.url(f"{STEM}.json")}


def test_a_name_that_is_taken_is_never_written_over(store: Store, tmp_path: Path) -> None:
    (file, _) = recording(tmp_path / "here")
    store.check(tmp_path)
    store.put(file.path, "x.wav")
    with pytest.raises(FileExistsError):
        store.put(recording(tmp_path / "here")[0].path, "x.wav")
    assert hashlib.sha256(content(store, "x.wav")).hexdigest() == file.sha256
    store.remove("x.wav")
    assert store.size("x.wav") is None


# --- A folder --------------------------------------------------------------------------------------------------------


def test_a_folder_keeps_strangers_out_and_nothing_unfinished(tmp_path: Path) -> None:
    there = tmp_path / "there"
    store = FolderStore(there)
    there.mkdir(mode=0o700)
    # What a crash has left.
    (there / f".{STEM}.wav.part").write_bytes(b"half" * 9999)
    (there / f".{STEM}.wav.part").chmod(0o600)
    files = recording(tmp_path / "here")
    upload(files, STEM, store)
    assert sorted(path.name for path in there.iterdir()) == [f"{STEM}.json", f"{STEM}.wav"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in there.iterdir()} == {0o600}


def test_the_recordings_folder_itself_is_no_target(tmp_path: Path) -> None:
    files = recording(tmp_path / "here")
    (tmp_path / "link").symlink_to(tmp_path / "here")
    for name in ("here", "link"):
        with pytest.raises(UploadError, match="is both where recordings are made and where they are to be uploaded"):
            upload(files, STEM, FolderStore(tmp_path / name))


def test_a_folder_without_links_takes_the_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    # As FAT and many FUSE mounts have it.
    monkeypatch.setattr(os, "link", link)
    files = recording(tmp_path / "here")
    store = FolderStore(tmp_path / "there")
    assert upload(files, STEM, store) == {file.path: store.url(file.path.name) for file in files}
    with pytest.raises(FileExistsError):
        store.put(files[0].path, files[0].path.name)
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == [f"{STEM}.json", f"{STEM}.wav"]


def test_a_folder_on_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match="No space left"):
        upload(recording(tmp_path / "here"), STEM, FolderStore(tmp_path / "there"))
    assert list((tmp_path / "there").iterdir()) == []


class _Damaging(FolderStore):
    """Flips a bit, or loses the end, of what it is given first."""

    def __init__(self, folder: Path, damage: str) -> None:
        super().__init__(folder)
        self._there = folder
        self._damage = damage

    def put(self, source: Path, name: str) -> None:
        super().put(source, name)
        data = bytearray((self._there / name).read_bytes())
        if self._damage == "bit":
            data[1000] ^= 1
        elif self._damage == "end":
            del data[-1:]
        (self._there / name).write_bytes(data)
        self._damage = ""


@pytest.mark.parametrize("damage", ["bit", "end"])
def test_what_was_damaged_on_its_way_is_noticed_and_sent_again(damage: str, tmp_path: Path) -> None:
    files = recording(tmp_path / "here")
    store = _Damaging(tmp_path / "there", damage)
    with pytest.raises(UploadError, match=f"what was read back of {STEM}.wav is not what was sent"):
        upload(files, STEM, store)
    assert upload(files, STEM, store) == {file.path: store.url(file.path.name) for file in files}


# --- Buckets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut", "500"])
def test_an_upload_that_fails_is_sent_again(fault: str, bucket: Bucket, tmp_path: Path) -> None:
    files = recording(tmp_path / "here")
    with bucket.failing(fault) as faults:
        assert upload(files, STEM, bucket.store(tmp_path.name))
    assert faults.left == []
    assert content(bucket.store(tmp_path.name), f"{STEM}.wav") == files[0].path.read_bytes()


def test_an_upload_whose_answer_is_lost_is_found_by_the_next_try(bucket: Bucket, tmp_path: Path) -> None:
    files = recording(tmp_path / "here")
    with bucket.failing("lost"):
        with pytest.raises(FileExistsError):
            upload(files, STEM, bucket.store(tmp_path.name))
        assert upload(files, STEM, bucket.store(tmp_path.name))[files[0].path].endswith(f"/{STEM}.wav")


def test_an_object_that_was_damaged_on_its_way_is_noticed(bucket: Bucket, tmp_path: Path) -> None:
    files = recording(tmp_path / "here")
    with bucket.failing("damaged") as faults:
        store = bucket.store(tmp_path.name)
        with pytest.raises(UploadError, match="is not what was sent"):
            upload(files, STEM, store)
        assert faults.left == []
        urls = upload(files, STEM, store)
    assert urls[files[0].path].endswith(f"/{STEM}.wav")
    assert content(store, f"{STEM}.wav") == files[0].path.read_bytes()


# gcsfs hands each part as bytes to aiohttp, which warns of them.
@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
def test_a_large_file_goes_in_parts_with_one_cut_within(bucket: Bucket, tmp_path: Path) -> None:
    files = recording(tmp_path / "here", 17 * 2**20)
    with bucket.failing("", "cut") as faults:
        store = bucket.store(tmp_path.name)
        upload(files, STEM, store)
    part = ("PUT ", "partNumber=") if bucket.scheme == "s3" else ("POST ", "upload_id=")
    assert sum(request.startswith(part[0]) and part[1] in request for request in faults.requests) > 3
    assert hashlib.sha256(content(store, f"{STEM}.wav")).hexdigest() == files[0].sha256


def test_a_server_that_is_down_is_an_error(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(Exception, match="Could not connect"):
        upload(recording(tmp_path / "here"), STEM, s3.store(tmp_path.name))


# --- What can be asked for -------------------------------------------------------------------------------------------

WANTED = "; wanted s3://bucket/prefix, gs://bucket/prefix or file:///folder"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://host/x", "upload to 'ftp://host/x': the scheme is 'ftp'"),
        ("/srv/calls", "upload to '/srv/calls': the scheme is ''"),
        ("s3://", "upload to 's3://': '' is no name of a bucket"),
        ("s3:///x", "upload to 's3:///x': '' is no name of a bucket"),
        ("s3://b:9/x", "upload to 's3://b:9/x': 'b:9' is no name of a bucket"),
        (
            "s3://bucket/x?a=b",
            "upload to 's3://bucket/x?a=b': a query, a fragment or control characters cannot be part",
        ),
        (
            "s3://bucket/x\x00",
            "upload to 's3://bucket/x\\x00': a query, a fragment or control characters cannot be part",
        ),
        ("file://host/x", "upload to 'file://host/x': not the absolute path of a folder on this machine"),
        ("file:x", "upload to 'file:x': not the absolute path of a folder on this machine"),
    ],
)
def test_a_target_that_cannot_be_is_told(url: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_target(url)
    assert str(caught.value).startswith(problem)
    assert str(caught.value).endswith(WANTED)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_credentials_in_a_target_are_refused_and_not_shown(scheme: str) -> None:
    with pytest.raises(ConfigError, match="must hold no credentials: they come from the environment") as caught:
        parse_target(f"{scheme}://AKIAHUNTER:hunter2@bucket/x")
    assert "unter" not in str(caught.value).lower().replace("wanted", "")


@pytest.mark.parametrize(("scheme", "module", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_store_whose_package_is_missing_is_told(
    scheme: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    parse_target.cache_clear()
    with pytest.raises(ConfigError) as caught:
        parse_target(f"{scheme}://bucket/x")
    assert str(caught.value) == f"upload to {scheme}:// needs the package {module}: pip install 'streamsink[{extra}]'"


def test_what_is_wrong_with_an_account_is_not_the_start_s_affair(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    store = parse_target("s3://bucket/x")
    with pytest.raises(Exception, match="nobody"):
        store.size("x.wav")


def test_targets_know_their_urls(s3: S3, tmp_path: Path) -> None:
    assert parse_target(f"{tmp_path.as_uri()}/a%20b").url("x.wav") == f"{tmp_path.as_uri()}/a%20b/x.wav"
    assert parse_target("s3://bucket/a/b/").url("x.wav") == "s3://bucket/a/b/x.wav"
    assert parse_target("s3://bucket").url("x.wav") == "s3://bucket/x.wav"
    assert ObjectStore("gs", "bucket/a").url("x.wav") == "gs://bucket/a/x.wav"


async def test_a_store_nobody_needs_is_closed_where_it_was_opened(s3: S3) -> None:
    store = s3.store("closed")
    store._files.connect()
    loop, creator = store._files.loop, store._files._s3creator
    sessions = creator._client._endpoint.http_session
    assert sessions._sessions is not None
    before = asyncio.all_tasks()
    del store
    gc.collect()
    # Not on the loop that happens to run where the garbage is collected.
    assert asyncio.all_tasks() == before

    async def others_are_done() -> None:
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)

    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(others_are_done(), loop))
    assert not sessions._sessions
