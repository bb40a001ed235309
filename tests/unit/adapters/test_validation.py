"""Adapters are refused before anything changes."""

import shutil
from pathlib import Path

import pytest

from cluster.config import FleetConfig
from cluster.errors import AdapterRefused
from replica.adapters.validation import Validation
from replica.model.shape import read_shape
from tests.small_files import HIDDEN, LAYERS, settled_config, write_adapter, write_model_config


def test_room_is_that_of_a_ranks_image_which_is_more_than_its_share(tmp_path: Path) -> None:
    model = write_model_config(tmp_path / "base")
    part = 4 * LAYERS * 2 * (HIDDEN + HIDDEN // 2)  # A of q_proj is every rank's, B is cut
    engine = settled_config(model, tensor_parallel=2, adapter_memory=2 * part - 1)
    config = FleetConfig(engine, directory=str(tmp_path / "fleet"))

    def validation() -> Validation:
        return Validation(config, read_shape(model))

    old = validation().version("a", write_adapter(tmp_path / "a"), trusted=True)
    here = validation()
    new = here.version("b", write_adapter(tmp_path / "b", seed=1), pinned=True, trusted=True)
    with pytest.raises(AdapterRefused, match=f"pinned adapters take {part} .* other one {part}"):
        here.check_room(new, [old])

    shutil.rmtree(tmp_path / "a")
    validation().check_room(new, [old])  # an unknown size is no reason to refuse
