"""Adapters as people have them: served as PEFT would, or refused with what to do about it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.adapter_paths import CONFIG_FILE, MLX_FILE, PICKLE_FILE, TENSORS_FILE
from cluster.config import FleetConfig
from cluster.errors import AdapterRefused
from replica.adapters import pickled
from replica.adapters.foreign_files import foreign, rewrite_foreign
from replica.adapters.image import Image, read_image
from replica.adapters.validation import Validation
from replica.model.shape import read_shape
from tests.models import edit_config, make_adapter, make_model
from tests.small_files import settled_config

PREFIX = "base_model.model."
EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"
# As Unsloth's FastModel writes it, for language layers with attention and MLP.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}"
    r"\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r"\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("foreign") / "model")


@pytest.fixture(scope="session")
def saved(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT writes today."""
    return Path(make_adapter(tmp_path_factory.mktemp("foreign") / "adapter", model))


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A copy that the test may modify."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.fixture
def add(model: str, tmp_path: Path) -> Callable[[Path], Image]:
    """Adds a directory, and reads the image of what the store keeps."""
    config = FleetConfig(settled_config(model, rank_max=64), directory=str(tmp_path / "fleet"))
    validation = Validation(config, read_shape(model))

    def added(path: Path) -> Image:
        with validation.adding() as adding:
            version = adding.version("a", str(path), trusted=True)
            kept = validation.store.path(version.digest)
            return read_image(kept, read_shape(model), torch.float32)

    return added


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes long to import torch."""
    monkeypatch.setattr(pickled, "DEADLINE_S", 1e4)


Add = Callable[[Path], Image]


def check_same(add: Add, one: Path, other: Path) -> None:
    found, wanted = add(one), add(other)
    assert torch.equal(found.flat, wanted.flat)
    for name in ("a_offset", "b_offset", "rank", "scale"):
        assert (getattr(found.layout, name) == getattr(wanted.layout, name)).all()


def refusal(add: Add, path: Path) -> str:
    with pytest.raises(AdapterRefused) as caught:
        add(path)
    assert caught.value.field == "lora_path" and str(path) in caught.value.message
    return caught.value.message


def rename(adapter: Path, change: Callable[[str], str], file: str = TENSORS_FILE) -> None:
    tensors = load_file(adapter / TENSORS_FILE)
    (adapter / TENSORS_FILE).unlink()
    save_file({change(name): tensor for name, tensor in tensors.items()}, adapter / file)


def with_tensors(adapter: Path, **tensors: torch.Tensor) -> None:
    save_file({**load_file(adapter / TENSORS_FILE), **tensors}, adapter / TENSORS_FILE)


# A pickle.


def test_a_pickle_alone_is_read(add: Add, saved: Path, model: str, tmp_path: Path) -> None:
    make_adapter(tmp_path / "bin", model, saving={"safe_serialization": False})
    assert (tmp_path / "bin" / PICKLE_FILE).exists()
    check_same(add, tmp_path / "bin", saved)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda path: {"a": Evil(path)}, "weights_only does not read it"),
        (lambda path: [torch.ones(2)], "not a state dict"),
        (lambda path: {"a": "b"}, "not a state dict"),
        (lambda path: {"a": torch.ones(1).expand(2**40)}, "larger than the file"),
        (lambda path: {"a": torch.ones(2, 2).to_sparse()}, "sparse"),
    ],
)
def test_a_pickle_of_anything_else(
    content: Callable[[Path], Any], words: str, add: Add, adapter: Path, tmp_path: Path
) -> None:
    (adapter / TENSORS_FILE).unlink()
    torch.save(content(tmp_path / "ran"), adapter / PICKLE_FILE)
    message = refusal(add, adapter)
    assert words in message and "safe_serialization=True" in message
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_takes_too_long_is_killed(
    add: Add, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(adapter / TENSORS_FILE)
    (adapter / TENSORS_FILE).unlink()
    torch.save(tensors, adapter / PICKLE_FILE)
    monkeypatch.setattr(pickled, "DEADLINE_S", 0.01)
    assert "longer than 0.01 s" in refusal(add, adapter)


# mlx-lm.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_mlx_lm_writes(dtype: torch.dtype, add: Add, adapter: Path, saved: Path) -> None:
    reference = shutil.copytree(saved, adapter.parent / "reference")
    tensors = {n: t.to(dtype) for n, t in load_file(saved / TENSORS_FILE).items()}
    tensors = {n: t for n, t in tensors.items() if ".layers.0." not in n}
    save_file(tensors, reference / TENSORS_FILE)
    (adapter / TENSORS_FILE).unlink()
    theirs = {
        name.removeprefix(PREFIX)
        .replace("lora_A.weight", "lora_a")
        .replace("lora_B.weight", "lora_b"): tensor.T.contiguous()
        for name, tensor in tensors.items()
    }
    save_file(theirs, adapter / MLX_FILE)
    config: dict[str, Any] = {"fine_tune_type": "lora", "num_layers": 2, "model": "elsewhere"}
    config["lora_parameters"] = {"rank": 8, "scale": 2.0, "dropout": 0.0}
    (adapter / CONFIG_FILE).write_text(json.dumps(config))
    check_same(add, adapter, reference)
    edit_config(adapter, CONFIG_FILE, lora_parameters={"rank": 8, "scale": 20.0})
    assert add(adapter).layout.scale.max() == 20.0
    for name in ("alpha", "lora_alpha"):
        parameters = {"rank": 8, "scale": 20.0, name: 16}
        edit_config(adapter, CONFIG_FILE, lora_parameters=parameters)
        assert f"{name} = 16, rank = 8" in refusal(add, adapter)
        edit_config(adapter, CONFIG_FILE, lora_parameters=parameters | {name: 8})
        assert add(adapter).layout.scale.max() == 20.0
    edit_config(adapter, CONFIG_FILE, lora_parameters={"rank": 4, "scale": 20.0})
    assert "lora_A has shape [8, 64]" in refusal(add, adapter)
    for fields, words in (
        ({"fine_tune_type": "dora"}, "'dora'"),
        ({"fine_tune_type": "full"}, "'full'"),
        ({"fine_tune_type": "lora", "use_dora": True}, "'dora'"),
        ({"use_dora": False, "lora_parameters": {"rank": 8}}, "scale = None"),
        ({"use_dora": False, "lora_parameters": {"rank": 8, "scale": True}}, "scale = True"),
        ({"lora_parameters": 8}, "lora_parameters = 8"),
    ):
        edit_config(adapter, CONFIG_FILE, **fields)
        assert words in refusal(add, adapter)


# Names and settings that PEFT reads.


def test_names_with_the_adapters_name(add: Add, adapter: Path, saved: Path) -> None:
    rename(adapter, lambda name: name.replace(".weight", ".default.weight"))
    check_same(add, adapter, saved)


@pytest.mark.parametrize(
    ("settings", "end"),
    [
        ({"use_dora": True, "targets": ["q_proj"]}, "lora_magnitude_vector"),
        ({"targets": ["embed_tokens"]}, "lora_embedding_A"),
    ],
)
def test_other_tensors_with_the_adapters_name(
    settings: dict[str, Any], end: str, model: str, tmp_path: Path
) -> None:
    saving = {"save_embedding_layers": False}
    adapter = Path(make_adapter(tmp_path / "adapter", model, saving=saving, **settings))
    wanted = load_file(adapter / TENSORS_FILE).keys()
    rename(adapter, lambda name: name.replace(end, f"{end}.default"))
    vocabulary = read_shape(model).vocabulary
    assert foreign(str(adapter), vocabulary)
    rewrite_foreign(str(adapter), model, vocabulary)
    assert load_file(adapter / TENSORS_FILE).keys() == wanted


@pytest.mark.parametrize(
    "fields", [{"bias": "all"}, {"bias": "lora_only"}, {"fan_in_fan_out": True}]
)
def test_settings_without_effect_here(
    fields: dict[str, Any], add: Add, adapter: Path, saved: Path
) -> None:
    edit_config(adapter, CONFIG_FILE, **fields)
    check_same(add, adapter, saved)


def test_unsloths_pattern(add: Add, adapter: Path, saved: Path) -> None:
    edit_config(adapter, CONFIG_FILE, target_modules=UNSLOTH)
    check_same(add, adapter, saved)
    edit_config(adapter, CONFIG_FILE, target_modules=UNSLOTH.replace("down_proj)", "x)"))
    assert "does not target it" in refusal(add, adapter)


def test_layers_by_their_usual_pattern(add: Add, model: str, saved: Path, tmp_path: Path) -> None:
    settings = {"layers_to_transform": [1], "layers_pattern": "layers"}
    make_adapter(tmp_path / "one", model, **settings)
    assert (add(tmp_path / "one").layout.rank > 0).all(axis=1).tolist() == [False, True, False]


# Copies of the vocabulary.


def test_copies_of_the_bases_vocabulary_are_left_out(
    add: Add, model: str, saved: Path, tmp_path: Path
) -> None:
    make_adapter(tmp_path / "copies", model, saving={"save_embedding_layers": True})
    assert f"{HEAD}.weight" in load_file(tmp_path / "copies" / TENSORS_FILE)
    check_same(add, tmp_path / "copies", saved)
    make_adapter(tmp_path / "saved", model, modules_to_save=["lm_head", "embed_tokens"])
    check_same(add, tmp_path / "saved", saved)
    base = load_file(Path(model) / "model.safetensors")
    copy = Path(shutil.copytree(saved, tmp_path / "base-layer"))
    layers = {f"{HEAD}.base_layer.weight": base["lm_head.weight"]}
    layers[f"{EMBEDDING}.base_layer.weight"] = base["model.embed_tokens.weight"]
    with_tensors(copy, **layers)
    check_same(add, copy, saved)


def test_a_tied_head_is_compared_with_the_embedding(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tied", tie_word_embeddings=True, dtype=torch.bfloat16)
    path = Path(make_adapter(tmp_path / "adapter", model))
    embedding = load_file(Path(model) / "model.safetensors")["model.embed_tokens.weight"]
    with_tensors(path, **{f"{HEAD}.weight": embedding.float()})
    config = FleetConfig(settled_config(model), directory=str(tmp_path / "fleet"))
    with Validation(config, read_shape(model)).adding() as adding:
        adding.version("a", str(path), trusted=True)


def test_another_vocabulary(add: Add, model: str, adapter: Path) -> None:
    base = load_file(Path(model) / "model.safetensors")["lm_head.weight"]
    trained = base.clone()
    trained[-1, -1] += 1.0
    with_tensors(adapter, **{f"{HEAD}.weight": trained})
    assert "a trained lm_head is supported in modules_to_save alone" in refusal(add, adapter)
    with_tensors(adapter, **{f"{HEAD}.weight": torch.cat((base, base[:4]))})
    resized = "a resized vocabulary, [324, 64] instead of [320, 64]"
    assert resized in refusal(add, adapter)
    edit_config(adapter, CONFIG_FILE, modules_to_save=["lm_head"])
    assert resized in refusal(add, adapter)


def test_modules_that_are_saved_and_no_vocabulary(add: Add, adapter: Path) -> None:
    edit_config(adapter, CONFIG_FILE, modules_to_save=["lm_head", "score"])
    assert "modules_to_save = ['lm_head', 'score'] is not supported" in refusal(add, adapter)


# Values.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_value_that_is_not_finite(
    dtype: torch.dtype, value: float, add: Add, adapter: Path
) -> None:
    tensors = {n: t.to(dtype) for n, t in load_file(adapter / TENSORS_FILE).items()}
    name = f"{PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name][3, 5] = value
    if dtype == torch.bfloat16:  # dtypes may be mixed
        other = f"{PREFIX}model.layers.0.self_attn.k_proj.lora_B.weight"
        tensors[other] = tensors[other].float()
    save_file(tensors, adapter / TENSORS_FILE)
    assert f"tensor {name} holds a value not finite" in refusal(add, adapter)


@pytest.mark.parametrize(
    ("dtype", "stored", "least"),
    [
        ("float16", torch.float32, 65520.0),
        ("float16", torch.bfloat16, 65536.0),
        ("bfloat16", torch.float32, 3.3961775292304601e38),
    ],
)
def test_a_value_that_the_engines_dtype_does_not_hold(
    dtype: str, stored: torch.dtype, least: float, model: str, adapter: Path, tmp_path: Path
) -> None:
    engine = settled_config(model, dtype=dtype)
    config = FleetConfig(engine, directory=str(tmp_path / "fleet"))
    validation = Validation(config, read_shape(model))
    name = f"{PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"
    for factor, accepted in ((1.0, False), (0.99, True)):
        tensors = {n: t.to(stored) for n, t in load_file(adapter / TENSORS_FILE).items()}
        tensors[name][3, 5] = -least * factor
        assert bool(tensors[name].to(getattr(torch, dtype)).isfinite().all()) == accepted
        save_file(tensors, adapter / TENSORS_FILE)
        with validation.adding() as adding:
            if accepted:
                adding.version("a", str(adapter), trusted=True)
            else:
                with pytest.raises(AdapterRefused, match=f"{name} holds a value not finite"):
                    adding.version("a", str(adapter), trusted=True)


# What is no adapter.

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSORS_FILE, PICKLE_FILE, MLX_FILE])
def test_a_git_lfs_pointer(file: str, add: Add, adapter: Path) -> None:
    if file != CONFIG_FILE:
        (adapter / TENSORS_FILE).unlink()
    (adapter / file).write_text(POINTER)
    if file == MLX_FILE:
        lora = {"lora_parameters": {"rank": 8, "scale": 1.0}}
        (adapter / CONFIG_FILE).write_text(json.dumps(lora))
    message = refusal(add, adapter)
    assert f"{adapter / file}: a Git LFS pointer: run `git lfs pull`" in message


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSORS_FILE, PICKLE_FILE])
def test_an_empty_file(file: str, add: Add, adapter: Path) -> None:
    (adapter / TENSORS_FILE).unlink(missing_ok=file != CONFIG_FILE)
    (adapter / file).write_bytes(b"")
    assert "empty" in refusal(add, adapter)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("adapter.zip", "but adapter.zip; unpack it"),
        ("adapter_model-00001-of-00002.safetensors", "shards; load it with PEFT"),
        ("adapters.npz", "a newer mlx-lm"),
        ("model.safetensors", "a whole model"),
        (f"checkpoint-100/{CONFIG_FILE}", f"but checkpoint-100/{CONFIG_FILE}; name that directory"),
    ],
)
def test_what_was_found_instead(file: str, words: str, add: Add, tmp_path: Path) -> None:
    path = tmp_path / "found"
    (path / file).parent.mkdir(parents=True)
    (path / file).write_bytes(b"PK")
    message = refusal(add, path)
    assert f"no {CONFIG_FILE}" in message and words in message


def test_the_path_of_a_file(add: Add, adapter: Path, tmp_path: Path) -> None:
    assert "a file; name the directory" in refusal(add, adapter / TENSORS_FILE)
    (tmp_path / "a.zip").write_bytes(b"PK")
    assert "a zip archive; unpack it" in refusal(add, tmp_path / "a.zip")


def test_a_rank_that_the_fleet_does_not_accept(add: Add, model: str, tmp_path: Path) -> None:
    make_adapter(tmp_path / "wide", model, rank=512)
    assert "has rank 512, the maximum is 64; start with --rank-max 512" in refusal(
        add, tmp_path / "wide"
    )


def test_other_forms_are_not_checked_before_they_are_rewritten(saved: Path, adapter: Path) -> None:
    vocabulary = ("model.embed_tokens", "lm_head")
    assert not foreign(str(saved), vocabulary)
    rename(adapter, lambda name: name.replace(".weight", ".default.weight"))
    assert foreign(str(adapter), vocabulary)
    rename(adapter, lambda name: f"{HEAD}.weight")
    assert foreign(str(adapter), vocabulary)
    (adapter / TENSORS_FILE).rename(adapter / MLX_FILE)
    assert foreign(str(adapter), vocabulary)
