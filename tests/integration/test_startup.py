"""A fleet that cannot start says why, in one line."""

from pathlib import Path

import pytest

from tests.fleet import START_S, Fleet
from tests.models import make_model

pytestmark = pytest.mark.ray


def test_what_keeps_the_replicas_from_starting_is_told(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny")
    failing = Fleet(["--model", model, "--device", "cpu", "--kv-memory", "1000TiB"], tmp_path)
    try:
        assert failing.process.wait(timeout=START_S) == 1
    finally:
        failing.stop()
    said = failing.output()
    assert said.startswith("lorafleet: kv_memory: ") and said.count("\n") == 1
