"""Kernels, replayed decode steps and steps planned ahead, together on two ranks."""

from contextlib import closing
from pathlib import Path

import pytest
import torch

from cluster.config import EngineConfig
from cluster.values import Version
from replica.adapters.adapter_files import inspect
from replica.engine.engine import Engine
from replica.model.shape import read_shape
from replica.scheduling.request import NewRequest, Sampling
from tests.models import make_adapter, make_model

VOCAB = 320


def told(engine: Engine, versions: list[Version]) -> dict[str, tuple[list[int], list[float]]]:
    """Tokens and top log-probabilities: greedy, sampled, and sampled with parameters that graphs do
    not support and the other rank does not know.
    """
    for version in versions:
        engine.register(version, version.uri)
    asked = (
        Sampling(max_tokens=3, temperature=0.0, ignore_eos=True),
        Sampling(max_tokens=4, temperature=1.0, seed=3, ignore_eos=True),
        Sampling(max_tokens=4, temperature=0.9, seed=4, top_k=20, top_p=0.8, ignore_eos=True),
        Sampling(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=8),
    )
    for n, sampling in enumerate(asked):
        digest = [None, *(v.digest for v in versions)][n % 3]
        engine.add(NewRequest(f"r{n}", tuple(range(7 + n, 12 + 3 * n)), sampling, digest))
    got: dict[str, tuple[list[int], list[float]]] = {f"r{n}": ([], []) for n in range(len(asked))}
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None, delta.error
            tokens, values = got[delta.request_id]
            tokens.extend(delta.tokens)
            values.extend(value for found in delta.logprobs for _, value in found.top)
        engine.scheduler.check()
    return got


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks need two devices, or none")
def test_what_two_ranks_tell_is_what_one_tells(tmp_path: Path) -> None:
    model = make_model(tmp_path / "base", "qwen3", num_hidden_layers=1)
    versions = []
    for rank in (4, 16):
        path = make_adapter(tmp_path / str(rank), model, rank=rank, seed=rank, strength=0.1)
        info = inspect(path, read_shape(model), rank_max=64)
        versions.append(Version(str(rank), info.digest, path, rank, info.parameters))
    settings = {"device": "cpu", "threads": 1, "batch_rows_max": 2, "rank_max": 16}
    with closing(Engine(EngineConfig(model, **settings))) as engine:  # type: ignore[arg-type]
        wanted = told(engine, versions)
    parallel = EngineConfig(
        model,
        **settings,  # type: ignore[arg-type]
        kernels="triton",
        plan_depth=2,
        tensor_parallel=2,
    )
    with closing(Engine(parallel)) as engine:
        found = told(engine, versions)
    for name, (tokens, values) in wanted.items():
        assert found[name][0] == tokens, name
        assert found[name][1] == pytest.approx(values, abs=1e-4), name
