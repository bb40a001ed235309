"""A fleet that cannot start says why, in one line, and leaves nothing running."""

import contextlib
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from replica.engine.node import read_node
from tests.fleet import LORAFLEET, START_S, Fleet, eventually, fleet
from tests.models import make_adapter, make_model

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def said(arguments: Sequence[str], status: int, directory: Path) -> str:
    """Its output, without what it does and which sizes it chose. It must end with that status."""
    failing = Fleet(arguments, directory)
    try:
        assert failing.process.wait(timeout=START_S) == status, failing.output()
    finally:
        failing.stop()
    lines = [line.removeprefix("lorafleet: ") for line in failing.output().splitlines(True)]
    (line,) = [line for line in lines if not line.startswith(("dtype: ", "memory: ", "starting "))]
    return line


def test_what_keeps_the_replicas_from_starting_is_told(model: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (weights,) = broken.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    line = said(["--model", str(broken), "--device", "cpu"], 1, tmp_path)
    assert weights.name in line


def test_memory_that_leaves_the_rest_nothing_is_refused(model: str, tmp_path: Path) -> None:
    all_of_it = read_node().memory
    arguments = ["--model", model, "--device", "cpu", "--kv-memory", str(all_of_it)]
    line = said(arguments, 2, tmp_path)
    assert line.startswith("adapter_memory: nothing is left for it of ")
    assert f"kv_memory {all_of_it}" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_while_it_starts_it_does_and_says_so(
    model: str, tmp_path: Path, number: int
) -> None:
    starting = Fleet(["--model", model, "--device", "cpu"], tmp_path)
    # Ray then waits in its own code, under its own handler of SIGTERM.
    eventually(lambda: "starting Ray" in starting.output(), "Ray starts", START_S)
    eventually(lambda: len(starting.processes()) > 3, "it has processes", START_S)
    status, _, left = starting.stop(number)
    assert (status, left) == (1, [])
    assert starting.output().splitlines()[-1] == "lorafleet: ended before it was ready"


def test_what_a_killed_fleet_left_goes_when_the_next_one_starts(model: str, tmp_path: Path) -> None:
    arguments = ["--model", model, "--device", "cpu"]
    (tmp_path / "first").mkdir()
    with fleet(arguments, tmp_path / "first") as first:
        processes = first.processes()
        directory = Path(next(filter(None, map(run_directory, processes))))
        beside = subprocess.Popen(["tail", "-F", directory / "owner"], stdout=subprocess.DEVNULL)
        try:
            first.process.kill()
            first.process.wait()
            assert directory.exists()
            failing = Fleet([*arguments, "--redis-url", "redis://127.0.0.1:1"], tmp_path)
            assert failing.process.wait(START_S) == 2
            assert not directory.exists()
            left = lambda: [p.cmdline() for p in processes if p.is_running() and alive(p)]  # noqa: E731
            eventually(lambda: not left(), "none is left")
            assert beside.poll() is None, "a process that only names it is none of it"
        finally:
            beside.kill()
            beside.wait()


def run_directory(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("LORAFLEET_RUN")
    return None


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def test_files_of_the_current_directory_are_not_taken_for_ours(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a proxy asked for what is on this machine, and `::1` is a host like others."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("cluster", "secrets", "replica", "json"):
        (here / f"{name}.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.chdir(here)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with fleet(["--model", model, "--device", "cpu", "--host", "::1"], tmp_path) as running:
        assert running.url.startswith("http://[::1]:")
        shown = subprocess.run(
            [LORAFLEET, "status", "--url", running.url], capture_output=True, text=True
        )
        assert shown.returncode == 0 and "0B/" in shown.stdout


def test_another_base_model_starts_without_the_adapters_of_the_last(
    model: str, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", model)
    other = make_model(tmp_path / "other", "qwen2", head_dim=16)
    with fleet(["--model", model, "--device", "cpu", "--adapter", f"a={adapter}"], tmp_path) as one:
        assert one.complete("a").status_code == 200
    with fleet(["--model", other, "--device", "cpu"], tmp_path) as two:
        assert [entry["name"] for entry in two.adapters()["data"]] == []
        assert two.complete("a").status_code == 404
        assert two.complete("other").status_code == 200


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
