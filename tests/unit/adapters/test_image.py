"""An image has each projection's matrices at the layout's offsets, with their rank and scale."""

import itertools
import math
import os
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.adapter_paths import TENSORS_FILE
from cluster.errors import AdapterFailed
from replica.adapters import image as image_module
from replica.adapters.adapter_files import read_adapter
from replica.adapters.image import CHUNK_BYTES, Image, read_image
from replica.model.shape import PROJECTIONS, ROW_PARALLEL, Shard, read_shape
from tests.models import edit_tensors, make_adapter, make_model

PREFIX = "base_model.model.model"


def test_ranks_scales_and_offsets_of_a_patterned_adapter(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    shape = read_shape(model)
    path = make_adapter(
        tmp_path / "adapter",
        model,
        rank=4,
        alpha=6,
        targets=("q_proj", "k_proj", "down_proj"),
        use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 9, "down_proj": 2},
        alpha_pattern={r".*\.2\..*k_proj": 30},
    )
    image = read_image(path, shape, torch.float32)
    layout, tensors = image.layout, load_file(Path(path) / TENSORS_FILE)
    assert image.bytes == image.flat.numel() * 4 == sum(t.numel() for t in tensors.values()) * 4
    wanted = {"q_proj": [4, 9, 4], "k_proj": [4, 4, 4], "down_proj": [2, 2, 2]}
    alphas = {"q_proj": [6, 6, 6], "k_proj": [6, 6, 30], "down_proj": [6, 6, 6]}
    end = 0
    for layer in range(shape.layers):
        for index, (name, (inputs, outputs)) in enumerate(shape.projections.items()):
            rank = int(layout.rank[layer, index])
            if name not in wanted:
                assert rank == 0
                continue
            assert rank == wanted[name][layer]
            scale = alphas[name][layer] / math.sqrt(rank)
            assert layout.scale[layer, index] == pytest.approx(scale)
            block = "mlp" if name == "down_proj" else "self_attn"
            stem = f"{PREFIX}.layers.{layer}.{block}.{name}"
            a, b = int(layout.a_offset[layer, index]), int(layout.b_offset[layer, index])
            assert (a, b) == (end, end + rank * inputs), "images have no holes"
            end = b + rank * outputs
            found = image.flat[a : a + rank * inputs].view(rank, inputs)
            assert torch.equal(found, tensors[f"{stem}.lora_A.weight"])
            found = image.flat[b:end].view(outputs, rank)
            assert torch.equal(found, tensors[f"{stem}.lora_B.weight"])
    assert len(PROJECTIONS) == layout.rank.shape[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_rounds_as_torch_does(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    shape = read_shape(model)
    path = make_adapter(tmp_path / "adapter", model, rank=8)
    expected = read_image(path, shape, torch.float32).flat.to(dtype)
    for chunk_bytes in (CHUNK_BYTES, 10_000, 1):
        image = read_image(path, shape, dtype, chunk_bytes=chunk_bytes)
        assert torch.equal(image.flat, expected), f"chunks of {chunk_bytes} bytes do not join"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_may_be_stored_in_different_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    path = make_adapter(tmp_path / "adapter", model, rank=8)
    shape = read_shape(model)
    tensors = load_file(Path(path) / TENSORS_FILE)
    kinds = itertools.cycle((torch.float32, torch.bfloat16, torch.bfloat16))
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(rounded, Path(path) / TENSORS_FILE)
    expected = read_image(path, shape, dtype).flat
    mixed = {n: t.to(kind) for (n, t), kind in zip(rounded.items(), kinds, strict=False)}
    save_file(mixed, Path(path) / TENSORS_FILE)
    assert torch.equal(read_image(path, shape, dtype).flat, expected)


class Reads:
    """`os.preadv`, counted, that reads at most `most` bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int | None = None) -> None:
        self._preadv, self._most = os.preadv, most
        self.calls: list[list[memoryview]] = []
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        self.calls.append(buffers)
        if self._most is None:
            return self._preadv(descriptor, buffers, offset)
        cut, left = [], self._most
        for buffer in buffers:
            cut.append(buffer[:left])
            left -= len(cut[-1])
        return self._preadv(descriptor, cut, offset)


def test_a_file_is_read_into_its_image_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    path = make_adapter(tmp_path / "adapter", model, rank=8)
    reads = Reads(monkeypatch)
    into = torch.empty(2**20)
    image = read_image(path, read_shape(model), torch.float32, into=into)
    ((*buffers,),) = reads.calls
    assert sum(map(len, buffers)) == image.bytes
    first = min(numpy.frombuffer(buffer, numpy.uint8).ctypes.data for buffer in buffers)
    assert first == into.data_ptr(), "not through a buffer"
    (Path(path) / TENSORS_FILE).unlink()
    assert image.flat.data_ptr() == into.data_ptr()


@pytest.mark.parametrize("most", [1, 999, 5000])
def test_short_reads_go_on_where_they_ended(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model", num_hidden_layers=1, hidden_size=16)
    path = make_adapter(tmp_path / "adapter", model, rank=2)
    shape = read_shape(model)
    expected = read_image(path, shape, torch.float32).flat
    monkeypatch.setattr(image_module, "_BUFFERS_MAX", 3)
    reads = Reads(monkeypatch, most)
    assert torch.equal(read_image(path, shape, torch.float32).flat, expected)
    assert max(map(len, reads.calls)) <= 3


def test_a_file_that_is_cut_off_meanwhile_fails_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    path = make_adapter(tmp_path / "adapter", model)
    Reads(monkeypatch, 0)
    with pytest.raises(AdapterFailed, match="ended early"):
        read_image(path, read_shape(model), torch.float32)


def test_a_value_too_large_for_the_device_dtype(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    path = make_adapter(tmp_path / "adapter", model, rank=4, strength=1e5)
    read_image(path, read_shape(model), torch.bfloat16)
    with pytest.raises(AdapterFailed, match="not finite in float16"):
        read_image(path, read_shape(model), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 2000, 1])
def test_images_of_the_ranks_side_by_side_are_the_whole_one(
    chunk_bytes: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    shape = read_shape(model)
    path = make_adapter(tmp_path / "adapter", model, rank=3, rank_pattern={"down_proj": 5})
    whole = read_image(path, shape, dtype)
    parts = [
        read_image(path, shape, dtype, shard=Shard(rank, 2), chunk_bytes=chunk_bytes)
        for rank in range(2)
    ]
    sizes = shape.divided(2).projections
    for layer in range(shape.layers):
        for index, name in enumerate(PROJECTIONS):
            a, b = _matrices(whole, layer, index, shape.projections[name])
            own = [_matrices(part, layer, index, sizes[name]) for part in parts]
            if name in ROW_PARALLEL:
                assert torch.equal(torch.cat([part[0] for part in own], 1), a)
                assert all(torch.equal(part[1], b) for part in own)
            else:
                assert all(torch.equal(part[0], a) for part in own)
                assert torch.equal(torch.cat([part[1] for part in own]), b)
    parameters = read_adapter(path, shape).parameters_of(shape.divided(2))
    assert [part.bytes for part in parts] == [parameters * dtype.itemsize] * 2


def _matrices(
    image: Image, layer: int, index: int, sizes: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    layout, (inputs, outputs) = image.layout, sizes
    rank = int(layout.rank[layer, index])
    a, b = int(layout.a_offset[layer, index]), int(layout.b_offset[layer, index])
    return (
        image.flat[a : a + rank * inputs].view(rank, inputs),
        image.flat[b : b + rank * outputs].view(outputs, rank),
    )


def test_a_value_that_is_not_finite_is_found_by_the_rank_that_would_use_it(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    shape = read_shape(model)
    path = make_adapter(tmp_path / "adapter", model, rank=4)
    name = f"{PREFIX}.layers.2.self_attn.o_proj.lora_A.weight"
    broken = load_file(Path(path) / TENSORS_FILE)[name]
    broken[1, -1] = float("inf")
    edit_tensors(path, TENSORS_FILE, **{name: broken})
    read_image(path, shape, torch.float32, shard=Shard(0, 2))
    with pytest.raises(AdapterFailed, match=r"layer 2 o_proj .* not finite"):
        read_image(path, shape, torch.float32, shard=Shard(1, 2))
