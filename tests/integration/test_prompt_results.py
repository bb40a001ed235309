"""Log-probabilities of prompts, and embeddings, are those of transformers with PEFT, whatever else
an engine does meanwhile.
"""

import itertools
import time
import types
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from cluster.config import EngineConfig
from cluster.errors import BadRequest
from cluster.values import Version
from replica.adapters.adapter_files import inspect
from replica.engine.engine import Engine
from replica.engine.prompt_results import PromptResults
from replica.model import prompt_reader
from replica.model.shape import read_shape
from replica.scheduling.request import Delta, NewRequest, Sampling, TokenLogprobs
from tests.models import TARGETS, make_adapter, make_model
from tests.packed import VOCAB, by_transformers, prompts

TOLERANCE = 1e-4
TOP = 3
PAGE_BYTES = 16 * 3 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, size, float32
# The first two share a prefix of three pages.
SHARED = prompts(48)[0]
PROMPTS = [(*SHARED, *own) for own in prompts(20, 33)] + [tuple(own) for own in prompts(70, 41)]
SCORED = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True, prompt_logprobs=TOP)
PLAIN = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
EMBEDDED = Sampling(max_tokens=1, temperature=0.0, embeds=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("prompts") / "base")


@pytest.fixture(scope="module")
def versions(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[Version]:
    root = tmp_path_factory.mktemp("adapters")
    found = []
    for i in range(3):
        targets = [*TARGETS, "lm_head", "embed_tokens"][: 7 + 2 * (i == 1)]
        settings = {"targets": targets, "saving": {"save_embedding_layers": False}}
        path = make_adapter(
            root / str(i), model, rank=4 * (i + 1), seed=i, strength=0.1, **settings
        )
        info = inspect(path, read_shape(model), rank_max=64)
        found.append(Version(f"a{i}", info.digest, path, info.rank, info.parameters))
    return found


Expected = dict[tuple[str | None, int], tuple[torch.Tensor, torch.Tensor]]
"""By digest and prompt: log-probabilities after each token, and the last token's state."""


@pytest.fixture(scope="module")
def expected(model: str, versions: list[Version]) -> Expected:
    found = {}
    for version in (None, *versions):
        theirs = by_transformers(model, None if version is None else version.uri)
        for i, prompt in enumerate(PROMPTS):
            with torch.inference_mode():
                out = theirs(torch.tensor([prompt]), output_hidden_states=True)
            logprobs = out.logits[0].log_softmax(-1)
            found[version and version.digest, i] = logprobs, out.hidden_states[-1][0, -1]
    return found


def engine(model: str, versions: list[Version], **settings: object) -> Engine:
    made = Engine(EngineConfig(model, threads=1, seed=0, **settings))  # type: ignore[arg-type]
    for version in versions:
        made.register(version, version.uri)
    return made


def take(delta: Delta, asked: dict[str, tuple[str | None, int]], expected: Expected) -> None:
    """Checks what a delta tells, and that it tells it once."""
    assert delta.error is None, delta.error
    if delta.request_id not in asked:
        assert delta.prompt is None
        return
    found = delta.prompt
    digest, i = asked.pop(delta.request_id)
    logprobs, state = expected[digest, i]
    assert found is not None
    if found.embedding is None:
        check(found.logprobs, PROMPTS[i], logprobs[:-1])
    else:
        close(torch.from_numpy(np.frombuffer(found.embedding, "<f4").copy()), state)


def check(found: Sequence[TokenLogprobs], prompt: Sequence[int], expected: torch.Tensor) -> None:
    assert [own.token for own in found] == [*prompt[1:]]
    wanted = expected.gather(1, torch.tensor(prompt[1:])[:, None])
    ranks = torch.tensor([own.rank for own in found])
    close(torch.tensor([own.logprob for own in found]), wanted[:, 0])
    assert ((expected >= wanted).sum(-1) - ranks).abs().max() <= 1
    top = torch.tensor([own.top for own in found])
    close(top[..., 1], expected.topk(TOP).values)
    close(top[..., 1], expected.gather(1, top[..., 0].long()))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("depth", "host_pages"), [(1, 0), (2, 0), (2, 16)], ids=["in turn", "ahead", "host pages"]
)
def test_prompts_tell_what_transformers_says_under_churn(
    model: str,
    versions: list[Version],
    expected: Expected,
    depth: int,
    host_pages: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts in chunks, places for two of three adapters, few pages, and prefixes in the cache.
    Urgent requests take pages from prompts that are only partly computed.
    """
    looks = itertools.count(1.0, 0.05)
    slow = types.SimpleNamespace(monotonic=lambda: next(looks), time=time.time)
    monkeypatch.setattr("replica.engine.engine.time", slow)
    monkeypatch.setattr(prompt_reader, "_LOGITS_BYTES", 5 * 4 * VOCAB)  # five positions at a time
    made = engine(
        model,
        versions,
        plan_depth=depth,
        slots_max=2,
        quantum_s=0.001,
        step_tokens_max=24,
        kv_memory=14 * PAGE_BYTES,
        host_kv_memory=host_pages * PAGE_BYTES,
        growth_outputs=0.0,
    )
    asked = {}
    for n, (digest, i) in enumerate(expected):
        asked[f"{n}"] = digest, i
        made.add(NewRequest(f"{n}", PROMPTS[i], SCORED, digest, priority=1))
        asked[f"state {n}"] = digest, i
        made.add(NewRequest(f"state {n}", PROMPTS[i], EMBEDDED, digest, priority=1))
        made.add(NewRequest(f"urgent {n}", SHARED[:20], PLAIN, digest))
        for delta in [delta for _ in range(6) for delta in made.step()]:
            take(delta, asked, expected)
    while made.has_work:
        for delta in made.step():
            take(delta, asked, expected)
        made.scheduler.check()
    assert not asked
    report = made.report()
    assert report.free_pages == report.capacity_pages
    assert report.preemptions
    made.close()


def test_a_model_whose_head_is_its_own_refuses_by_name() -> None:
    results = PromptResults(supported=False)
    results.check(NewRequest("plain", PROMPTS[0], PLAIN))
    for sampling, field in ((SCORED, "prompt_logprobs"), (EMBEDDED, "input")):
        with pytest.raises(BadRequest, match=f"^{field}: ") as refused:
            results.check(NewRequest("r", PROMPTS[0], sampling))
        assert refused.value.field == field
