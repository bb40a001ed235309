"""`lorafleet replica`: one engine and its server, started through the command line."""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from replica.model.shape import read_shape
from tests.bench.toys import toy_adapter
from tests.fleet import ANSWER_S, LORAFLEET, START_S, STOP_S, environment, replica
from tests.models import make_adapter, make_model
from tests.packed import by_transformers, prompts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    model = make_model(root / "tiny", max_position_embeddings=8192)
    for i, name in enumerate(("fr", "de")):
        make_adapter(root / name, model, seed=i + 1)
    return root


@pytest.fixture
def alone(files: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """The process, its URL, and its log."""
    command = ["--adapter", f"fr={files / 'fr'}", "--adapter-root", str(files)]
    command += ["--dtype", "float32", "--adapter-memory", "4MiB", "--kv-memory", "64MiB"]
    command += ["--served-model-name", "base"]
    settings = tmp_path / "settings.yaml"
    settings.write_text("drain_s: 0.0\n")
    command += ["--config", str(settings)]
    with replica(files / "tiny", command, tmp_path / "log") as started:
        yield started


def test_it_answers_takes_adapters_and_ends_quietly(
    alone: tuple[subprocess.Popen[bytes], str, Path], files: Path
) -> None:
    process, url, log = alone

    def complete(model: str) -> httpx.Response:
        body = {"model": model, "prompt": "hello", "max_tokens": 4, "temperature": 0}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=ANSWER_S)

    def cli(*arguments: str) -> tuple[int, str]:
        command = [LORAFLEET, *arguments, "--url", url]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_S, env=environment()
        )
        return done.returncode, done.stdout + done.stderr

    assert complete("base").status_code == complete("fr").status_code == 200
    check_prompts(url, files, {"base": None, "fr": "fr"})
    assert complete("de").status_code == 404
    sent = shutil.copytree(files / "de", log.parent / "sent")
    status, said = cli("adapters", "add", "sent", str(sent), "--upload", "--weight", "2")
    assert (status, "'sent' added" in said) == (0, True), said
    shutil.rmtree(sent)
    check_prompts(url, files, {"sent": "de"})
    by_upload = complete("sent").json()["choices"]
    status, said = cli("adapters", "rm", "sent")
    assert (status, "'sent' removed" in said) == (0, True), said
    status, said = cli("adapters", "add", "sent", str(sent), "--upload")
    assert (status, "no such directory" in said) == (2, True), said
    add = ("adapters", "add", "de", str(files / "de"))
    status, said = cli(*add, "--weight", "0")
    assert status == 1 and said.startswith("lorafleet: 400: weight: "), said
    status, said = cli(*add, "--weight", "nan")
    assert status == 2 and said.startswith("lorafleet: --weight nan: "), said
    status, said = cli(*add, "--pinned", "--weight", "2.5")
    assert (status, "'de' added" in said) == (0, True), said
    assert complete("de").json()["choices"] == by_upload
    status, said = cli("adapters", "ls")
    assert status == 0
    assert "fr" in said
    assert "de (pinned)" in said
    assert "2.5" in said
    listed = httpx.get(f"{url}/v1/adapters", timeout=ANSWER_S).json()["data"]
    assert [(e["id"], e["pinned"], e["weight"]) for e in listed] == [
        ("de", True, 2.5),
        ("fr", False, 1.0),
    ]
    status, said = cli("status")
    assert status == 0
    assert "device" in said
    status, said = cli("adapters", "rm", "de")
    assert (status, "'de' removed" in said) == (0, True), said
    status, said = cli("adapters", "rm", "de")
    assert (status, said.count("\n")) == (1, 1)
    assert said.startswith("lorafleet: 404: ")
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(STOP_S) == 0
    assert psutil.wait_procs(started, timeout=STOP_S)[1] == []
    assert besides(log) == [f"ready: {url}/v1"]


def check_prompts(url: str, files: Path, models: Mapping[str, str | None]) -> None:
    """What lm_eval asks for a multiple choice, and embeddings, are what transformers computes.

    models: name → directory of its adapter.
    """
    tokens = prompts(40)[0]
    for name, adapter in models.items():
        theirs = by_transformers(str(files / "tiny"), adapter and str(files / adapter))
        with torch.inference_mode():
            wanted = theirs(torch.tensor([tokens]), output_hidden_states=True)
        scored = {"prompt": [tokens], "echo": True, "logprobs": 1, "max_tokens": 1}
        body = {"model": name, "temperature": 0, **scored}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=ANSWER_S).json()
        found = answer["choices"][0]["logprobs"]["token_logprobs"][1:-1]
        logprobs = wanted.logits[0].log_softmax(-1)
        close = [own[token].item() for own, token in zip(logprobs, tokens[1:], strict=False)]
        assert found == pytest.approx(close, abs=1e-4)
        body = {"model": name, "input": tokens}
        answer = httpx.post(f"{url}/v1/embeddings", json=body, timeout=ANSWER_S).json()
        state = torch.nn.functional.normalize(wanted.hidden_states[-1][0, -1], dim=0)
        assert answer["data"][0]["embedding"] == pytest.approx(state.tolist(), abs=1e-4)


def test_streams_that_it_stops_are_told(
    alone: tuple[subprocess.Popen[bytes], str, Path],
) -> None:
    process, url, log = alone
    body = {"model": "base", "prompt": "hello", "max_tokens": 8000, "n": 32, "stream": True}
    body |= {"ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=ANSWER_S) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert process.wait(STOP_S) == 0
    assert besides(log) == [f"ready: {url}/v1"]


def test_it_outlives_its_engine(alone: tuple[subprocess.Popen[bytes], str, Path]) -> None:
    process, url, log = alone
    (engine,) = psutil.Process(process.pid).children()
    body = {"model": "fr", "prompt": "hello", "max_tokens": 4, "temperature": 0}
    before = httpx.post(f"{url}/v1/completions", json=body, timeout=ANSWER_S)
    engine.kill()
    after = httpx.post(f"{url}/v1/completions", json=body, timeout=2 * ANSWER_S)
    assert after.json()["choices"] == before.json()["choices"], after.text
    assert "lorafleet: the engine's process ended; starting it again" in log.read_text()
    assert process.poll() is None


def test_without_a_word_on_memory_16_adapters_are_resident_at_once(
    files: Path, tmp_path: Path
) -> None:
    model = files / "tiny"
    shape = read_shape(str(model))
    names = [f"a{n}" for n in range(17)]
    arguments = []
    for n, name in enumerate(names):
        path = toy_adapter(tmp_path / name, shape, (8, 16, 32, 64)[n % 4], n)
        arguments += ["--adapter", f"{name}={path}"]
    with replica(model, arguments, tmp_path / "log") as (_, url, log):

        def complete(name: str) -> int:
            body = {"model": name, "prompt": "hello", "max_tokens": 8, "ignore_eos": True}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=ANSWER_S).status_code

        with ThreadPoolExecutor(len(names)) as threads:
            assert set(threads.map(complete, names)) == {200}
        listed = httpx.get(f"{url}/v1/adapters").json()
        tiers = [held["tier"] for a in listed["data"] for held in a["residency"].values()]
        assert tiers == ["device"] * len(names)
        assert listed["replicas"][0]["load"]["evictions"] == 0
        dtype, memory = log.read_text().splitlines()[:2]
        assert dtype == "lorafleet: dtype: float32 on cpu"
        assert re.match(r"lorafleet: memory: .* for adapters \(255 of rank 64\), ", memory)


def test_a_chat_without_max_tokens_ends_where_the_kv_pages_do(files: Path, tmp_path: Path) -> None:
    # 3 pages of 16 tokens, each 12,288 bytes; the context is 8,192 tokens.
    arguments = ["--dtype", "float32", "--kv-memory", str(3 * 12288)]
    arguments += ["--served-model-name", "base"]
    with replica(files / "tiny", arguments, tmp_path / "log") as (_, url, _):
        body = {"model": "base", "messages": [{"role": "user", "content": "hello"}]}
        body |= {"ignore_eos": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=ANSWER_S)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        assert answer.json()["usage"]["total_tokens"] == 48
        body |= {"max_tokens": 40}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=ANSWER_S)
    assert answer.status_code == 400
    assert "over the KV capacity of 48" in answer.json()["error"]["message"]


def test_an_adapter_that_cannot_fit_is_refused_at_the_start_with_the_numbers(
    files: Path,
) -> None:
    command = [LORAFLEET, "replica", "--model", str(files / "tiny"), "--port", "0"]
    command += ["--adapter", f"fr={files / 'fr'}", "--adapter-memory", "1000"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=START_S, env=environment()
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"lorafleet: adapters\.fr: .* takes \d+ bytes of adapter memory in float32, the total "
        r"is 1000 \(adapter_memory\)",
        done.stderr.splitlines()[-1],
    )


def besides(log: Path) -> list[str]:
    """Lines of the log, without those about chosen sizes."""
    lines = log.read_text().splitlines()
    chosen = [line for line in lines if re.match("lorafleet: (dtype|memory): ", line)]
    assert len(chosen) == 2
    return [line for line in lines if line not in chosen]
