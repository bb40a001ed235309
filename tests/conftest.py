"""Settings of every test: offline, Ray only where a test is marked, a seed that failures print."""

import importlib.util
import os
from collections.abc import Generator
from typing import Any

# Set before any import of the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Triton reads it when a kernel is decorated, which for its own kernels is on import.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of randomized tests")
    parser.addoption("--mutants", type=int, default=200, help="mutated files of each kind")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed for `random.Random(seed)` and the like. `pytest --seed N` repeats a failure."""
    value: int = request.config.getoption("--seed")
    request.node.user_properties.append(("seed", value))
    return value


@pytest.fixture
def mutants(request: pytest.FixtureRequest) -> int:
    value: int = request.config.getoption("--mutants")
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        seeds = [str(value) for name, value in item.user_properties if name == "seed"]
        if seeds:
            report.sections.append(("seed", f"repeat with --seed {seeds[0]}"))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    """Refuses to start Ray in tests without the mark `ray`, fixtures of every scope included."""
    # The kernels' tests also run on a GPU machine without Ray.
    if item.get_closest_marker("ray") is not None or importlib.util.find_spec("ray") is None:
        return (yield)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{item.nodeid} starts Ray: mark it with @pytest.mark.ray")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.init", refuse)
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
