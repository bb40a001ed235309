"""The wheel: it holds the program and nothing else, and runs without the checkout."""

import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import httpx
import pytest

from tests.fleet import ANSWER_S, START_S, environment, replica
from tests.models import make_model

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "replica", "router", "kernels/lora_kernels")


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=START_S, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building writes beside the sources."""
    directory = tmp_path_factory.mktemp("wheel")
    grown = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT, directory / "tree", ignore=grown)
    options = ("--no-deps", "--no-build-isolation", "--no-index")
    pip("wheel", *options, "--wheel-dir", str(directory), str(directory / "tree"))
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture
def program(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command of an environment that has the wheel, and the packages of this interpreter.

    A .pth file names them. Those that lie beside them are not read, so an editable install of the
    checkout cannot stand in for what the wheel lacks.
    """
    monkeypatch.delenv("PYTHONPATH", raising=False)
    environment_directory = tmp_path / "environment"
    venv.create(environment_directory, symlinks=True)
    python = str(environment_directory / "bin" / "python")
    pip("--python", python, "install", "--no-deps", "--no-index", str(wheel))
    (packages,) = environment_directory.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return environment_directory / "bin" / "lorafleet"


def test_it_holds_each_module_of_the_program_and_nothing_else(wheel: Path) -> None:
    modules = {"lorafleet.py"}
    for package in PACKAGES:
        path = ROOT / package
        modules |= {str(file.relative_to(path.parent)) for file in path.rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == modules


def test_its_replica_answers_from_an_empty_directory(program: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny")
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [program, "--help"],
        capture_output=True,
        text=True,
        timeout=ANSWER_S,
        env=environment(),
        cwd=empty,
    )
    assert done.returncode == 0 and "replica" in done.stdout, done.stderr
    arguments = ["--adapter-memory", "1MiB", "--kv-memory", "16MiB"]
    with replica(model, arguments, tmp_path / "log", str(program), empty) as (_, url, _):
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 4}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=ANSWER_S)
    assert answer.status_code == 200, answer.text
    assert list(empty.iterdir()) == []
