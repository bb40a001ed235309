"""Loads compute on their own threads alone."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from replica.adapters.arena import Arena
from replica.adapters.loader import Loader
from replica.model.shape import read_shape
from tests.small_files import write_model_config
from tests.until import TIMEOUT_S


@pytest.fixture
def batch_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_a_loader_leaves_torchs_threads_to_the_batches(tmp_path: Path, batch_threads: int) -> None:
    shape = read_shape(write_model_config(tmp_path))
    arena = Arena(shape, 1024, 2, torch.float32)
    loader = Loader(shape, torch.float32, arena, 8, 2, lambda: None, lambda: False)
    both = threading.Barrier(2)

    def count() -> int:
        both.wait(TIMEOUT_S)
        return torch.get_num_threads()

    counts: list[Future[int]] = [loader._threads.submit(count) for _ in range(2)]
    assert [future.result() for future in counts] == [1, 1]
    assert torch.get_num_threads() == batch_threads
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == batch_threads
    loader.close()
