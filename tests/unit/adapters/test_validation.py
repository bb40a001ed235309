"""Adapters are refused before anything changes."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from cluster.config import FleetConfig
from cluster.errors import AdapterRefused
from cluster.holds import Holds
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

    paths = write_adapter(tmp_path / "a"), write_adapter(tmp_path / "b", seed=1)
    with validation().adding() as adding:
        old = adding.version("a", paths[0], trusted=True)
        new = adding.version("b", paths[1], pinned=True, trusted=True)
    shutil.rmtree(tmp_path / "a")
    here = validation()
    with pytest.raises(AdapterRefused, match=f"pinned adapters take {part} .* other one {part}"):
        here.check_room(new, [(here.bytes_of(old), False)])

    shutil.rmtree(tmp_path / "fleet")
    there = validation()
    there.check_room(new, [(there.bytes_of(old), False)])  # an unknown size is no reason to refuse


@pytest.fixture
def config(tmp_path: Path) -> FleetConfig:
    engine = settled_config(write_model_config(tmp_path / "base"))
    return FleetConfig(engine, directory=str(tmp_path / "fleet"))


def held(validation: Validation, digest: str) -> bool:
    return Holds(Path(validation.store.path(digest)).parent).held(digest)


def test_the_files_are_held_while_the_version_is_added(config: FleetConfig, tmp_path: Path) -> None:
    validation = Validation(config, read_shape(config.engine.model))
    path = write_adapter(tmp_path / "a")
    with validation.adding() as adding:
        version = adding.version("a", path, trusted=True)
        adding.version("b", path, trusted=True)
        assert held(validation, version.digest)
    assert not held(validation, version.digest)
    small = dataclasses.replace(config.engine, adapter_memory=255)
    refusing = Validation(dataclasses.replace(config, engine=small), read_shape(small.model))
    with refusing.adding() as adding:
        with pytest.raises(AdapterRefused, match="bytes of adapter memory"):
            adding.version("a", path, trusted=True)
        assert not held(refusing, version.digest)


def test_an_add_that_is_cancelled_while_files_are_copied_holds_nothing(
    config: FleetConfig, tmp_path: Path
) -> None:
    validation = Validation(config, read_shape(config.engine.model))
    with validation.adding() as adding:
        pass
    version = adding.version("a", write_adapter(tmp_path / "a"), trusted=True)
    assert not held(validation, version.digest)
