"""Copies during batches, on a device that lags: a forward reads the bytes that were placed when it
was queued, and host memory is not overwritten while it is read.
"""

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.values import Tier
from replica.adapters import arena as arena_module
from replica.adapters import host_pool
from replica.adapters.adapter_files import inspect
from replica.adapters.arena import Arena
from replica.adapters.host_pool import HostPool, locked_pool
from replica.adapters.image import Image, read_image
from replica.adapters.loader import Loader
from replica.adapters.streams import CopyStream
from replica.model.shape import ModelShape, read_shape
from replica.scheduling.adapter import Load
from tests.late import LateDevice, LateStream
from tests.models import make_adapter, make_model
from tests.unit.adapters.test_arena import held, image_of, put, taken
from tests.until import until


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("streams") / "model")


@pytest.fixture(scope="module")
def shape(model_dir: str) -> ModelShape:
    return read_shape(model_dir)


def late_arena(
    shape: ModelShape,
    device: LateDevice,
    staging: int = 4096,
    pool: HostPool | None = None,
    capacity: int = 2**20,
) -> Arena:
    copies = device.copy_stream(staging)
    return Arena(shape, capacity, 10, torch.float32, copies=copies, host_pool=pool)


def forward(device: LateDevice, arena: Arena, slot: int, image: Image) -> Callable[[], bool]:
    """Queues a forward that reads the slot. The result tells if it read that image."""
    start = int(arena.directory.a_offset[slot, 0, 0])
    seen: list[bool] = []
    span = arena.memory[start : start + image.flat.numel()]
    device.compute.do(lambda: seen.append(torch.equal(span, image.flat)))
    return lambda: seen == [True]


def locked(image: Image, pool: HostPool) -> Image:
    piece = pool.take(image.bytes)
    assert piece is not None
    flat = piece.memory.view(image.flat.dtype)
    flat.copy_(image.flat)
    return Image(flat, image.layout, piece=piece)


@pytest.mark.parametrize("through_staging", [False, True])
def test_a_copy_waits_for_the_forward_that_reads_what_lay_there(
    shape: ModelShape, through_staging: bool
) -> None:
    device = LateDevice()
    pool = HostPool(device.lock(2**20))
    arena = late_arena(shape, device)
    old, new = image_of(shape, 4, 1), image_of(shape, 4, 2)
    put(arena, 1, 0, old)
    saw_old = forward(device, arena, 1, old)
    arena.clear(1)
    put(arena, 2, 0, new if through_staging else locked(new, pool))
    saw_new = forward(device, arena, 2, new)
    device.run()
    assert saw_old() and saw_new() and held(arena, 2, new)


def test_a_copy_waits_for_the_slide_of_what_lay_there(
    shape: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "QUEUED_SLIDE_ELEMENTS", 1000)
    device = LateDevice()
    arena = late_arena(shape, device)
    images = [image_of(shape, 3, seed) for seed in range(3)]
    size = taken(arena, images[0])
    put(arena, 1, 512, images[0])
    put(arena, 2, size + 512, images[1])
    before = forward(device, arena, 1, images[0])
    arena.slide(1, 512, 0, size)
    after = forward(device, arena, 1, images[0])
    arena.slide(2, size + 512, size, size)
    put(arena, 3, 2 * size, images[2])
    seen = [forward(device, arena, slot, images[slot - 1]) for slot in (1, 2, 3)]
    device.run()
    assert before() and after() and all(saw() for saw in seen)


def test_a_copy_into_bytes_that_nothing_used_waits_for_nothing(shape: ModelShape) -> None:
    device = LateDevice(lambda device: (device.copies,))
    arena = late_arena(shape, device)
    old, new = image_of(shape, 4, 1), image_of(shape, 4, 2)
    device.compute.do(lambda: None)
    arena.guard(0, taken(arena, old))
    put(arena, 1, taken(arena, old), new)
    assert device.compute.work, "forwards stand still all the while"
    assert held(arena, 1, new)


def test_a_forward_waits_for_its_image(shape: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a load was reported too early."""
    monkeypatch.setattr("tests.late.LateEvent.synchronize", lambda event: None)
    device = LateDevice(lambda device: (device.compute, device.copies))
    arena = late_arena(shape, device, staging=2**20)
    image = image_of(shape, 4, 1)
    put(arena, 1, 0, image)
    saw = forward(device, arena, 1, image)
    device.run()
    assert saw()


def test_staging_is_not_filled_anew_before_it_is_read(shape: ModelShape) -> None:
    device = LateDevice()
    arena = late_arena(shape, device, staging=512)
    images = [image_of(shape, 2, seed) for seed in range(2)]
    for slot, image in enumerate(images, start=1):
        put(arena, slot, (slot - 1) * taken(arena, image), image)
    device.run()
    assert all(held(arena, slot, image) for slot, image in enumerate(images, start=1))


class Loads:
    """Adapters on disk, and a loader with locked memory for one image."""

    def __init__(self, directory: Path, model_dir: str, shape: ModelShape) -> None:
        paths = [make_adapter(directory / f"{n}", model_dir, rank=4, seed=n) for n in range(2)]
        infos = [inspect(path, shape, 16) for path in paths]
        self.size = infos[0].parameters * 4
        self.device = LateDevice()
        aligned = -(-self.size // 256) * 256
        self.pool = HostPool(self.device.lock(aligned))
        self.arena = late_arena(shape, self.device, pool=self.pool)
        self.woken = 0
        self.loader = Loader(shape, torch.float32, self.arena, 16, 2, self._wake, busy=lambda: True)
        self.images = [read_image(path, shape, torch.float32) for path in paths]
        self.loads = [
            Load(info.digest, path, n + 1, n * aligned, aligned, Tier.DISK)
            for n, (info, path) in enumerate(zip(infos, paths, strict=True))
        ]

    def _wake(self) -> None:
        self.woken += 1

    def arrived(self, n: int) -> bool:
        start = self.loads[n].offset // 4
        flat = self.images[n].flat
        return torch.equal(self.arena.memory[start : start + len(flat)], flat)


@pytest.fixture
def loads(tmp_path: Path, model_dir: str, shape: ModelShape) -> Loads:
    return Loads(tmp_path, model_dir, shape)


def test_locked_memory_is_not_filled_anew_before_it_is_read(loads: Loads) -> None:
    """The first image is dropped, and the second is read into the same memory."""
    for load in loads.loads:
        assert loads.pool.fits(loads.size)
        ended = loads.loader.run(load, None, keep=True)
        assert ended.error is None and ended.image is not None
        assert ended.image.piece is not None and not loads.pool.fits(loads.size)
        del ended
    loads.device.run()
    assert loads.arrived(0) and loads.arrived(1)
    loads.loader.close()


async def test_a_load_ends_when_its_bytes_are_there(loads: Loads) -> None:
    loads.device.turn(lambda device: (device.compute,))
    loads.loader.begin(loads.loads[0], None, keep=True)
    # Two pieces with an event each: other copies need not wait for the whole image.
    await until(lambda: len(loads.device.copies.work) == 4)
    assert loads.loader.ended() == [] and not loads.woken and not loads.pool.fits(loads.size)
    loads.device.turn(lambda device: (device.copies,))
    await until(lambda: loads.woken == 1)
    (ended,) = loads.loader.ended()
    assert loads.arrived(0) and ended.image is not None and ended.image.piece is not None
    loads.loader.close()


def test_without_locked_memory_an_image_is_kept_all_the_same(loads: Loads) -> None:
    first = loads.loader.run(loads.loads[0], None, keep=True)
    second = loads.loader.run(loads.loads[1], None, keep=True)
    assert first.image is not None and second.image is not None and second.image.piece is None
    assert loads.arrived(0) and loads.arrived(1)
    loads.loader.close()


def churn(
    shape: ModelShape,
    choice: random.Random,
    arena: Arena,
    pool: HostPool,
    look: Callable[[int, Image], None],
) -> None:
    """Random loads from locked and unlocked memory, moves, clears, and forwards that check."""
    images: dict[int, tuple[int, Image]] = {}
    for step in range(150):
        end = max((offset + taken(arena, i) for offset, i in images.values()), default=0)
        match choice.randrange(5):
            case 0 | 1:
                image = image_of(shape, choice.randrange(1, 4), step)
                free = [slot for slot in range(1, 10) if slot not in images]
                if free and end + taken(arena, image) <= arena.capacity_bytes:
                    slot = choice.choice(free)
                    source = locked(image, pool) if pool.fits(image.bytes) else image
                    put(arena, slot, end, source)
                    if source is not image:
                        source.flat.fill_(float("nan"))
                    images[slot] = (end, image)
            case 2 if images:
                slot = choice.choice(sorted(images))
                arena.clear(slot)
                del images[slot]
            case 3:
                end = 0
                for slot, (offset, image) in sorted(images.items(), key=lambda item: item[1][0]):
                    arena.slide(slot, offset, end, taken(arena, image))
                    images[slot] = (end, image)
                    end += taken(arena, image)
            case _:
                for slot, (_, image) in images.items():
                    look(slot, image)
    pool.check()


@pytest.mark.parametrize("seed", range(6))
def test_random_loads_moves_clears_and_forwards(
    seed: int, shape: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seed is in the test's name. Each forward reads the images that it was queued with."""
    monkeypatch.setattr(arena_module, "QUEUED_SLIDE_ELEMENTS", 1000)
    choice = random.Random(seed)

    def any_order(device: LateDevice) -> list[LateStream]:
        return choice.sample([device.compute, device.copies], 2)

    device = LateDevice(any_order)
    pool = HostPool(device.lock(150_000))
    arena = late_arena(shape, device, staging=2048, capacity=300_032)
    forwards: list[Callable[[], bool]] = []
    churn(
        shape,
        choice,
        arena,
        pool,
        lambda slot, image: forwards.append(forward(device, arena, slot, image)),
    )
    device.run()
    assert len(forwards) > 50 and all(saw() for saw in forwards)


class Cudart:
    """Locks pages up to a limit."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked: list[int] = []
        self.locked: set[int] = set()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.asked.append(size)
        if size > self.most:
            return 2
        self.locked.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.locked.remove(address)
        return 0


@pytest.mark.parametrize(
    ("most", "given", "asked"),
    [
        (800, 800, [800]),
        (399, 200, [800, 400, 200]),
        (99, None, [800, 400, 200, 100]),
    ],
)
def test_as_many_pages_are_locked_as_the_system_allows(
    most: int,
    given: int | None,
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cudart = Cudart(most)
    monkeypatch.setattr(host_pool, "_cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    pool = locked_pool(800, torch.device("cpu"))
    assert cudart.asked == asked
    assert (None if pool is None else pool.size) == given
    assert len(cudart.locked) == (given is not None)
    assert ("host_memory: " in caplog.text) == (given != 800)
    del pool
    assert not cudart.locked


def test_no_pages_are_locked_when_none_are_wanted() -> None:
    assert locked_pool(0, torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_random_loads_beside_the_forwards_of_a_gpu(
    seed: int, shape: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each forward takes about a millisecond, so copies arrive while forwards are queued."""
    monkeypatch.setattr(arena_module, "QUEUED_SLIDE_ELEMENTS", 1000)
    device = torch.device("cuda")
    pool = locked_pool(150_000, device)
    assert pool is not None
    copies = CopyStream.on(device)
    arena = Arena(shape, 300_032, 10, torch.float32, device, copies=copies, host_pool=pool)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(slot: int, image: Image) -> None:
        torch.cuda._sleep(1_500_000)
        start = int(arena.directory.a_offset[slot, 0, 0])
        seen.append((arena.memory[start : start + image.flat.numel()].clone(), image.flat))

    churn(shape, random.Random(seed), arena, pool, look)
    torch.cuda.synchronize()
    assert len(seen) > 50 and all(torch.equal(found.cpu(), wanted) for found, wanted in seen)
