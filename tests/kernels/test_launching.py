"""Launches that skip Triton's own way have the kernel that it would choose (see `launches.py`)."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_kernels import delta_kernels, launching
from lora_kernels.launching import Launcher
from tests.until import WORK_S

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", ["every", "bounded", "package"])
def test_launches_have_the_kernel_and_the_arguments_that_triton_gives_them(case: str) -> None:
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launches", case],
        cwd=ROOT,
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=WORK_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Jit:
    """What `triton.jit` makes, as far as a Launcher asks; nothing comes of a launch."""

    def __init__(self) -> None:
        self.params: list[Any] = [SimpleNamespace(name="BLOCK", is_constexpr=True)]
        self.launches: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.launches.append((grid, arguments, constants))

        return launch


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
def test_in_the_interpreter_a_launch_is_tritons() -> None:
    kernel = delta_kernels.shrink_kernel
    assert isinstance(kernel, Launcher) and kernel._launch == kernel._as_triton


def test_with_an_unknown_triton_a_launch_is_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "JITFunction", Jit)
    jit = Jit()
    assert Launcher(jit)._launch.__name__ == "_launch_like_before"
    monkeypatch.setattr(launching.triton, "__version__", "3.60.0")
    Launcher(jit).bound(BLOCK=2)[3, 4](5, num_warps=6)
    assert jit.launches == [((3, 4), (5,), {"BLOCK": 2, "num_warps": 6})]


@pytest.mark.parametrize("backend", ["hip", None])
def test_where_more_may_count_every_launch_is_tritons(
    monkeypatch: pytest.MonkeyPatch, backend: str | None
) -> None:
    """On other devices, and where something makes Triton compile instead of launching."""
    runs: list[Any] = []

    class Elsewhere(Jit):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(**constants: Any) -> Any:
                runs.append(constants)
                target = SimpleNamespace(backend=backend)
                return backend and SimpleNamespace(metadata=SimpleNamespace(target=target))

            return launch

    monkeypatch.setattr(launching, "JITFunction", Elsewhere)
    monkeypatch.setattr(
        launching, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))
    )
    kernel = Launcher(Elsewhere())
    for _ in range(2):
        kernel[(1,)](BLOCK=1)
    assert len(runs) == 2
