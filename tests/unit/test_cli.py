"""The command line: what it says when something is wrong, and what its flags become."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

import lorafleet
from cluster.config import EngineConfig, FleetConfig
from cluster.errors import ConfigError, FleetError
from lorafleet import cli
from replica.serving.keys import OperatorKey
from replica.serving.settings import read_settings
from router.client import call
from router.flags import documentation
from router.ports import ReplicaPorts
from tests.fleet import LORAFLEET, environment
from tests.models import edit_config, make_adapter, make_model
from tests.until import TIMEOUT_S


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "fr", model)


def settings(**flags: object) -> FleetConfig:
    return read_settings({"config": None, "model": "/m", **flags})


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error of the real program."""
    done = subprocess.run(
        [LORAFLEET, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment(),
    )
    return done.returncode, done.stdout, done.stderr


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status and message of `main` for a command that cannot start."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["lorafleet", *arguments])
        lorafleet.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "",
        "serve",
        "replica",
        "status",
        "doctor",
        "adapters",
        "adapters add",
        "adapters rm",
        "adapters ls",
        "config",
        "config show",
        "simulate",
        "simulate upstream",
        "simulate workload",
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(cli, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output
    assert "--help" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        "a",
        "",
        "a /a --file adapters.yaml",
        "--file nothing.yaml",
        "--file empty.yaml",
        "a --upload",
        "--file adapters.yaml --upload",
    ],
)
def test_adapters_are_added_by_name_and_path_or_from_a_file(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("adapters.yaml").write_text("adapters: {a: b}")
    Path("empty.yaml").write_text("engine: {}")
    result = CliRunner().invoke(cli, ["adapters", "add", *arguments.split()])
    assert isinstance(result.exception, ConfigError)


def test_a_files_adapters_are_added_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"a{i}" for i in range(610)]
    lines = "".join(f"\n  {name}: adapters/{name}" for name in names)
    Path("adapters.yaml").write_text(f"adapters:{lines}\nengine: {{model: ignored}}\n")
    entries: dict[str, dict[str, Any]] = {}

    def call(*arguments: Any) -> httpx.Response:
        assert arguments[2:4] == ("POST", "/v1/load_lora_adapters")
        part = {entry["lora_name"]: entry for entry in arguments[4]["adapters"]}
        entries.update(part)
        last = "a609" in part
        data = [{"id": name, "failed": {}, "remarks": []} for name in part]
        if last:
            data[-1]["failed"] = {"r1": "no such directory"}
            data[-1]["remarks"] = ["Its chat template is not used."]
        return httpx.Response(200, json={"pending": ["r2"] if last else [], "data": data})

    monkeypatch.setattr("router.client.call", call)
    result = CliRunner().invoke(cli, ["adapters", "add", "--file", "adapters.yaml", "--pinned"])
    assert result.output.splitlines() == [
        "250 of 610 adapters added.",
        "500 of 610 adapters added.",
        "610 of 610 adapters added. Not yet acknowledged by: r2.",
        "a609: Its chat template is not used.",
        "a609: could not be read by r1: no such directory",
    ]
    assert sorted(entries) == sorted(names)
    assert entries["a0"]["lora_path"] == str(tmp_path / "adapters/a0") and entries["a0"]["pinned"]


def test_of_a_files_adapters_a_part_that_is_refused_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "adapters.yaml"
    file.write_text("adapters: {a: /a, b: /b}")

    def refused(*_: Any) -> httpx.Response:
        raise FleetError("400: lora_path: '/a' is outside")

    monkeypatch.setattr("router.client.call", refused)
    result = CliRunner().invoke(cli, ["adapters", "add", "--file", str(file)])
    assert isinstance(result.exception, FleetError)


@pytest.mark.parametrize("command", ["serve", "replica"])
def test_both_take_the_same_engine_flags(command: str) -> None:
    shown = CliRunner().invoke(cli, [command, "--help"], env={"COLUMNS": "200"}).output
    flags = "model adapter served-model-name port device dtype adapter-root adapter-memory"
    flags += " tensor-parallel"
    assert all(f"--{flag} " in shown for flag in flags.split())


@pytest.mark.parametrize("command", ["serve", "replica"])
def test_each_flag_says_what_its_field_says(command: str) -> None:
    shown = CliRunner().invoke(cli, [command, "--help"], env={"COLUMNS": "400"}).output
    rows = re.findall(r"--([a-z-]+)\S* +(\S+) +(\S.*?) *│", shown)
    said = {flag.replace("-", "_"): f"{value} {text}" for flag, value, text in rows}
    assert len(said) == shown.count("│ --")
    documented = documentation(EngineConfig) | documentation(FleetConfig)
    for name in said.keys() - {"config", "help", "api_key", "api_key_file", "admin_key_file"}:
        field = name if name in documented else f"{name}s"
        assert documented[field] in said[name]
    assert said["port"] == "<int> Port to listen on; 0 takes a free one. Default: 8000."
    assert said["adapter_root"].endswith("Default: none. Repeat it for more.")
    assert said["kv_memory"].startswith("SIZE ") and said["kv_memory"].endswith("at startup.")
    assert said["fair_share"].endswith("weights.")


def test_flags_become_the_configuration() -> None:
    made = settings(
        adapter=["fr=/a/fr", "de=hf://org/de"],
        replicas=2,
        port=0,
        adapter_memory="64MiB",
        adapter_root=["/a"],
        served_model_name="base",
    )
    assert (made.replicas, made.port, made.engine.adapter_memory) == (2, 0, 64 * 2**20)
    assert made.adapters == {"fr": "/a/fr", "de": "hf://org/de"}
    assert (made.adapter_roots, made.engine.base_name) == (("/a",), "base")


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("replicas: 3\nport: 9\nadapters: {fr: /a/fr}\nengine: {model: /m, seed: 7}\n")
    made = read_settings({"config": file, "port": 10, "adapter": ["de=/a/de"], "model": None})
    assert (made.replicas, made.port, made.engine.seed) == (3, 10, 7)
    assert made.adapters == {"fr": "/a/fr", "de": "/a/de"}


def test_paths_are_relative_to_where_the_command_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = settings(model="m", adapter=["fr=a/fr"], adapter_root=["a"])
    assert made.engine.model == str(tmp_path / "m")
    assert made.adapters["fr"] == str(tmp_path / "a" / "fr")
    assert made.adapter_roots == (str(tmp_path / "a"),)
    assert made.directory == str(tmp_path / ".fleet")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("replica: 2", "replica: unknown key (did you mean replicas?)"),
        ("model: /m", "model: unknown key (did you mean engine.model?)"),
        ("engine: {replicas: 2}", "engine.replicas: unknown key (did you mean replicas, outside"),
        ("engine: {modle: /m}", "engine.modle: unknown key (did you mean model?)"),
        ("engine: {model: /m, dtype: int3}", "engine.dtype"),
        ("- a\n- b", "not a mapping"),
        ("a: [", "--config"),
        ("engine: /m", "engine: '/m' is not a mapping"),
        ("adapters: [/a/fr]", "adapters: ['/a/fr'] is not a mapping"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(named)):
        read_settings({"config": file, "model": "/m", "adapter": ["fr=/a/fr"]})


def test_keys_come_from_files_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, admin, empty = tmp_path / "keys", tmp_path / "admin", tmp_path / "empty"
    keys.write_text("sk-one\nsk,two\n\n")
    admin.write_text("sk-admin\n")
    empty.write_text("\n")
    keys.chmod(0o600)
    admin.chmod(0o640)
    made = settings(api_key_file=keys, admin_key_file=admin)
    assert (made.api_keys, made.admin_keys) == (("sk-one", "sk,two"), ("sk-admin",))
    warning = capsys.readouterr().err
    assert str(admin) in warning and str(keys) not in warning
    assert settings(api_key_file=keys, api_key=["sk-three"]).api_keys[1:] == ("sk,two", "sk-three")
    with pytest.raises(ConfigError, match="has no key"):
        settings(api_key_file=empty)


def test_a_configuration_with_keys_that_others_may_read_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("api_keys: ['sk-alpha,beta']\n")
    for mode, warned in ((0o600, False), (0o644, True)):
        file.chmod(mode)
        assert settings(config=file).api_keys == ("sk-alpha,beta",)
        assert ("chmod 600" in capsys.readouterr().err) == warned


def test_another_servers_name_of_a_flag_is_taken() -> None:
    shown = CliRunner().invoke(cli, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert "--context-tokens-max,--max-model-len " in shown
    assert settings(context_tokens_max=64).engine.context_tokens_max == 64


def test_a_switch_takes_no_value_and_its_help_says_so() -> None:
    shown = CliRunner().invoke(cli, ["serve", "--help"], env={"COLUMNS": "200"}).output
    (line,) = [line for line in shown.splitlines() if "--fair-share" in line]
    assert "<" not in line


def test_calls_to_this_machine_pass_every_proxy_by(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def request(*_: Any, trust_env: bool, **__: Any) -> httpx.Response:
        asked.append(trust_env)
        return httpx.Response(200)

    monkeypatch.setattr("router.client.httpx.request", request)
    for url in ("http://127.0.0.1:8000", "http://[::1]:8000/v1", "https://fleet.example"):
        call(url, None, "GET", "/v1/adapters")
    assert asked == [False, False, True]


def test_a_command_of_the_fleets_own_user_needs_no_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sent: list[str | None] = []

    def request(*_: Any, headers: dict[str, str], **__: Any) -> httpx.Response:
        sent.append(headers.get("Authorization"))
        return httpx.Response(200)

    monkeypatch.setattr("router.client.httpx.request", request)
    key = OperatorKey(8123)
    (file,) = (tmp_path / f"lorafleet-{os.getuid()}").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    call("http://localhost:8123/v1", None, "GET", "/v1/adapters")
    call("http://localhost:8123", "sk-given", "GET", "/v1/adapters")
    call("http://elsewhere:8123", None, "GET", "/v1/adapters")
    key.remove()
    call("http://localhost:8123", None, "GET", "/v1/adapters")
    assert sent == [f"Bearer {key.text}", "Bearer sk-given", None, None]


def test_it_says_its_version() -> None:
    result = CliRunner().invoke(cli, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{version('lorafleet')}\n")


def test_the_configuration_is_shown_as_a_file_that_makes_it_but_for_secrets(
    tmp_path: Path, model: str
) -> None:
    file = tmp_path / "fleet.yaml"
    url = "redis://user:secret@host:1/0"
    file.write_text(f"redis_url: {url}\napi_keys: [sk-secret]\nadapters: {{a: /a}}\n")
    file.chmod(0o600)
    asked = ["config", "show", "--config", str(file), "--model", model, "--kv-memory", "1MiB"]
    shown = CliRunner().invoke(cli, asked).output
    assert "secret" not in shown and "redis://***@host:1/0" in shown
    file.write_text(shown)
    again = read_settings({"config": file})
    expected = settings(model=model, adapter=["a=/a"], kv_memory=2**20)
    assert replace(again, api_keys=(), redis_url=None) == expected


def test_a_section_may_be_empty(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("engine:\nadapters:\n")
    made = read_settings({"config": file, "model": "/m", "adapter": ["fr=/a/fr"]})
    assert made.adapters == {"fr": "/a/fr"}


def test_a_name_is_given_to_one_adapter() -> None:
    with pytest.raises(ConfigError, match="--adapter fr=/b: 'fr' is /a already"):
        settings(adapter=["fr=/a", "fr=/b"])


@pytest.mark.parametrize("command", ["serve", "replica"])
def test_what_cannot_be_served_is_said_in_one_line(
    command: str, model: str, adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong"
    make_adapter(wrong, model, rank=8)
    edit_config(wrong, "adapter_config.json", use_dora="yes please")
    bare, broken = tmp_path / "bare", tmp_path / "broken.yaml"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    broken.write_text("a: [\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            (): "--model",
            ("--model", "/nowhere"): "--model /nowhere: no such directory",
            ("--model", str(tmp_path)): f"--model {tmp_path}: no config.json",
            ("--model", "meta-llama/Llama-3.1-8B"): "hf download meta-llama/Llama-3.1-8B",
            ("--model", f"{model}/config.json"): "config.json: not a directory",
            ("--model", str(bare)): f"--model {bare}: no weights (*.safetensors)",
            ("--model", model, "--adapter", "fr"): "--adapter fr: must be NAME=PATH",
            (
                "--model",
                model,
                "--adapter",
                "fr=/nowhere",
            ): "--adapter fr=/nowhere: no such directory",
            ("--model", model, "--adapter", f"tiny={adapter}"): "'tiny' is the base model's name",
            ("--model", model, "--host", "no.such.host.invalid"): "--host no.such.host.invalid: ",
            ("--model", model, "--host", "203.0.113.9"): "--host 203.0.113.9: no address of this",
            ("--model", model, "--config", str(broken)): f"--config {broken}: line 2, column 1: ",
            (
                "--model",
                model,
                "--kv-memory",
                "900TiB",
            ): "--kv-memory: 900.0 TiB, but this",
            (
                "--model",
                model,
                "--api-key-file",
                "/no.keys",
            ): "--api-key-file /no.keys: No such file",
            ("--model", model, "--adapter", f"fr={wrong}"): f"--adapter fr={wrong}: ",
            ("--model", model, "--adapter-memory", "lots"): "adapter_memory: 'lots'",
            ("--model", model, "--device", "tpu"): "device: 'tpu'",
            ("--model", model, "--tensor-parallel", "3"): "tensor_parallel: 3 ranks cannot share",
            ("--model", model, "--tensor-parallel", "0"): "tensor_parallel: 0",
            ("--model", model, "--port", port): f"--port {port}: ",
            ("--model", model, "--port", "70000"): "port: 70000",
            ("--model", model, "--config", "/no.yaml"): "--config /no.yaml: ",
        }
        for arguments, words in cases.items():
            status, message = refused(capsys, command, *arguments)
            assert status == 2, arguments
            assert words in message, arguments
            assert message.count("\n") == 1, message


@pytest.mark.parametrize("command", ["serve", "replica"])
@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", "{}", "config.json: architecture None"),
        ("tokenizer.json", "{}", "tokenizer.json: Model missing"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: not a JSON object"),
        ("chat_template.jinja", "{% if %}", "its chat template, line 1: "),
    ],
)
def test_a_broken_checkpoint_is_said_in_one_line(
    command: str,
    file: str,
    content: str,
    words: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / file).write_text(content)
    status, message = refused(capsys, command, "--model", str(broken))
    assert status == 2
    assert message.startswith(f"lorafleet: --model {broken}: ") and words in message
    assert message.count("\n") == 1, message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny", "'tiny' is the base model's name"),
        ("a" * 257, "257 characters"),
        ("a\tb", "control or invisible characters"),
        ("Tiny", "'Tiny' reads like the base model's name"),
        ("tiny:one", "'tiny:one' reads like BASE:ADAPTER"),
        (" a", "begins or ends with a space"),
    ],
)
def test_an_adapter_whose_name_no_client_could_use_is_refused(
    name: str, words: str, model: str, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", model, "--adapter", f"{name}={adapter}")
    status, message = refused(capsys, "serve", *arguments)
    assert status == 2
    assert message.startswith(f"lorafleet: --adapter {name!r}: ") and words in message


WORKLOAD = """
card: h200-llama8b
adapters: {count: 4}
arrivals: {rate: 2, requests: 5}
"""


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    file = tmp_path / "workload.yaml"
    file.write_text(WORKLOAD)
    return file


def simulated(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["simulate", "workload", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_workload_is_simulated_as_a_table_of_one_policy_or_more(workload: Path) -> None:
    head, goodput, *_ = simulated(workload).splitlines()
    assert (head.split(), goodput.split()) == (["ours"], ["goodput", "1.00"])
    head, goodput, *_ = simulated(workload, "--policy", "skip", "--policy", "ours").splitlines()
    assert (head.split(), goodput.split()) == (["skip", "ours"], ["goodput", "1.00", "1.00"])


def test_a_workload_is_simulated_as_json_too(workload: Path) -> None:
    found = json.loads(simulated(workload, "--json", "--policy", "drain"))
    assert list(found) == ["drain"] and found["drain"]["goodput"] == 1


def test_the_targets_of_goodput_are_flags(workload: Path) -> None:
    for flag in ("--ttft-slo", "--tpot-slo"):
        found = json.loads(simulated(workload, "--json", flag, 0.0001))
        assert found["ours"]["goodput"] == 0


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        (None, (), "No such file or directory"),
        ("a: [", (), "workload.yaml: line 2, column 1: did not find expected node content"),
        ("- a", (), "workload.yaml: not a mapping of settings"),
        ("card: b200", (), "adapters: required"),
        (WORKLOAD.replace("h200", "b200"), (), "card: 'b200-llama8b' is not one of h200-llama8b,"),
        (WORKLOAD + "memory: 80MB", (), "memory: 80000000 bytes do not hold an adapter"),
        (WORKLOAD, ("--policy", "hope"), "--policy: 'hope' is not one of ours, skip, drain, "),
    ],
)
def test_a_workload_that_cannot_be_simulated_is_said_in_one_line(
    text: str | None,
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "workload.yaml"
    if text is not None:
        file.write_text(text)
    status, message = refused(capsys, "simulate", "workload", str(file), *arguments)
    assert status == 2
    assert message.startswith("lorafleet: ") and words in message
    assert message.count("\n") == 1, message


@pytest.mark.parametrize("arguments", [(), ("w", "--ttft-slo", "-1"), ("w", "--tpot-slo", "x")])
def test_flags_that_make_no_sense_are_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(cli, ["simulate", "workload", *arguments]).exit_code == 2


def test_a_misspelt_key_is_told_before_what_it_leaves_out(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("engine: {modle: /m}")
    with pytest.raises(ConfigError, match=r"engine\.modle: unknown key"):
        read_settings({"config": file, "model": None})


def test_commands_to_a_fleet_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    for command in (["status"], ["adapters", "ls"], ["adapters", "rm", "fr"]):
        status, message = refused(capsys, *command, "--url", url)
        assert status == 1
        assert message.startswith(f"lorafleet: --url {url}: ")
        assert message.count("\n") == 1


def test_the_real_program_fails_without_a_traceback() -> None:
    status, out, error = run("serve", "--model", "/nowhere")
    assert (status, out) == (2, "")
    assert error == "lorafleet: --model /nowhere: no such directory\n"


def test_a_replica_alone_needs_neither_ray_nor_redis() -> None:
    code = (
        "import sys, lorafleet, replica.serving.single_process; "
        "print(sorted({'ray', 'redis'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_two_fleets_never_share_ports_for_replicas() -> None:
    """A dead replica's port would else answer for another fleet's models."""
    first, second = ReplicaPorts(), ReplicaPorts()
    assert not set(first.ports) & set(second.ports)
    taken = first.ports
    first.release()
    third = ReplicaPorts()
    assert third.ports == taken
    second.release()
    third.release()


def test_a_block_in_which_a_killed_fleets_replica_listens_is_not_used() -> None:
    first = ReplicaPorts()
    first.release()
    with socket.create_server(("127.0.0.1", first.ports[3])):
        second = ReplicaPorts()
        assert second.ports != first.ports
        second.release()
