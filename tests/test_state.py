import stat
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from streamsink.errors import ConfigError
from streamsink.state import create_private, only_one_process, read_private, replace_private


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_private_file_is_made_once_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "secret"
    assert read_private(path) is None
    assert create_private(path, b"one")
    assert not create_private(path, b"two")
    assert (path.read_bytes(), mode(path), mode(path.parent)) == (b"one", 0o600, 0o700)
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]


def test_a_private_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"one")
    replace_private(path, b"two")
    assert (path.read_bytes(), mode(path)) == (b"two", 0o600)
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


def test_of_many_that_make_it_at_once_one_wins_and_all_read_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    barrier = threading.Barrier(16)
    outcomes: list[tuple[bool, bytes | None]] = []

    def make(content: bytes) -> None:
        barrier.wait()
        outcomes.append((create_private(path, content), read_private(path)))

    threads = [threading.Thread(target=make, args=(bytes([65 + n]) * 1000,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [made for made, _ in outcomes].count(True) == 1
    assert {content for _, content in outcomes} == {path.read_bytes()}


@pytest.mark.parametrize("loose", [0o640, 0o604, 0o666])
def test_a_file_others_may_read_is_mended_and_told(tmp_path: Path, loose: int) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"content")
    path.chmod(loose)
    with capture_logs() as logs:
        assert read_private(path) == b"content"
        assert read_private(path) == b"content"
    assert mode(path) == 0o600
    assert logs == [
        {
            "event": "a private file could be read by others; it is 0600 now, delete it to have a new one made",
            "log_level": "warning",
            "mode": f"{loose:04o}",
            "path": str(path),
        }
    ]


def test_what_cannot_be_read_or_made_names_the_path(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ConfigError, match=f"^{folder}: cannot be read or made private: Is a directory$"):
        read_private(folder)
    for make in (create_private, replace_private):
        with pytest.raises(ConfigError, match=f"^{file}/x: cannot be made: File exists; name a folder .* --state$"):
            make(file / "x", b"")
    with pytest.raises(ConfigError, match=f"^{file}: cannot be used: File exists; name a folder .* --state$"):
        only_one_process(file).__enter__()
    with pytest.raises(ConfigError, match=f"^{folder}: cannot be made: Is a directory"):
        replace_private(folder, b"")
