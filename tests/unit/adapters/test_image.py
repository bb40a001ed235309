"""An image has each projection's matrices at the layout's offsets, with their rank and scale."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import AdapterFailed
from replica.adapters import image as image_module
from replica.adapters.adapter_files import TENSORS_FILE, read_adapter
from replica.adapters.image import PIECE_ELEMENTS, Image, read_image
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
def test_conversion_rounds_as_torch_does(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    shape = read_shape(model)
    path = make_adapter(tmp_path / "adapter", model, rank=8)
    expected = read_image(path, shape, torch.float32).flat.to(dtype)
    assert torch.equal(read_image(path, shape, dtype).flat, expected)
    monkeypatch.setattr(image_module, "PIECE_ELEMENTS", 100)
    assert torch.equal(read_image(path, shape, dtype).flat, expected), "pieces do not join"


def test_a_value_too_large_for_the_device_dtype(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    path = make_adapter(tmp_path / "adapter", model, rank=4, strength=1e5)
    read_image(path, read_shape(model), torch.bfloat16)
    with pytest.raises(AdapterFailed, match="not finite in float16"):
        read_image(path, read_shape(model), torch.float16)


def test_a_load_works_in_pieces_too_small_for_the_pool() -> None:
    """ATen uses its thread pool for operations on 32,768 elements or more."""
    assert PIECE_ELEMENTS < 32_768


@pytest.mark.parametrize("piece", [PIECE_ELEMENTS, 100, 7])
def test_images_of_the_ranks_side_by_side_are_the_whole_one(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    shape = read_shape(model)
    path = make_adapter(tmp_path / "adapter", model, rank=3, rank_pattern={"down_proj": 5})
    whole = read_image(path, shape, torch.float32)
    monkeypatch.setattr(image_module, "PIECE_ELEMENTS", piece)
    parts = [read_image(path, shape, torch.float32, shard=Shard(rank, 2)) for rank in range(2)]
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
    assert [part.digest for part in parts] == [whole.digest] * 2
    assert [part.bytes for part in parts] == [
        read_adapter(path, shape).parameters_of(shape.divided(2)) * 4
    ] * 2


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
