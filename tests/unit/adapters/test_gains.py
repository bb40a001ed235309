"""DoRA in a mixed batch gives the log-probabilities of PEFT."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.adapter_paths import CONFIG_FILE, TENSORS_FILE
from cluster.config import FleetConfig
from cluster.errors import AdapterFailed, AdapterRefused
from replica.adapters import gains
from replica.adapters.adapter_files import inspect, read_adapter
from replica.adapters.image import read_image
from replica.adapters.validation import Validation
from replica.model.module_walk import walk
from replica.model.shape import Shape, Shard, read_shape
from tests.models import edit_config, edit_tensors, make_adapter, make_model
from tests.packed import DECODED, load, prompts, reference, run
from tests.small_files import settled_config

TOLERANCE = 1e-4
KINDS: tuple[dict[str, Any], ...] = (
    {"use_dora": True, "rank": 4},
    {"rank": 8, "targets": ("q_proj", "v_proj", "down_proj")},
    {"use_dora": True, "rank": 6, "targets": ("v_proj", "gate_proj"), "use_rslora": True},
    {"use_dora": True, "rank": 4, "rank_pattern": {"o_proj": 9}, "layers_to_transform": [1]},
)


def adapters_of(directory: Path, model_dir: str) -> list[str]:
    return [
        make_adapter(directory / f"adapter-{n}", model_dir, seed=n, **settings)
        for n, settings in enumerate(KINDS)
    ]


def check_mixed(
    model_dir: str, shape: Shape, adapters: Sequence[str], slots: Sequence[int]
) -> None:
    runner = load(model_dir, shape, adapters)
    texts = prompts(*range(17, 17 + 4 * len(slots), 4))
    expected = [
        reference(model_dir, adapters[slot - 1] if slot else None, text)
        for slot, text in zip(slots, texts, strict=True)
    ]
    for chunk in (1000, 7):
        found, _ = run(runner, texts, slots, chunk)
        for slot, own, theirs in zip(slots, found, expected, strict=True):
            difference = (own - theirs[-DECODED - 1 :]).abs().max().item()
            assert difference <= TOLERANCE, f"slot {slot}, chunk {chunk}"


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen3", {})],
)
def test_a_mixed_batch_is_what_peft_computes(
    architecture: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gains._ELEMENTS, "cpu", 1000)  # several pieces a matrix
    model_dir = make_model(tmp_path / "model", architecture, **settings)
    adapters = adapters_of(tmp_path, model_dir)
    check_mixed(model_dir, read_shape(model_dir), adapters, [0, 1, 2, 3, 4, 1])


@pytest.mark.parametrize(
    ("architecture", "targets", "settings"),
    [
        ("gpt2", ("c_attn", "c_proj"), {}),  # with biases, and weights the other way round
        ("gemma2", ("q_proj", "o_proj", "up_proj"), {"sliding_window": 8}),
    ],
)
def test_a_model_of_transformers(
    architecture: str, targets: tuple[str, ...], settings: dict[str, Any], tmp_path: Path
) -> None:
    model_dir = make_model(tmp_path / "model", architecture, **settings)
    stored = {"fan_in_fan_out": architecture == "gpt2"}
    adapters = [
        make_adapter(
            tmp_path / f"{n}", model_dir, rank=4, targets=targets, use_dora=n == 1, **stored
        )
        for n in (1, 2)
    ]
    check_mixed(model_dir, walk(model_dir), adapters, [0, 1, 2, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gain_is_kept_more_exactly_than_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", initializer_range=0.3)
    shape = read_shape(model_dir)
    (path, *_) = adapters_of(tmp_path, model_dir)
    base = load(model_dir, shape).model
    exact, rounded = (read_image(path, shape, kind, base=base) for kind in (torch.float32, dtype))
    assert exact.layout.gain_offset is not None
    start = int(exact.layout.gain_offset[0, 0])
    assert 2 * sum(outputs for _, outputs in shape.projections.values()) * shape.layers == (
        len(exact.flat) - start
    )
    found, wanted = (
        image.flat[start : start + 128].view(2, 64).float().sum(0) for image in (rounded, exact)
    )
    assert (wanted - 1).abs().max() > 0.1
    # A and B are rounded, the norm of W + B · A hardly changes.
    torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps / 4, atol=0)


def test_the_size_that_is_registered_is_that_of_the_image(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model")
    shape = read_shape(model_dir)
    base = load(model_dir, shape).model
    for path in adapters_of(tmp_path, model_dir):
        image = read_image(path, shape, torch.bfloat16, base=base)
        assert inspect(path, shape, 64).parameters == len(image.flat)


def test_what_is_refused(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model")
    shape = read_shape(model_dir)
    path = make_adapter(tmp_path / "a", model_dir, use_dora=True)
    plain = make_adapter(tmp_path / "b", model_dir)
    edit_config(plain, CONFIG_FILE, use_dora=True)
    with pytest.raises(AdapterRefused, match="has no lora_magnitude_vector, but use_dora = True"):
        read_adapter(plain, shape)
    with pytest.raises(AdapterFailed, match="DoRA needs the whole model"):
        read_image(path, shape, torch.float32, shard=Shard(0, 2))
    config = FleetConfig(
        settled_config(model_dir, tensor_parallel=2), directory=str(tmp_path / "fleet")
    )
    with (
        Validation(config, shape).adding() as adding,
        pytest.raises(AdapterRefused, match="DoRA is not supported with tensor_parallel"),
    ):
        adding.version("a", path, trusted=True)
    edit_config(path, CONFIG_FILE, use_dora=False)
    with pytest.raises(AdapterRefused, match="has a lora_magnitude_vector, but use_dora = False"):
        read_adapter(path, shape)
    edit_config(path, CONFIG_FILE, use_dora=True)
    name = "layers.1.mlp.up_proj.lora_magnitude_vector"
    edit_tensors(path, TENSORS_FILE, **{name: torch.ones(95)})
    with pytest.raises(AdapterRefused, match=r"lora_magnitude_vector has shape \[95\]"):
        read_adapter(path, shape)


def test_dora_of_embedding_or_head_is_refused(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model")
    saving = {"save_embedding_layers": False}
    path = make_adapter(
        tmp_path / "a", model_dir, targets=("q_proj", "lm_head"), use_dora=True, saving=saving
    )
    with pytest.raises(AdapterRefused, match=r"lm_head in .*: DoRA is not supported there"):
        read_adapter(path, read_shape(model_dir))


def test_a_row_of_zeros_fails_the_load(tmp_path: Path) -> None:
    """Its norm is 0, and PEFT would divide by it."""
    model_dir = make_model(tmp_path / "model")
    path = make_adapter(tmp_path / "a", model_dir, targets=("v_proj",), use_dora=True)
    for directory, file in ((model_dir, "model.safetensors"), (path, TENSORS_FILE)):
        tensors = load_file(Path(directory) / file)
        for name in (n for n in tensors if "layers.1.self_attn.v_proj" in n and "lora_A" not in n):
            if tensors[name].dim() == 2:
                tensors[name][3] = 0.0
        save_file(tensors, Path(directory) / file, {"format": "pt"})
    shape = read_shape(model_dir)
    with pytest.raises(AdapterFailed, match="layer 1 v_proj has a gain that is not finite"):
        read_image(path, shape, torch.float32, base=load(model_dir, shape).model)
