"""Which PEFT files are accepted, and that all others are refused by name."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.adapter_paths import CONFIG_FILE, TENSORS_FILE
from cluster.errors import AdapterFailed, AdapterRefused
from replica.adapters import adapter_files
from replica.adapters.adapter_files import AdapterFiles, inspect, read_adapter
from replica.adapters.image import read_image
from replica.adapters.safetensors_header import HEADER_BYTES_MAX
from replica.model.shape import ModelShape, read_shape
from tests.models import edit_config, edit_tensors, make_adapter, make_model

RANK_MAX = 64
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and an adapter, made once because transformers and PEFT are slow."""
    directory = tmp_path_factory.mktemp("adapter-files")
    model = make_model(directory / "model")
    make_adapter(directory / "adapter", model, rank=8)
    return directory


@pytest.fixture
def shape(written: Path) -> ModelShape:
    return read_shape(str(written / "model"))


@pytest.fixture
def adapter(written: Path, tmp_path: Path) -> Path:
    """A copy that the test may modify."""
    return Path(shutil.copytree(written / "adapter", tmp_path / "adapter"))


def refusal(path: Path | str, shape: ModelShape) -> str:
    with pytest.raises(AdapterRefused) as caught:
        inspect(str(path), shape, RANK_MAX)
    assert caught.value.field == "lora_path"
    return caught.value.message


def rewrite(adapter: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (adapter / TENSORS_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_what_peft_saved_is_accepted(adapter: Path, shape: ModelShape) -> None:
    info = inspect(str(adapter), shape, RANK_MAX)
    tensors = load_file(adapter / TENSORS_FILE)
    assert info.rank == 8
    assert info.parameters == sum(tensor.numel() for tensor in tensors.values())


def test_the_digest_names_the_content_alone(adapter: Path, shape: ModelShape) -> None:
    def digest() -> str:
        return inspect(str(adapter), shape, RANK_MAX).digest

    first = digest()
    edit_config(adapter, CONFIG_FILE, base_model_name_or_path="elsewhere", lora_dropout=0.3)
    assert digest() == first
    edit_config(adapter, CONFIG_FILE, lora_alpha=17)
    second = digest()
    assert second != first
    edit_tensors(
        adapter, TENSORS_FILE, **{"layers.0.self_attn.q_proj.lora_A.weight": torch.ones(8, 64)}
    )
    assert digest() not in (first, second)


def test_adapters_of_one_recipe_are_checked_once_each_under_its_own_path(
    adapter: Path, shape: ModelShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    check = adapter_files._checked

    def counted(*args: Any) -> AdapterFiles:
        checked.append(args[-1])
        return check(*args)

    monkeypatch.setattr(adapter_files, "_checked", counted)
    monkeypatch.setattr(adapter_files, "_known", {})
    twin = Path(shutil.copytree(adapter, tmp_path / "twin"))
    first, second = (read_adapter(str(each), shape) for each in (adapter, twin))
    assert first.pairs is second.pairs and len(checked) == 1
    assert second.tensors_path == str(twin / TENSORS_FILE)
    edit_config(twin, CONFIG_FILE, lora_alpha=17)
    assert read_adapter(str(twin), shape).pairs != first.pairs
    edit_tensors(
        twin, TENSORS_FILE, **{"layers.0.self_attn.q_proj.lora_A.weight": torch.ones(9, 64)}
    )
    for _ in range(2):
        assert str(twin) in refusal(twin, shape)
    assert str(adapter) not in refusal(twin, shape)


def test_what_is_known_is_bounded_and_of_one_model(
    adapter: Path, shape: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_files, "_known", {})
    for alpha in range(1, 40):
        edit_config(adapter, CONFIG_FILE, lora_alpha=alpha)
        read_adapter(str(adapter), shape)
    assert len(adapter_files._known) == adapter_files._KNOWN_MAX
    assert f'"lora_alpha": {alpha}'.encode() in list(adapter_files._known)[-1][0]
    other = dataclasses.replace(shape, layers=1)
    assert "layers.1." in refusal(adapter, other)


def test_the_order_of_patterns_decides(adapter: Path, shape: ModelShape) -> None:
    scales = []
    for names in (("q_proj", "self_attn.q_proj"), ("self_attn.q_proj", "q_proj")):
        values = {name: 8 + 8 * i for i, name in enumerate(names)}
        edit_config(adapter, CONFIG_FILE, alpha_pattern=values)
        scales.append(read_adapter(str(adapter), shape).pairs[0, "q_proj"].scale)
    assert scales == [1.0, 1.0]
    edit_config(adapter, CONFIG_FILE, alpha_pattern={"proj": 99})
    assert read_adapter(str(adapter), shape).pairs[0, "q_proj"].scale == 2.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": None}, "peft_type None"),
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "some"}, "bias = 'some'"),
        ({"modules_to_save": ["score"]}, "modules_to_save = ['score'] is not supported"),
        ({"modules_to_save": "lm_head"}, "modules_to_save = 'lm_head' is not supported"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens = [] are no 1 to 1024 tokens"),
        ({"alora_invocation_tokens": [1, True]}, "alora_invocation_tokens = [1, True] are no"),
        ({"alora_invocation_tokens": [1, 320]}, "320 is none of the model's 320 tokens"),
        (
            {"alora_invocation_tokens": [1], "use_dora": True},
            "alora_invocation_tokens with use_dora",
        ),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        (
            {"target_parameters": ["x"]},
            "target_parameters = ['x'] is not supported: a mixture's experts and routers",
        ),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"invented_tomorrow": {"on": True}}, "invented_tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"r": 0}, "r = 0"),
        ({"r": "8"}, "r = '8'"),
        ({"r": True}, "r = True"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"use_rslora": 1}, "use_rslora = 1"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern['q_proj'] = 1.5"),
        ({"alpha_pattern": {"(": 2}}, "missing ): ("),
        ({"alpha_pattern": {"(?=a)b": 2}}, "(?= is not supported"),
        ({"target_modules": "((.*)*)*x"}, "does not target it"),
        ({"target_modules": "(.?)" * 60 + "Z"}, "does not target it"),
        ({"target_modules": "q" * 5000}, "it has 5000 characters"),
        ({"target_modules": ".{1000}{1000}"}, "cannot be matched in linear time"),
        ({"target_modules": "\ud800"}, "cannot be matched in linear time"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": ["k_proj"]}, "does not target it"),
        ({"exclude_modules": ["o_proj"]}, "does not target it"),
        ({"layers_to_transform": [1]}, "does not target it"),
        ({"layers_to_transform": [0, 1, 2], "layers_pattern": "h"}, "does not target it"),
        ({"layers_to_transform": [0], "layers_pattern": [".*"]}, "is neither a word nor a list"),
        ({"layers_pattern": "layers"}, "layers_to_transform is not"),
        ({"layers_to_transform": 0, "target_modules": ".*"}, "target_modules as a string"),
        ({"layers_pattern": 5, "layers_to_transform": 0}, "layers_pattern = 5"),
        ({"r": 16}, "lora_A has shape [8, 64], the model and the config need [16, 64]"),
        ({"rank_pattern": {"v_proj": 4}}, "need [4, 64]"),
    ],
    ids=str,
)
def test_a_configuration_that_would_be_served_wrongly(
    fields: dict[str, Any], words: str, adapter: Path, shape: ModelShape
) -> None:
    edit_config(adapter, CONFIG_FILE, **fields)
    message = refusal(adapter, shape)
    assert words in message and str(adapter) in message


def test_rank_over_the_maximum_names_both(adapter: Path, shape: ModelShape) -> None:
    with pytest.raises(AdapterRefused, match="rank 8, the maximum is 4; start with --rank-max 8"):
        inspect(str(adapter), shape, 4)


def test_an_adapter_of_another_model(adapter: Path, tmp_path: Path) -> None:
    wide = read_shape(make_model(tmp_path / "wide", hidden_size=128, num_hidden_layers=2))
    message = refusal(adapter, wide)
    assert "the model has only 2 layers" in message
    wide = read_shape(make_model(tmp_path / "wide", hidden_size=128))
    assert "[8, 64], the model and the config need [8, 128]" in refusal(adapter, wide)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base_model.model.lm_head.lora_A.weight", "lm_head in"),
        ("base_model.model.lm_head.lora_A.weight", "does not target it"),
        ("base_model.model.lm_head.lora_embedding_A", "lm_head.lora_embedding_A"),
        ("base_model.model.lm_head.weight", "a whole weight that"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "does not target it"),
        ("base_model.model.model.embed_tokens.lora_A.weight", "embed_tokens.lora_A.weight"),
        (f"{Q0}.base_layer.bias", "a trained bias is not supported"),
        (Q0.removeprefix("base_model.model.") + ".lora_A.weight", "lacks PEFT's prefix"),
        (Q0.removeprefix("base_model.model.model.") + ".lora_A.weight", "lacks PEFT's prefix"),
        (Q0.replace("model.model.", "model.") + ".lora_A.weight", "the model without its head"),
        ("base_model.model.model.layers.0.mlp.experts.0.w1.lora_A.weight", "a mixture's experts"),
        ("base_model.model.model.layers.0.mlp.gate.lora_A.weight", "experts and routers take no"),
        (f"{Q0}.lora_magnitude_vector", "has a lora_magnitude_vector, but use_dora = False"),
        (f"{Q0}.lora_B.bias", "lora_B.bias"),
        ("base_model.model.model.layers.0.mlp.q_proj.lora_A.weight", "mlp.q_proj"),
        ("base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight", "layers.00"),
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", "only 3 layers"),
    ],
)
def test_a_tensor_that_is_not_understood(
    name: str, words: str, adapter: Path, shape: ModelShape
) -> None:
    tensors = load_file(adapter / TENSORS_FILE)
    save_file({**tensors, name: torch.ones(8, 64)}, adapter / TENSORS_FILE)
    assert words in refusal(adapter, shape)


def test_half_a_pair(adapter: Path, shape: ModelShape) -> None:
    edit_tensors(adapter, TENSORS_FILE, **{"layers.1.mlp.up_proj.lora_B.weight": None})
    message = refusal(adapter, shape)
    assert "layers.1.mlp.up_proj" in message and "has lora_A but no lora_B" in message


def test_a_dtype_that_is_not_one_of_three(adapter: Path, shape: ModelShape) -> None:
    tensors = load_file(adapter / TENSORS_FILE)
    save_file({name: t.double() for name, t in tensors.items()}, adapter / TENSORS_FILE)
    assert "is F64, only F32, F16, BF16" in refusal(adapter, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_stored_dtype_is_read(dtype: torch.dtype, adapter: Path, shape: ModelShape) -> None:
    tensors = {n: t.to(dtype) for n, t in load_file(adapter / TENSORS_FILE).items()}
    save_file(tensors, adapter / TENSORS_FILE)
    flat = read_image(str(adapter), shape, torch.float32).flat
    first = tensors[f"{Q0}.lora_A.weight"].float().reshape(-1)
    assert torch.equal(flat[: first.numel()], first)


def entry(begin: int, end: int, shape: Any = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"", b"", "not a safetensors file"),
        (b"[[" * 50_000, b"", "not a safetensors file"),
        (b"[]", b"", "not an object"),
        (b'{"a":1,"a":2}', b"", "twice"),
        (b"\xff\xfe", b"", "not a safetensors file"),
        ({"t": 5}, b"", "needs dtype"),
        ({"t": entry(0, 8, dtype="F3")}, bytes(8), "dtype 'F3'"),
        ({"t": entry(0, 8, [2**60])}, bytes(8), "are invalid"),
        ({"t": entry(0, 8, [2**40, 2**40])}, bytes(8), "span 8"),
        ({"t": entry(0, 8, [-1])}, bytes(8), "are invalid"),
        ({"t": entry(0, 8, [True])}, bytes(8), "are invalid"),
        ({"t": entry(0, 80)}, bytes(8), "the file holds 8"),
        ({"t": entry(0, 8)}, bytes(9), "the file holds 9"),
        ({"t": entry(0, 8), "u": entry(4, 12)}, bytes(12), "starts at byte 4"),
        ({}, b"", "no tensors"),
    ],
)
def test_a_header_that_lies(
    header: Any, data: bytes, words: str, adapter: Path, shape: ModelShape
) -> None:
    rewrite(adapter, header, data)
    assert words in refusal(adapter, shape)


def test_a_header_longer_than_its_file_or_than_reason(adapter: Path, shape: ModelShape) -> None:
    file = adapter / TENSORS_FILE
    file.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    assert f"a header of {2**63} bytes in a file of 10" in refusal(adapter, shape)
    with open(file, "wb") as sparse:
        sparse.write((HEADER_BYTES_MAX + 1).to_bytes(8, "little"))
        sparse.truncate(HEADER_BYTES_MAX * 2)
    assert f"the maximum is {HEADER_BYTES_MAX}" in refusal(adapter, shape)


@pytest.mark.parametrize("size", [0, 3, 8, 200, -1])
def test_a_truncated_file(size: int, adapter: Path, shape: ModelShape) -> None:
    file = adapter / TENSORS_FILE
    data = file.read_bytes()
    file.write_bytes(data[:size])
    assert str(file) in refusal(adapter, shape)


def test_files_that_are_not_there_or_not_files(
    adapter: Path, shape: ModelShape, tmp_path: Path
) -> None:
    assert "no such directory" in refusal(tmp_path / "nowhere", shape)
    assert "no such directory" in refusal(adapter / CONFIG_FILE, shape)
    refusal("a\0b", shape)
    (adapter / TENSORS_FILE).unlink()
    assert f"no {TENSORS_FILE}" in refusal(adapter, shape)
    os.mkfifo(adapter / TENSORS_FILE)
    assert "not a regular file" in refusal(adapter, shape)
    (adapter / CONFIG_FILE).unlink()
    assert CONFIG_FILE in refusal(adapter, shape)
    for text in (b"{", b"[1]", b"\xff", b"[" * 100_000):
        (adapter / CONFIG_FILE).write_bytes(text)
        assert "not" in refusal(adapter, shape)


def test_a_broken_file_fails_a_load_instead(adapter: Path, shape: ModelShape) -> None:
    """Accepted files may be overwritten later. Then only requests for that adapter fail."""
    tensors = load_file(adapter / TENSORS_FILE)
    tensors[f"{Q0}.lora_B.weight"][3, 2] = float("inf")
    save_file(tensors, adapter / TENSORS_FILE)
    with pytest.raises(AdapterFailed, match="layer 0 q_proj holds values that are not finite"):
        read_image(str(adapter), shape, torch.bfloat16)
    rewrite(adapter, b"{")
    with pytest.raises(AdapterFailed, match="not a safetensors file"):
        read_image(str(adapter), shape, torch.float32)
    shutil.rmtree(adapter)
    with pytest.raises(AdapterFailed):
        read_image(str(adapter), shape, torch.float32)
