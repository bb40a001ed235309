"""The arena keeps placed images intact while others are loaded, moved and cleared."""

import random
import threading

import numpy as np
import pytest
import torch

from replica.adapters import arena as arena_module
from replica.adapters.arena import Arena
from replica.adapters.image import Image, Layout
from replica.model.shape import ModelShape, read_shape
from tests.models import make_model


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return read_shape(make_model(tmp_path_factory.mktemp("arena") / "model"))


def image_of(shape: ModelShape, rank: int, seed: int) -> Image:
    """All projections at that rank, with random weights."""
    size = (shape.layers, len(shape.projections))
    a, b = np.zeros(size, np.int64), np.zeros(size, np.int64)
    offset = 0
    for layer in range(shape.layers):
        for index, (inputs, outputs) in enumerate(shape.projections.values()):
            a[layer, index], b[layer, index] = offset, offset + rank * inputs
            offset += rank * (inputs + outputs)
    layout = Layout(a, b, np.full(size, rank, np.int32), np.full(size, 2.0, np.float32))
    generator = torch.Generator().manual_seed(seed)
    return Image(torch.randn(offset, generator=generator), layout)


def taken(arena: Arena, image: Image) -> int:
    return -(-image.bytes // arena.alignment) * arena.alignment


def held(arena: Arena, slot: int, image: Image) -> bool:
    """True if the directory points at the image's bytes."""
    start = int(arena.directory.a_offset[slot, 0, 0])
    same = torch.equal(arena.memory[start : start + image.flat.numel()], image.flat)
    offsets = arena.directory.b_offset[slot] - image.layout.b_offset
    return same and bool((offsets == start).all())


def put(arena: Arena, slot: int, offset: int, image: Image) -> None:
    arena.copy_in(offset, image)
    arena.place(slot, offset, image.layout)


def test_capacity_is_cut_to_the_alignment(shape: ModelShape) -> None:
    arena = Arena(shape, 1000, 4, torch.bfloat16)
    assert arena.capacity_bytes == 768
    assert arena.memory.numel() == 384


def test_the_base_slot_has_no_weights_and_takes_none(shape: ModelShape) -> None:
    arena = Arena(shape, 2**20, 4, torch.float32)
    assert not arena.directory.rank.any()
    with pytest.raises(AssertionError, match="slot 0"):
        arena.place(0, 0, image_of(shape, 1, 0).layout)


@pytest.mark.parametrize("step", [256, 512, 4096, 2**17])
@pytest.mark.parametrize("down", [True, False])
def test_a_slide_may_overlap_itself(
    step: int, down: bool, shape: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "SLIDE_ELEMENTS", 1000)
    arena = Arena(shape, 2**19, 4, torch.float32)
    image = image_of(shape, 4, 1)
    source, target = (step, 0) if down else (0, step)
    put(arena, 1, source, image)
    generation = int(arena.directory.generation[1])
    arena.slide(1, source, target, taken(arena, image))
    assert held(arena, 1, image)
    assert int(arena.directory.a_offset[1, 0, 0]) * 4 == target
    assert int(arena.directory.generation[1]) > generation


def test_nothing_lands_on_a_placed_image(shape: ModelShape) -> None:
    arena = Arena(shape, 2**20, 4, torch.float32)
    image = image_of(shape, 4, 1)
    size = taken(arena, image)
    put(arena, 1, 0, image)
    put(arena, 2, size, image)
    for offset in (0, size - 256, size + 256):
        with pytest.raises(AssertionError, match="lands on"):
            arena.copy_in(offset, image)
        with pytest.raises(AssertionError, match="lands on"):
            arena.place(3, offset, image.layout)
    with pytest.raises(AssertionError, match="lands on"):
        arena.slide(2, size, size - 256, size)
    with pytest.raises(AssertionError, match="is taken"):
        arena.place(2, 2 * size, image.layout)
    with pytest.raises(AssertionError):
        arena.copy_in(arena.capacity_bytes - 256, image)
    assert held(arena, 1, image) and held(arena, 2, image)


def test_a_move_does_not_land_on_a_copy_in_flight(shape: ModelShape) -> None:
    arena = Arena(shape, 2**20, 4, torch.float32)
    image = image_of(shape, 4, 1)
    size = taken(arena, image)
    put(arena, 1, size, image)
    with arena.writing(0, image.bytes) as target:
        with pytest.raises(AssertionError, match="lands on"):
            arena.slide(1, size, 0, size)
        target.copy_(image.flat)
    arena.place(2, 0, image.layout)
    assert held(arena, 1, image) and held(arena, 2, image)


def test_a_cleared_slot_is_the_base_until_placed_again(shape: ModelShape) -> None:
    arena = Arena(shape, 2**20, 4, torch.float32)
    put(arena, 1, 0, image_of(shape, 4, 1))
    generation = int(arena.directory.generation[1])
    arena.clear(1)
    assert not arena.directory.rank[1].any()
    other = image_of(shape, 2, 2)
    put(arena, 1, 256, other)
    assert held(arena, 1, other)
    assert int(arena.directory.generation[1]) == generation + 2


def test_copies_on_other_threads(shape: ModelShape) -> None:
    arena = Arena(shape, 2**21, 8, torch.float32)
    images = [image_of(shape, 4, seed) for seed in range(4)]
    size = taken(arena, images[0])
    threads = [
        threading.Thread(target=arena.copy_in, args=(n * size, image))
        for n, image in enumerate(images)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for slot, image in enumerate(images, start=1):
        arena.place(slot, (slot - 1) * size, image.layout)
        assert held(arena, slot, image)


@pytest.mark.parametrize("seed", range(5))
def test_random_loads_moves_and_clears(seed: int, shape: ModelShape) -> None:
    """The seed is in the test's name. Images slide together, as in the engine."""
    choice = random.Random(seed)
    arena = Arena(shape, 400_000, 10, torch.float32)
    images: dict[int, tuple[int, Image]] = {}
    for step in range(80):
        if choice.random() < 0.5 or not images:
            image = image_of(shape, choice.randrange(1, 6), step)
            end = max((offset + taken(arena, i) for offset, i in images.values()), default=0)
            free = [slot for slot in range(1, 10) if slot not in images]
            if free and end + taken(arena, image) <= arena.capacity_bytes:
                slot = choice.choice(free)
                put(arena, slot, end, image)
                images[slot] = (end, image)
        else:
            slot = choice.choice(sorted(images))
            arena.clear(slot)
            del images[slot]
        if choice.random() < 0.3:
            end = 0
            for slot, (offset, image) in sorted(images.items(), key=lambda item: item[1][0]):
                arena.slide(slot, offset, end, taken(arena, image))
                images[slot] = (end, image)
                end += taken(arena, image)
        assert all(held(arena, slot, image) for slot, (_, image) in images.items())
