"""What the store keeps of adapter files, for whom, and for how long."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import fsspec
import pytest

from cluster import store as store_module
from cluster.adapter_paths import CONFIG_FILE, HEAD_BYTES, TENSORS_FILE, VOCABULARY_FILE
from cluster.errors import AdapterFailed, AdapterRefused, StoreFull
from cluster.file_copies import copy_file
from cluster.store import Store
from tests.until import TIMEOUT_S

FILES = (CONFIG_FILE, TENSORS_FILE)


@dataclass
class Found:
    digest: str


def inspect(path: str) -> Found:
    contents = b"".join((Path(path) / name).read_bytes() for name in FILES)
    return Found(hashlib.sha256(contents).hexdigest())


def write(directory: Path, text: str = "tensors") -> str:
    """Files of 7 bytes and of the text's length."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in zip(FILES, ("config!", text), strict=True):
        (directory / name).write_text(content)
    return str(directory)


def kept(directory: Path) -> set[str]:
    """The digests in a store, and what a crash or a bug left in it."""
    own = {".lock", ".boot"}
    return {
        entry.name
        for entry in directory.iterdir()
        if entry.name not in own and not entry.name.startswith(".held-")
    }


@pytest.fixture
def remote() -> Iterator[str]:
    """The URL of an adapter."""
    files = fsspec.filesystem("memory")
    for name in FILES:
        files.pipe_file(f"/adapters/a/{name}", name.encode())
    yield "memory://adapters/a"
    files.rm("/adapters", recursive=True)


def test_only_the_start_of_a_vocabulary_is_copied(tmp_path: Path) -> None:
    source, store = write(tmp_path / "a"), Store(str(tmp_path / "store"), inspect)
    Path(source, VOCABULARY_FILE).write_bytes(bytes(HEAD_BYTES) + b"more")
    copy = Path(store.path(store.add(source).digest), VOCABULARY_FILE)
    assert copy.read_bytes() == bytes(HEAD_BYTES)
    assert copy.stat().st_mode & 0o222 == 0


@pytest.mark.parametrize("form", ["{}", "{}/", "file://{}"])
def test_a_version_outlives_its_directory(tmp_path: Path, form: str) -> None:
    source = write(tmp_path / "a")
    store = Store(str(tmp_path / "store"), inspect)
    digest = store.add(form.format(source)).digest
    assert digest == inspect(source).digest
    for name in FILES:
        os.remove(Path(source) / name)
    assert store.fetch([source], digest) == store.path(digest)
    assert inspect(store.path(digest)).digest == digest


def test_other_users_of_the_machine_cannot_read_the_copies(tmp_path: Path) -> None:
    Store(str(tmp_path / "fleet" / "store"), inspect).add(write(tmp_path / "a"))
    assert (tmp_path / "fleet" / "store").stat().st_mode & 0o777 == 0o700


def test_an_overwritten_file_changes_no_version(tmp_path: Path) -> None:
    source = write(tmp_path / "a", "old")
    store = Store(str(tmp_path / "store"), inspect)
    old = store.add(source).digest
    write(tmp_path / "a", "new")  # in place, so that a hard link would see it
    new = store.add(source).digest
    assert old != new == inspect(source).digest
    for digest in (old, new):
        assert inspect(store.path(digest)).digest == digest
        for name in FILES:
            assert not (Path(store.path(digest)) / name).stat().st_mode & 0o222


def test_what_is_here_is_not_read_again(tmp_path: Path) -> None:
    read: list[str] = []

    def counting(path: str) -> Found:
        read.append(path)
        return inspect(path)

    store = Store(str(tmp_path / "store"), counting)
    digest = store.add(write(tmp_path / "a")).digest
    assert len(read) == 1
    again = Store(str(tmp_path / "store"), counting)
    for which in (store, again):
        which.fetch([str(tmp_path / "a")], digest)
    assert len(read) == 1


def test_files_that_change_while_they_are_copied_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a", "old")

    def with_a_trainer(path: str, target: str) -> None:
        copy_file(path, target)
        write(tmp_path / "a", "newer")

    monkeypatch.setattr(store_module, "copy_file", with_a_trainer)
    with pytest.raises(AdapterFailed, match="changed while they were copied") as caught:
        Store(str(tmp_path / "store"), inspect).add(source)
    assert caught.value.retry_after_s is not None
    assert kept(tmp_path / "store") == set()


def test_the_copy_is_inspected_and_the_source_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "a")

    def refuse(path: str) -> Found:
        assert path.startswith(str(tmp_path / "store"))
        raise AdapterRefused(f"{path}/{FILES[0]}: bad", field="lora_path")

    with pytest.raises(AdapterRefused) as caught:
        Store(str(tmp_path / "store"), refuse).add(source)
    assert caught.value.message == f"{source}/{FILES[0]}: bad"
    assert caught.value.field == "lora_path"
    assert kept(tmp_path / "store") == set()


def test_a_url_is_kept_by_its_digest(tmp_path: Path, remote: str) -> None:
    store = Store(str(tmp_path), inspect)
    digest = store.add(remote).digest
    fsspec.filesystem("memory").rm("/adapters/a/" + FILES[0])
    assert store.fetch([remote], digest) == store.path(digest)  # not fetched again
    fsspec.filesystem("memory").pipe_file("/adapters/a/" + FILES[0], b"")
    assert inspect(store.path(digest)).digest == digest
    assert kept(tmp_path) == {digest}


def test_files_that_changed_are_not_served_under_the_old_digest(
    tmp_path: Path, remote: str
) -> None:
    store = Store(str(tmp_path / "store"), inspect)
    for uri in (remote, write(tmp_path / "a")):
        with pytest.raises(AdapterFailed, match="changed"):
            store.fetch([uri], "f" * 64)
    with pytest.raises(AdapterFailed, match="not a SHA-256 digest"):
        store.fetch([remote], "../../a")
    assert kept(tmp_path / "store") == set()


@pytest.mark.parametrize(
    "uri", ["memory://adapters/nothing", "nosuchscheme://a/b", "/nothing/here", "/dev"]
)
def test_what_cannot_be_had_is_refused_and_leaves_nothing(
    tmp_path: Path, remote: str, uri: str
) -> None:
    with pytest.raises(AdapterRefused) as caught:
        Store(str(tmp_path), inspect).fetch([uri], "f" * 64)
    assert caught.value.field == "lora_path" and uri in caught.value.message
    assert kept(tmp_path) == set()


def test_adding_again_repairs_what_someone_damaged(tmp_path: Path) -> None:
    source = write(tmp_path / "a")
    store = Store(str(tmp_path / "store"), inspect)
    digest = store.add(source).digest
    copy = Path(store.path(digest))
    (copy / FILES[1]).unlink()
    assert store.add(source).digest == digest == inspect(str(copy)).digest
    os.chmod(copy / FILES[1], 0o644)
    os.truncate(copy / FILES[1], 1)
    assert store.add(source).digest == digest == inspect(str(copy)).digest
    shutil.rmtree(copy)
    assert store.fetch([source], digest) == str(copy)
    assert kept(tmp_path / "store") == {digest}


def rebooted(directory: Path, *stores: Store[Found]) -> None:
    """stores: of the processes that the machine's crash ended."""
    for store in stores:
        store.close()
    (directory / ".boot").write_text("an earlier start of the machine")


def kept_before_a_crash(directory: Path, source: str) -> str:
    store = Store(str(directory), inspect)
    digest = store.add(source).digest
    rebooted(directory, store)
    return digest


def test_after_a_start_of_the_machine_a_version_is_inspected_once(tmp_path: Path) -> None:
    source, directory = write(tmp_path / "a"), tmp_path / "store"
    digest = kept_before_a_crash(directory, source)
    shutil.rmtree(source)
    read: list[str] = []

    def counting(path: str) -> Found:
        read.append(path)
        return inspect(path)

    for _ in range(2):
        store = Store(str(directory), counting)
        assert inspect(store.fetch([source], digest)).digest == digest
    assert len(read) == 1
    assert kept(directory) == {digest}


def test_what_a_crash_of_the_machine_lost_is_copied_again(tmp_path: Path) -> None:
    source, directory = write(tmp_path / "a"), tmp_path / "store"
    digest = kept_before_a_crash(directory, source)
    os.chmod(directory / digest / FILES[1], 0o644)
    os.truncate(directory / digest / FILES[1], 0)
    store = Store(str(directory), inspect, 14)
    assert inspect(store.fetch([source], digest)).digest == digest
    assert kept(directory) <= {digest, f".unchecked-{digest}"}
    rebooted(directory, store)
    store = Store(str(directory), inspect, 14)
    other = store.add(write(tmp_path / "b", "another")).digest
    assert kept(directory) == {other}, "unchecked versions are idle"


def test_what_another_machine_holds_through_nfs_is_left_alone(tmp_path: Path) -> None:
    source, directory = write(tmp_path / "a"), tmp_path / "store"
    here = Store(str(directory), inspect)
    digest = here.add(source).digest
    rebooted(directory)
    other = Store(str(directory), inspect).add(write(tmp_path / "b", "b")).digest
    assert kept(directory) == {digest, other}


def test_a_file_system_that_locks_no_directories_is_not_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, directory = fcntl.flock, tmp_path / "store"

    def as_on_nfs(file: int | IO[str], operation: int) -> None:
        if stat.S_ISDIR(os.fstat(file if isinstance(file, int) else file.fileno()).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    left = directory / ".incoming-1"
    left.mkdir(parents=True)
    digest = Store(str(directory), inspect).add(write(tmp_path / "a")).digest
    assert kept(directory) == {digest, left.name}


def test_replicas_that_start_together_after_a_start_of_the_machine(tmp_path: Path) -> None:
    source, directory, both_read = write(tmp_path / "a"), tmp_path / "store", threading.Barrier(2)
    digest = kept_before_a_crash(directory, source)
    shutil.rmtree(source)

    def slow(path: str) -> Found:
        both_read.wait(TIMEOUT_S)
        return inspect(path)

    found: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(Store(str(directory), slow).fetch([source], digest))
        )
        for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [str(directory / digest)] * 2


def test_a_version_is_copied_from_any_place_that_still_has_it(tmp_path: Path) -> None:
    gone, other, good = str(tmp_path / "gone"), write(tmp_path / "b", "b"), write(tmp_path / "a")
    store = Store(str(tmp_path / "store"), inspect, 20)
    digest = inspect(good).digest
    assert inspect(store.fetch([gone, other, good], digest)).digest == digest
    with pytest.raises(AdapterRefused, match="gone"):
        store.fetch([gone, other], "f" * 64)
    with pytest.raises(StoreFull):
        store.fetch(
            [gone, write(tmp_path / "c", "another"), gone], inspect(str(tmp_path / "c")).digest
        )


def test_threads_that_add_the_same_at_once_end_with_one(tmp_path: Path) -> None:
    source, both_copied = write(tmp_path / "source"), threading.Barrier(2)

    def slow(path: str) -> Found:
        both_copied.wait(TIMEOUT_S)
        return inspect(path)

    found: list[str] = []
    store = Store(str(tmp_path / "store"), slow)
    threads = [
        threading.Thread(target=lambda: found.append(store.add(source).digest)) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [inspect(source).digest] * 2
    assert kept(tmp_path / "store") == {found[0]}


class OtherProcess:
    """Another replica on this node. It prints a line at a point that the test chose, and stays
    there."""

    def __init__(self, directory: Path, code: str) -> None:
        text = "import sys\nfrom cluster.store import Store\n"
        text += "from tests.unit.cluster import test_store as own\n"
        text += "def stop(path=None, *more):\n"
        text += "    print(path or 'here', flush=True)\n    sys.stdin.read()\n"
        text += f"store = Store({str(directory)!r}, own.inspect)\n{code}\n"
        self._process = subprocess.Popen(
            [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.line = self._process.stdout.readline().strip()
        assert self.line, "it failed"

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def other_process(directory: Path, code: str) -> Iterator[OtherProcess]:
    other = OtherProcess(directory, code)
    try:
        yield other
    finally:
        other.kill()


@pytest.mark.parametrize("point", ["own.store_module.copy_file = stop", "store._inspect = stop"])
def test_a_crash_leaves_only_what_the_next_start_deletes(tmp_path: Path, point: str) -> None:
    source, directory = write(tmp_path / "a"), tmp_path / "store"
    with other_process(directory, f"{point}\nstore.add({source!r})") as other:
        (left,) = kept(directory)
        assert left.startswith(".incoming-")
        beside = Store(str(directory), inspect)
        digest = beside.add(source).digest
        assert kept(directory) == {left, digest}, "it is alive"
        other.kill()
    after = Store(str(directory), inspect)
    after.fetch([source], digest)
    assert kept(directory) == {digest}


def adapters(tmp_path: Path, count: int) -> list[str]:
    """Each takes 10 bytes."""
    return [write(tmp_path / f"a{i}", f"{i:03}") for i in range(count)]


def hold_and_release(store: Store[Found], uri: str, at_s: int) -> str:
    """Adds a version that was released `at_s` seconds into 1970."""
    digest = store.add(uri).digest
    store.release(digest)
    os.utime(store.path(digest), (at_s, at_s))
    return digest


def test_versions_that_nobody_holds_make_room_and_those_held_last_stay(tmp_path: Path) -> None:
    paths = adapters(tmp_path, 5)
    store = Store(str(tmp_path / "store"), inspect, 30)
    first, second, third = (
        hold_and_release(store, path, at_s)
        for path, at_s in zip(paths, (300, 100, 200), strict=False)
    )
    fourth = store.add(paths[3]).digest
    assert kept(tmp_path / "store") == {first, third, fourth}
    store.fetch([paths[2]], third)
    fifth = store.add(paths[4]).digest
    assert kept(tmp_path / "store") == {third, fourth, fifth}, "the first was held last, but idle"
    assert second != first


def test_a_version_in_use_is_never_dropped(tmp_path: Path) -> None:
    paths, directory = adapters(tmp_path, 4), tmp_path / "store"
    store = Store(str(directory), inspect, 30)
    idle = hold_and_release(store, paths[0], 300)
    here = store.add(paths[1]).digest
    store.fetch([paths[1]], here)
    store.release(here)  # one of two holds
    os.utime(store.path(here), (100, 100))
    with other_process(directory, f"stop(store.add({paths[2]!r}).digest)") as other:
        there = other.line
        last = store.add(paths[3]).digest
        assert kept(directory) == {here, there, last}
        with pytest.raises(StoreFull) as caught:
            store.add(paths[0])
        assert kept(directory) == {here, there, last}
        for word in (paths[0], str(directory), "10 bytes", "30 of the 30 bytes", "adapter_disk"):
            assert word in caught.value.message
    assert store.add(paths[0]).digest == idle, "a process that died holds nothing"
    assert kept(directory) == {here, last, idle}


def test_an_adapter_larger_than_the_store_is_refused_before_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "copy_file", None)
    with pytest.raises(StoreFull, match="takes 14 bytes"):
        Store(str(tmp_path / "store"), inspect, 13).add(write(tmp_path / "a"))


def test_nothing_is_dropped_for_what_does_not_fit_anyway(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), inspect, 25)
    paths = adapters(tmp_path, 2)
    idle, held = hold_and_release(store, paths[0], 100), store.add(paths[1]).digest
    with pytest.raises(StoreFull):
        store.add(write(tmp_path / "large", "x" * 13))
    assert kept(tmp_path / "store") == {idle, held}


def test_an_add_looks_at_no_other_version_while_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = adapters(tmp_path, 3)
    Store(str(tmp_path / "store"), inspect, 30).add(first)
    store = Store(str(tmp_path / "store"), inspect, 30)
    monkeypatch.setattr(store._directory, "_versions", None)
    for path in others:
        store.add(path)
    with pytest.raises(TypeError):
        store.add(write(tmp_path / "more", "more"))


@pytest.mark.parametrize("recorded", ["0", "25", "", None])
def test_a_wrong_sum_is_corrected_when_room_is_short(tmp_path: Path, recorded: str | None) -> None:
    directory, paths = tmp_path / "store", adapters(tmp_path, 3)
    store = Store(str(directory), inspect, 25)
    held = store.add(paths[0]).digest
    if recorded is None:
        (directory / ".lock").unlink()
    else:
        (directory / ".lock").write_text(recorded)
    store.add(paths[1])
    assert held in kept(directory) and len(kept(directory)) == 2
    if recorded != "0":  # a sum that is too small is found at the next one
        with pytest.raises(StoreFull):
            store.add(paths[2])


def full_disk(monkeypatch: pytest.MonkeyPatch, directory: Path, entries: int) -> None:
    """A disk that is full as long as the store has so many versions."""

    def copy(source: str, target: str) -> None:
        if len([name for name in kept(directory) if not name.startswith(".")]) >= entries:
            Path(target).touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copy_file(source, target)

    monkeypatch.setattr(store_module, "copy_file", copy)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, paths = tmp_path / "store", adapters(tmp_path, 2)
    store = Store(str(directory), inspect)
    held = store.add(paths[0]).digest
    full_disk(monkeypatch, directory, 1)
    with pytest.raises(StoreFull) as caught:
        store.add(paths[1])
    for word in (paths[1], str(directory), "No space left on device"):
        assert word in caught.value.message
    assert kept(directory) == {held}


def test_on_a_full_disk_idle_versions_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, paths = tmp_path / "store", adapters(tmp_path, 2)
    store = Store(str(directory), inspect)
    hold_and_release(store, paths[0], 100)
    full_disk(monkeypatch, directory, 1)
    digest = store.add(paths[1]).digest
    assert kept(directory) == {digest} == {inspect(store.path(digest)).digest}


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = Store(str(tmp_path / "file" / "store"), inspect)
    with pytest.raises(StoreFull, match=str(tmp_path / "file" / "store")):
        store.add(write(tmp_path / "a"))
    with pytest.raises(StoreFull, match="Not a directory"):
        store.fetch([str(tmp_path / "a")], "f" * 64)


def test_a_closed_store_holds_nothing(tmp_path: Path) -> None:
    paths, directory = adapters(tmp_path, 2), tmp_path / "store"
    first = Store(str(directory), inspect, 15)
    digest = first.add(paths[0]).digest
    second = Store(str(directory), inspect, 15)
    with pytest.raises(StoreFull):
        second.add(paths[1])
    first.close()
    assert kept(directory) == {digest}
    other = second.add(paths[1]).digest
    assert kept(directory) == {other}
    first.release(digest)  # its file is gone
