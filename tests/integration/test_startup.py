"""A fleet that cannot start says why, in one line, and leaves nothing running."""

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fleet import START_S, Fleet
from tests.models import make_model

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def said(arguments: Sequence[str], status: int, directory: Path) -> str:
    """Its output, without lines about chosen sizes. It must end with that status."""
    failing = Fleet(arguments, directory)
    try:
        assert failing.process.wait(timeout=START_S) == status, failing.output()
    finally:
        failing.stop()
    lines = [line.removeprefix("lorafleet: ") for line in failing.output().splitlines(True)]
    (line,) = [line for line in lines if not line.startswith(("dtype: ", "memory: "))]
    return line


def test_what_keeps_the_replicas_from_starting_is_told(model: str, tmp_path: Path) -> None:
    arguments = ["--model", model, "--device", "cpu", "--kv-memory", "1000TiB"]
    arguments += ["--adapter-memory", "1MiB", "--host-memory", "0"]
    assert said(arguments, 1, tmp_path).startswith("kv_memory: ")


def test_memory_that_leaves_the_rest_nothing_is_refused(model: str, tmp_path: Path) -> None:
    arguments = ["--model", model, "--device", "cpu", "--kv-memory", "1000TiB"]
    line = said(arguments, 2, tmp_path)
    assert line.startswith("adapter_memory: nothing is left for it of ")
    assert f"kv_memory {1000 * 2**40}" in line


def test_gpus_that_are_not_there_are_not_waited_for(model: str, tmp_path: Path) -> None:
    arguments = ["--model", model, "--device", "cuda", "--replicas", "64"]
    assert said(arguments, 2, tmp_path).startswith("device: cuda, but 64 GPUs are needed")


def test_redis_is_asked_for_before_anything_starts(model: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for url, words in (
        (f"redis://:secret@127.0.0.1:{port}", "redis_url: no Redis answers: "),
        ("http://:secret@127.0.0.1", "redis_url: not a URL such as "),
        ("redis://:secret@127.0.0.1:abc", "redis_url: not a URL such as "),
    ):
        line = said(["--model", model, "--redis-url", url], 2, tmp_path)
        assert line.startswith(words) and "secret" not in line


def test_a_directory_that_cannot_be_made_is_named(model: str, tmp_path: Path) -> None:
    (tmp_path / "fleet").write_text("a file")
    line = said(["--model", model], 2, tmp_path)
    assert line == f"directory: {tmp_path / 'fleet'}: File exists\n"
