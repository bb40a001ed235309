"""How a device's memory is divided between pages and adapters."""

import dataclasses
from pathlib import Path

import pytest

from cluster.config import EngineConfig
from cluster.errors import ConfigError
from replica.model.memory import divide
from replica.model.shape import ModelShape, read_shape
from replica.scheduling.assembly import Division
from tests.small_files import write_model_config


@pytest.fixture
def shape(tmp_path: Path) -> ModelShape:
    read = read_shape(write_model_config(tmp_path / "model"))
    return dataclasses.replace(read, layers=2, kv_heads=3, head_dim=8, context=1000)


def divided(shape: ModelShape, **settings: object) -> Division:
    memory = {} if "device_memory" in settings else {"adapter_memory": 2**20}
    return divide(EngineConfig("m", **memory | settings), shape, 2)  # type: ignore[arg-type]


PAGE = 2 * 2 * 3 * 8 * 2 * 16


def test_apart_each_has_what_was_named(shape: ModelShape) -> None:
    made = divided(shape, kv_memory=10 * PAGE + 5, adapter_memory=999)
    assert made == Division(10, PAGE, 63, 999, shared=False)


def test_without_a_word_there_is_room_for_a_batch_of_sequences(shape: ModelShape) -> None:
    assert divided(shape, batch_rows_max=4).pages == 4 * 63
    assert divided(shape, batch_rows_max=4, context_tokens_max=100).pages == 4 * 7


def test_together_adapters_may_take_all_but_a_context_and_the_page_of_padding(
    shape: ModelShape,
) -> None:
    made = divided(shape, device_memory=100 * PAGE)
    assert made == Division(99, PAGE, 63, 36 * PAGE, shared=True)


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"kv_memory": PAGE - 1}, "kv_memory"), ({"device_memory": 64 * PAGE}, "device_memory")],
)
def test_too_little_is_named(shape: ModelShape, settings: dict[str, int], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: {settings[field]}") as caught:
        divided(shape, **settings)
    assert caught.value.field == field
    enough = {field: settings[field] + PAGE}
    assert divided(shape, **enough).pages > 0


def test_a_page_is_no_longer_than_a_sequence(shape: ModelShape) -> None:
    assert divided(shape, page_tokens=64, context_tokens_max=64).context_pages == 1
    with pytest.raises(ConfigError, match=r"^page_tokens: 65") as caught:
        divided(shape, page_tokens=65, context_tokens_max=64)
    assert caught.value.field == "page_tokens"
