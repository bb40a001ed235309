"""Which paths adapters may be loaded from, and how remote files reach local disk."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from cluster.errors import AdapterFailed, AdapterRefused, BadRequest
from cluster.store import FILES, Store, check_allowed, local_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    adapter = tmp_path / "root" / "a"
    adapter.mkdir(parents=True)
    for name in FILES:
        (adapter / name).write_text(name)
    (tmp_path / "secret").mkdir()
    (tmp_path / "root-beside").mkdir()
    return tmp_path / "root"


def test_what_lies_under_a_root_is_allowed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "way-in").symlink_to(root)
    for uri in (root / "a", root / "x" / ".." / "a", tmp_path / "way-in" / "a", root):
        check_allowed(str(uri), [str(tmp_path / "other"), str(root)])
    check_allowed(f"file://{root}/a", [str(root)])
    check_allowed(str(root / "a"), [str(tmp_path / "way-in")])
    check_allowed("/etc", ["/"])


def test_ways_out_of_a_root_are_refused(root: Path, tmp_path: Path) -> None:
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "chain").symlink_to(root / "link")
    (root / "sneaky").mkdir()
    (root / "sneaky" / FILES[0]).symlink_to(tmp_path / "secret" / "key")
    for uri in (
        f"{root}/../secret",
        f"{root}-beside",
        f"{root}/link",
        f"{root}/chain",
        f"{root}/sneaky",
        f"{root}/link/../secret",
        f"file://{root}/../secret",
        f"file://{root}/%2e%2e/secret",
        f"{root}/a\0b",
        f"local://{root}/a",
        f"file::{root}/a",
        "relative",
        "",
    ):
        with pytest.raises(BadRequest) as caught:
            check_allowed(uri, [str(root)])
        assert caught.value.field == "lora_path"
        assert repr(uri) in caught.value.message and str(root) in caught.value.message


def test_without_roots_nothing_is_allowed(root: Path) -> None:
    with pytest.raises(BadRequest, match="none is configured"):
        check_allowed(str(root / "a"), [])


def test_what_is_there_and_what_is_not_is_refused_alike(root: Path, tmp_path: Path) -> None:
    words = []
    for name in ("secret", "nothing"):
        with pytest.raises(BadRequest) as caught:
            check_allowed(str(tmp_path / name), [str(root)])
        words.append(caught.value.message.replace(name, "*"))
    assert words[0] == words[1]


@pytest.mark.parametrize(
    ("uri", "allowed"),
    [
        ("s3://bucket/adapters/a", True),
        ("s3://bucket/adapters", True),
        ("s3://bucket/adapters-beside/a", False),
        ("s3://bucket/adapters/../a", False),
        ("s3://other/adapters/a", False),
        ("simplecache::s3://bucket/adapters/a", False),
        ("hf://bucket/adapters/a", False),
        ("/bucket/adapters/a", False),
    ],
)
def test_a_url_must_continue_a_root(uri: str, allowed: bool) -> None:
    if allowed:
        check_allowed(uri, ["s3://bucket/adapters/"])
        return
    with pytest.raises(BadRequest):
        check_allowed(uri, ["s3://bucket/adapters/"])


def digest_of(path: str) -> str:
    contents = b"".join((Path(path) / name).read_bytes() for name in FILES)
    return hashlib.sha256(contents).hexdigest()


@pytest.fixture
def remote() -> Iterator[str]:
    """The URL of an adapter."""
    files = fsspec.filesystem("memory")
    for name in FILES:
        files.pipe_file(f"/adapters/a/{name}", name.encode())
    yield "memory://adapters/a"
    files.rm("/adapters", recursive=True)


def test_plain_paths_are_used_in_place(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "cache"), digest_of)
    assert store.fetch("/some/where/") == "/some/where"
    assert store.fetch("file:///some/wh%20ere") == "/some/wh ere"
    assert local_path("x") == str(Path.cwd() / "x")
    assert not (tmp_path / "cache").exists()


def test_a_url_is_kept_by_its_digest(tmp_path: Path, remote: str) -> None:
    store = Store(str(tmp_path), digest_of)
    path = store.fetch(remote)
    assert Path(path) == tmp_path / digest_of(path)
    fsspec.filesystem("memory").rm("/adapters/a/" + FILES[0])
    assert store.fetch(remote, digest_of(path)) == path  # not fetched again
    fsspec.filesystem("memory").pipe_file("/adapters/a/" + FILES[0], b"")
    assert [entry.name for entry in tmp_path.iterdir()] == [Path(path).name]


def test_files_that_changed_are_not_served_under_the_old_digest(
    tmp_path: Path, remote: str
) -> None:
    store = Store(str(tmp_path), digest_of)
    with pytest.raises(AdapterFailed, match="changed"):
        store.fetch(remote, "f" * 64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["memory://adapters/nothing", "nosuchscheme://a/b"])
def test_what_cannot_be_had_is_refused_and_leaves_nothing(
    tmp_path: Path, remote: str, uri: str
) -> None:
    with pytest.raises(AdapterRefused) as caught:
        Store(str(tmp_path), digest_of).fetch(uri)
    assert caught.value.field == "lora_path" and uri in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_replicas_that_fetch_the_same_at_once_end_with_one(tmp_path: Path) -> None:
    # memory:// does not work here: all readers of a file share one position.
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    for name in FILES:
        (source / name).write_text(name)
    both_downloaded = threading.Barrier(2)

    def slow_digest(path: str) -> str:
        both_downloaded.wait(5)
        return digest_of(path)

    paths: list[str] = []
    store = Store(str(cache), slow_digest)
    fetch = lambda: paths.append(store.fetch(f"local://{source}"))  # noqa: E731
    threads = [threading.Thread(target=fetch) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2 and len(set(paths)) == 1
    assert [entry.name for entry in cache.iterdir()] == [Path(paths[0]).name]
