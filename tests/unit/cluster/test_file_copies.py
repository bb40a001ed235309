"""Three ways to copy a file, of which the first that the disk can do is taken."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from cluster.file_copies import copy_file, open_regular

CONTENT = bytes(range(256)) * 5000


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "source").write_bytes(CONTENT)
    return str(tmp_path / "source")


def refuse(error: int) -> object:
    def call(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    return call


@pytest.mark.parametrize("in_kernel", [True, False])
@pytest.mark.parametrize("cannot", [errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.EINVAL])
def test_without_reflinks_the_bytes_are_copied(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cannot: int, in_kernel: bool
) -> None:
    monkeypatch.setattr(fcntl, "ioctl", refuse(cannot))
    if not in_kernel:
        monkeypatch.setattr(os, "copy_file_range", refuse(cannot))
    copy_file(source, str(tmp_path / "copy"))
    with open(source, "r+b") as written:
        written.write(b"overwritten in place")
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_a_reflink_is_taken_where_there_is_one(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked: list[tuple[str, str]] = []

    def reflink(new: int, request: int, old: int) -> int:
        assert request == 0x40049409
        linked.append((os.readlink(f"/proc/self/fd/{old}"), os.readlink(f"/proc/self/fd/{new}")))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", reflink)
    monkeypatch.setattr(os, "copy_file_range", None)
    copy_file(source, str(tmp_path / "copy"))
    assert linked == [(source, str(tmp_path / "copy"))]


@pytest.mark.parametrize("call", ["fcntl.ioctl", "os.copy_file_range"])
def test_a_full_disk_is_not_taken_for_a_missing_feature(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(call, refuse(errno.ENOSPC))
    if call != "fcntl.ioctl":
        monkeypatch.setattr("fcntl.ioctl", refuse(errno.EOPNOTSUPP))
    with pytest.raises(OSError) as caught:
        copy_file(source, str(tmp_path / "copy"))
    assert caught.value.errno == errno.ENOSPC


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            open_regular(str(path))
