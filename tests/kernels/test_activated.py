"""Activated adapters beside all other kinds in one engine give the log-probabilities of PEFT, also
over pages that the base model or they themselves filled before.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from cluster.config import EngineConfig
from cluster.values import Version
from replica.adapters.adapter_files import inspect
from replica.engine.engine import Engine
from replica.model.launch import Row, slots_of
from replica.scheduling.request import NewRequest, Sampling
from tests.models import make_adapter, make_model
from tests.packed import VOCAB, prompts, reference

TOLERANCE = 1e-4
CALL = (7, 300, 9)
KINDS: dict[str, dict[str, Any]] = {
    "activated": {"rank": 4, "alora_invocation_tokens": list(CALL)},
    "plain": {"rank": 8, "targets": ("q_proj", "v_proj")},
    "dora": {"rank": 4, "use_dora": True},
    "head": {"rank": 4, "targets": ("v_proj", "lm_head")},
}


GRADIENTS = True  # as in an engine, whose loaders know nothing of inference mode


class Served:
    """An engine with an adapter of each kind."""

    def __init__(self, directory: Path, kernels: str, device: Literal["cpu", "cuda"]) -> None:
        self.model = make_model(directory / "model")
        self.paths = {
            kind: make_adapter(
                directory / kind,
                self.model,
                saving={"save_embedding_layers": False},
                seed=seed,
                **settings,
            )
            for seed, (kind, settings) in enumerate(KINDS.items())
        }
        self.engine = Engine(
            EngineConfig(
                self.model,
                device=device,
                threads=1,
                kernels=kernels,  # type: ignore[arg-type]
                page_tokens=8,
                step_tokens_max=24,  # so that chunks end before, in and after an invocation
                batch_rows_max=8,
                kv_memory=2**22,
                adapter_memory=2**23,
                host_memory=2**20,
                directory_slots=8,
                rank_max=16,
            )
        )
        self.digests: dict[str | None, str | None] = {None: None}
        for kind, path in self.paths.items():
            info = inspect(path, self.engine.shape, 16)
            size = info.rank, info.parameters
            self.engine.register(
                Version(kind, info.digest, path, *size, invocation=info.invocation), path
            )
            self.digests[kind] = info.digest

    def check(self, asked: Sequence[tuple[str | None, Sequence[int]]]) -> list[int]:
        """All at once. Returns how many of each prompt's tokens were cached."""
        sampling = Sampling(max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=VOCAB)
        for n, (kind, prompt) in enumerate(asked):
            self.engine.add(NewRequest(str(n), tuple(prompt), sampling, self.digests[kind]))
        texts = [list(prompt) for _, prompt in asked]
        found: list[list[torch.Tensor]] = [[] for _ in asked]
        cached = [0] * len(asked)
        while self.engine.has_work:
            for delta in self.engine.step():
                assert delta.error is None, delta.error
                own = int(delta.request_id)
                texts[own] += delta.tokens
                cached[own] += delta.cached_tokens
                for each in delta.logprobs:
                    values = torch.empty(VOCAB)
                    for token, value in each.top:
                        values[token] = value
                    found[own].append(values)
            self.engine.scheduler.check()
        for (kind, prompt), text, own in zip(asked, texts, found, strict=True):
            path = None if kind is None else self.paths[kind]
            wanted = reference(self.model, path, text[:-1])[len(prompt) - 1 :]
            assert (torch.stack(own) - wanted).abs().max() <= TOLERANCE, kind
        return cached

    def check_prompts(self) -> None:
        """The log-probabilities of a prompt's own tokens, by every kind at once."""
        (prompt,) = prompts(50)
        sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=VOCAB)
        for kind, digest in self.digests.items():
            self.engine.add(NewRequest(str(kind), tuple(prompt), sampling, digest))
        found = {}
        while self.engine.has_work:
            for delta in self.engine.step():
                assert delta.error is None and delta.prompt is not None, delta
                found[delta.request_id] = delta.prompt.logprobs
        for kind in self.digests:
            path = None if kind is None else self.paths[kind]
            wanted = reference(self.model, path, prompt)
            assert len(found[str(kind)]) == len(prompt) - 1
            for at, each in enumerate(found[str(kind)]):
                for token, value in each.top:
                    assert abs(value - float(wanted[at, token])) <= TOLERANCE, (kind, at)


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_conversation_over_all_kinds_of_adapters(kernels: str, tmp_path: Path) -> None:
    served = Served(tmp_path, kernels, "cpu")
    with closing(served.engine):
        converse(served)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_on_a_gpu_a_conversation_over_all_kinds_of_adapters(kernels: str, tmp_path: Path) -> None:
    served = Served(tmp_path, kernels, "cuda")
    with closing(served.engine):
        converse(served)
        served.check_prompts()


def converse(served: Served) -> None:
    chat, other, more = prompts(45, 21, 19)
    called = [*chat, *CALL, *more]
    twice = [*CALL, *other, *CALL, 11]
    everything = [(None, chat), *((kind, called) for kind in KINDS), ("activated", twice)]
    assert served.check([*everything, ("activated", other)])[0] == 0
    assert served.check([("activated", called)]) == [64]  # 8 pages of 67 tokens
    assert served.check([(None, called), ("plain", called)]) == [40, 64]
    assert served.check([("activated", [*called, *CALL, 12]), (None, twice)]) == [64, 24]
    assert served.check([("activated", [*chat, *CALL, 5])]) == [48]


def test_the_slots_of_a_rows_tokens() -> None:
    def slots(start: int, count: int, base_until: int) -> list[int]:
        row = Row([0] * count, start, [], 3, None, 0, 0, base_until=base_until)
        return slots_of([Row([0], 9, [], 2, None, 0, 0), row])

    assert slots(4, 3, 0) == [2, 3, 3, 3]
    assert slots(4, 3, 4) == [2, 3, 3, 3]
    assert slots(4, 3, 6) == [2, 0, 0, 3]
    assert slots(4, 3, 100) == [2, 0, 0, 0]
