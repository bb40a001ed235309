"""Families other than Llama, served through transformers or by our own decoder: parked and resumed
rows, the prefix cache, and the command line give the tokens of transformers with PEFT.
"""

import itertools
import random
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.config import EngineConfig
from cluster.values import Version
from replica.adapters.adapter_files import inspect
from replica.engine.engine import Engine
from replica.model.checkpoint import shape_of
from replica.scheduling.request import NewRequest, Sampling
from tests.fleet import ANSWER_S, replica
from tests.models import TARGETS, make_adapter, make_model
from tests.packed import prompts, reference

TOKENS = 8
GREEDY = Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
NAMES = ("fr", "de", "it")


FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
MODELS: dict[str, tuple[str, Sequence[str], dict[str, Any]]] = {
    "through transformers": ("olmo3", TARGETS, {"sliding_window": 8}),
    "granite": ("granite", TARGETS, {"residual_multiplier": 0.7, "logits_scaling": 2.0}),
    "gemma2": ("gemma2", TARGETS, {"sliding_window": 8}),
    "gemma3": ("gemma3_text", TARGETS, {"sliding_window": 8}),
    "phi3": ("phi3", FUSED, {"sliding_window": 8, "pad_token_id": 2}),
    "mixtral": ("mixtral", TARGETS[:4], {"num_local_experts": 4}),
}


@pytest.fixture(scope="module", params=MODELS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, targets, settings = MODELS[request.param]
    root = tmp_path_factory.mktemp(architecture)
    model = make_model(root / "model", architecture, **settings)
    for i, name in enumerate(NAMES, start=1):
        make_adapter(root / name, model, rank=4 * i, targets=targets[i:], seed=i)
    return root


def continued(files: Path, adapter: str | None, prompt: list[int]) -> list[int]:
    text = list(prompt)
    for _ in range(TOKENS):
        path = None if adapter is None else str(files / adapter)
        text.append(int(reference(str(files / "model"), path, text)[-1].argmax()))
    return text[len(prompt) :]


def test_parked_rows_and_shared_prefixes_give_the_models_own_tokens(
    files: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each read of the clock takes 50 ms, so steps are long; loads cost nothing. So rows are parked.
    looks = itertools.count(1.0, 0.05)
    slow = types.SimpleNamespace(monotonic=lambda: next(looks), time=time.time)
    monkeypatch.setattr("replica.engine.engine.time", slow)
    quick = types.SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr("replica.adapters.loader.time", quick)
    model = str(files / "model")
    config = EngineConfig(
        model,
        device="cpu",
        threads=1,
        seed=0,
        slots_max=1,
        batch_rows_max=4,
        quantum_s=0.001,
        page_tokens=8,
    )
    engine = Engine(config)
    digests: dict[str | None, str | None] = {None: None}
    for name in NAMES:
        info = inspect(str(files / name), shape_of(model), rank_max=64)
        version = Version(name, info.digest, str(files / name), info.rank, info.parameters)
        engine.register(version, version.uri)
        digests[name] = info.digest
    (start,) = prompts(48)
    asked = {f"{name}-{n}": (name, start[: 40 + 4 * n]) for name in digests for n in range(2)}
    order = list(asked)
    random.Random(seed).shuffle(order)
    got: dict[str, list[int]] = {}
    cached = 0
    for turn in range(2):
        for request in order:
            name, prompt = asked[request]
            engine.add(NewRequest(f"{request}-{turn}", tuple(prompt), GREEDY, digests[name]))
        while engine.has_work:
            for delta in engine.step():
                assert delta.error is None, delta.error
                cached += delta.cached_tokens
                got.setdefault(delta.request_id, []).extend(delta.tokens)
            engine.scheduler.check()
    report = engine.report()
    engine.close()
    assert report.parks
    assert cached
    for request, (name, prompt) in asked.items():
        expected = continued(files, name, prompt)
        assert [got[f"{request}-{turn}"] for turn in range(2)] == [expected] * 2, request


@pytest.mark.parametrize("files", ["through transformers", "phi3"], indirect=True)
def test_the_command_line_serves_it_with_an_adapter(files: Path, tmp_path: Path) -> None:
    given = ["--device", "cpu", "--adapter", f"fr={files / 'fr'}"]
    given += ["--adapter-memory", "4MiB", "--kv-memory", "4MiB"]
    (prompt,) = prompts(24)
    with replica(files / "model", given, tmp_path / "log") as (_, url, _):
        for model, adapter in (("model", None), ("fr", "fr")):
            asked = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
            asked |= {"ignore_eos": True, "return_token_ids": True}
            answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=ANSWER_S)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["token_ids"] == continued(files, adapter, prompt)
