"""Checkpoints that contradict `config.json` are refused, naming the tensor or file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from cluster.errors import ModelUnsupported
from replica.model.shape import read_shape
from replica.model.weights import Weights, _PlainMatmul, linear, load_weights
from tests.models import edit_config, edit_tensors, make_model
from tests.packed import by_transformers

TENSORS = "model.safetensors"


def load(model_dir: str) -> Weights:
    return load_weights(model_dir, read_shape(model_dir), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("layers.1.mlp.up_proj.weight", None, "no tensor 'model.layers.1.mlp.up_proj.weight'"),
        ("lm_head.weight", None, "no tensor 'lm_head.weight'"),
        ("model.norm.weight", torch.ones(63), r"'model.norm.weight' has shape \(63,\)"),
        (
            "layers.0.self_attn.k_proj.weight",
            torch.ones(64, 64),
            r"k_proj.weight' has shape \(64, 64\), config.json says \(32, 64\)",
        ),
    ],
)
def test_a_missing_or_misshapen_tensor(
    suffix: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    model_dir = make_model(tmp_path)
    edit_tensors(model_dir, TENSORS, **{suffix: tensor})
    with pytest.raises(ModelUnsupported, match=message):
        load(model_dir)


def test_a_tensor_that_would_not_be_applied(tmp_path: Path) -> None:
    """Qwen2's biases with a config that says Llama."""
    model_dir = make_model(tmp_path, "qwen2")
    edit_config(model_dir, model_type="llama")
    with pytest.raises(ModelUnsupported, match=r"_proj\.bias' is not part of the architecture"):
        load(model_dir)


def test_a_head_that_differs_from_tied_embeddings_is_used_as_by_transformers(
    tmp_path: Path,
) -> None:
    model_dir = make_model(tmp_path)
    edit_config(model_dir, tie_word_embeddings=True)
    head = load_file(tmp_path / TENSORS)["lm_head.weight"]
    assert torch.equal(by_transformers(model_dir, None).lm_head.weight, head)
    assert torch.equal(load(model_dir).head(torch.eye(64)), head.T)


def test_a_copy_of_tied_embeddings_takes_no_memory(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / TENSORS)
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": copy}, tmp_path / TENSORS)
    weights = load(model_dir)
    assert isinstance(weights.head, _PlainMatmul)
    assert weights.head.weight.data_ptr() == weights.embeddings.data_ptr()


def test_tied_embeddings_that_are_stored_as_the_head(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / TENSORS)
    shared = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": shared}, tmp_path / TENSORS)
    weights = load(model_dir)
    assert torch.equal(weights.embeddings, shared)
    assert torch.equal(weights.head(torch.eye(64)), shared.T)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(ModelUnsupported, match=r"no model\.safetensors"):
        load(model_dir)


def test_weights_in_another_form(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path)
    (tmp_path / TENSORS).rename(tmp_path / "pytorch_model-00001-of-00002.bin")
    words = r"no model\.safetensors, but pytorch_model-00001-of-00002\.bin; load it with transf"
    with pytest.raises(ModelUnsupported, match=words):
        load(model_dir)


def test_a_missing_shard(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, shard_bytes=50_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelUnsupported, match=shard.name):
        load(model_dir)


@pytest.mark.parametrize("index", ["{", "[]", {"weight_map": []}, {}])
def test_a_broken_index(index: Any, tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, shard_bytes=50_000)
    text = index if isinstance(index, str) else json.dumps(index)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelUnsupported, match=r"index\.json"):
        load(model_dir)


def test_a_file_cut_short(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path)
    path = tmp_path / TENSORS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelUnsupported, match=r"model\.safetensors"):
        load(model_dir)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_weight_laid_out_anew_multiplies_the_same(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator).to(dtype)
    x = torch.randn(rows, 64, generator=generator).to(dtype)
    # Reordered sums of 64 products of size 1 differ by at most 64 roundings of 64 × 2 / π. The
    # result is rounded to a unit in the last place.
    order, rounding = 64 * 41 * torch.finfo(torch.float32).eps / 2, torch.finfo(dtype).eps
    with torch.inference_mode():
        torch.testing.assert_close(
            linear(weight)(x), F.linear(x, weight), rtol=rounding, atol=order
        )


def test_dummy_weights_need_no_files_and_are_the_same_by_seed(tmp_path: Path) -> None:
    path = Path(make_model(tmp_path, "qwen2"))
    for file in path.glob("*.safetensors"):
        file.unlink()
    shape, cpu = read_shape(str(path)), torch.device("cpu")

    def first(seed: int) -> torch.Tensor:
        weights = load_weights(str(path), shape, torch.float32, cpu, dummy_seed=seed)
        out = weights.layers[-1].matmuls[2](torch.ones(1, shape.hidden))
        assert out.isfinite().all() and out.abs().sum() > 0
        return out

    torch.testing.assert_close(first(3), first(3), atol=0, rtol=0)
    assert not torch.equal(first(3), first(4))
