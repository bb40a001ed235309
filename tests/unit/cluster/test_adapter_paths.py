"""Which paths and URLs adapters may be loaded from."""

from pathlib import Path

import pytest

from cluster.adapter_paths import CONFIG_FILE, TENSORS_FILE, check_allowed, local_path
from cluster.errors import BadRequest


def test_a_relative_path_and_a_file_url_are_local() -> None:
    assert local_path("x") == str(Path.cwd() / "x")
    assert local_path("file:///some/wh%20ere/") == "/some/wh ere"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    adapter = tmp_path / "root" / "a"
    adapter.mkdir(parents=True)
    for name in (CONFIG_FILE, TENSORS_FILE):
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
    (root / "sneaky" / CONFIG_FILE).symlink_to(tmp_path / "secret" / "key")
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
        assert repr(uri) in caught.value.message
        assert f"({root}" not in caught.value.message


def test_a_link_out_is_named(root: Path, tmp_path: Path) -> None:
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "a" / TENSORS_FILE).unlink()
    (root / "a" / TENSORS_FILE).symlink_to(tmp_path / "secret" / "key")
    for name, words in (("link", "is behind a link out"), ("a", f"has {TENSORS_FILE} as a link")):
        with pytest.raises(BadRequest, match=words):
            check_allowed(str(root / name), [str(tmp_path / "root-beside"), str(root)])


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--adapter"
    snapshot = repository / "snapshots" / "4f2c"
    for directory in (snapshot / "sub", repository / "blobs", tmp_path / "hub" / "blobs"):
        directory.mkdir(parents=True)
    for name in (CONFIG_FILE, TENSORS_FILE):
        (repository / "blobs" / name).write_text(name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
        (snapshot / "sub" / name).symlink_to(f"../../../blobs/{name}")
    for root in (snapshot, snapshot.parent, tmp_path / "hub"):
        check_allowed(str(snapshot), [str(root)])
        check_allowed(str(snapshot / "sub"), [str(root)])
    check_allowed(str(snapshot / "sub"), [str(snapshot / "sub")])
    (snapshot / CONFIG_FILE).unlink()
    (snapshot / CONFIG_FILE).symlink_to("../../../blobs/key")
    with pytest.raises(BadRequest, match=f"has {CONFIG_FILE} as a link out"):
        check_allowed(str(snapshot), [str(snapshot)])
    with pytest.raises(BadRequest, match="is outside"):
        check_allowed(str(repository / "blobs"), [str(snapshot)])


def test_a_hub_id_is_told_how_it_is_written(root: Path) -> None:
    told = r"; give an absolute path, or hf://acme/french-v1\.0 if it is on the Hub$"
    with pytest.raises(BadRequest, match=told):
        check_allowed("acme/french-v1.0", [str(root)])
    for uri in ("acme/french/v1", "../french", "./french"):
        with pytest.raises(BadRequest, match=r"roots; give an absolute path$"):
            check_allowed(uri, [str(root)])
    for uri in ("/etc/passwd", "hf://acme/french"):
        with pytest.raises(BadRequest, match=r"roots$"):
            check_allowed(uri, [str(root)])


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
