"""The kernels compile for a Hopper GPU, though no test here runs them there (see `hopper.py`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.hopper import CASES
from tests.until import WORK_S

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", CASES)
def test_what_is_launched_compiles(case: str, tmp_path: Path) -> None:
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.hopper", case],
        cwd=ROOT,
        env=surroundings | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=WORK_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
