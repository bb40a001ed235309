"""A model's id on the Hub becomes a directory of the Hub's cache; tests have no network."""

from pathlib import Path

import pytest

from cluster.errors import ConfigError
from replica.serving.settings import read_settings
from tests.small_files import write_model_config

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's snapshots, as `hf download` leaves them: their files are links to blobs."""
    root = tmp_path / "hub" / "models--org--tiny"
    for commit, reference in ((COMMIT, "main"), (OTHER, "v2")):
        write_model_config(root / "blobs" / commit)
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").symlink_to(root / "blobs" / commit / "config.json")
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / reference).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return root


def read(model: str, **flags: str) -> tuple[str, str]:
    """The model's directory and its name for clients."""
    engine = read_settings({"config": None, "model": model, **flags}).engine
    return engine.model, engine.base_name


def test_an_id_names_a_snapshot_in_the_cache(cache: Path) -> None:
    assert read("org/tiny") == (str(cache / "snapshots" / COMMIT), "tiny")
    assert read("org/tiny@v2") == (str(cache / "snapshots" / OTHER), "tiny")
    assert read("org/tiny", served_model_name="own")[1] == "own"


def test_a_directory_comes_first(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model_config(tmp_path / "org" / "tiny")
    assert read("org/tiny") == (str(tmp_path / "org" / "tiny"), "tiny")


@pytest.mark.parametrize(
    ("model", "command"),
    [
        ("org/absent", "`hf download org/absent`"),
        ("org/tiny@v3", "`hf download org/tiny --revision v3`"),
        ("org/..", "not to be had"),
    ],
)
def test_what_is_not_in_the_cache_is_named_with_the_remedy(
    model: str, command: str, cache: Path
) -> None:
    with pytest.raises(ConfigError, match=f"--model {model}: no such directory, .*") as caught:
        read(model)
    assert command in caught.value.message
