"""What an adapter says of chats is part of its version, if it differs from the base model."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment

from cluster.adapter_paths import CONFIG_FILE, TEMPLATE_FILE, TENSORS_FILE, TOKENIZER_FILE
from cluster.config import FleetConfig
from cluster.errors import AdapterFailed, AdapterRefused, BadRequest
from cluster.recovery import decode_version, encode_version
from cluster.values import Version
from replica.adapters.adapter_files import inspect
from replica.adapters.chat_files import TEMPLATE_BYTES_MAX
from replica.adapters.validation import Validation
from replica.model.shape import read_shape
from tests.models import CHAT_TEMPLATE, SPECIAL_TOKENS, edit_config
from tests.serving import text
from tests.small_files import settled_config, write_adapter, write_model_config

OWN = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
PAD = SPECIAL_TOKENS.index("<|pad|>")


@pytest.fixture
def validation(tmp_path: Path) -> Validation:
    engine = settled_config(write_model_config(tmp_path / "base"))
    config = FleetConfig(engine, directory=str(tmp_path / "fleet"))
    return Validation(config, read_shape(engine.model), text=text())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(write_adapter(tmp_path / "adapter"))


@pytest.fixture
def add(validation: Validation, adapter: Path) -> Callable[..., tuple[Version, list[str]]]:
    """Adds the adapter with these files in place of its earlier ones. Returns its remarks, too."""

    def added(**files: Any) -> tuple[Version, list[str]]:
        for name in (TEMPLATE_FILE, TOKENIZER_FILE, "added_tokens.json"):
            (adapter / name).unlink(missing_ok=True)
        for name, content in files.items():
            file = {"template": TEMPLATE_FILE, "tokenizer": TOKENIZER_FILE}.get(name)
            text = content if isinstance(content, str) else json.dumps(content)
            (adapter / (file or "added_tokens.json")).write_text(text)
        with validation.adding() as adding:
            version = adding.version("a", str(adapter), trusted=True)
            return version, adding.remarks["a"]

    return added


def test_a_template_of_its_own_makes_it_another_version(
    validation: Validation, adapter: Path, add: Callable[..., Any]
) -> None:
    model = str(adapter.parent / "base")
    plain = inspect(str(adapter), read_shape(model), 64).digest
    digests = set[str]()
    for template in (OWN, OWN + " ", OWN.replace("[", "<")):
        version, _ = add(template=template + "\n")
        assert version.template and validation.chat_template(version.digest) == template
        kept = validation.store.path(version.digest)
        assert set(os.listdir(kept)) == {CONFIG_FILE, TENSORS_FILE, TOKENIZER_FILE}
        assert all(entry.stat().st_mode & 0o222 == 0 for entry in os.scandir(kept))
        digests.add(version.digest)
    assert len(digests - {plain}) == 3
    # Wherever it lies, and whatever else is there.
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": OWN}]
    for tokenizer in (OWN, named):
        version, _ = add(tokenizer={"chat_template": tokenizer, "model_max_length": 5})
        assert version.digest in digests and validation.chat_template(version.digest) == OWN
    version, _ = add(template=OWN, tokenizer={"chat_template": "another"})
    assert version.digest in digests


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"template": CHAT_TEMPLATE},
        {"template": CHAT_TEMPLATE + "\n", "tokenizer": {"chat_template": "not this"}},
        {"template": "\n"},
        {"tokenizer": {"chat_template": CHAT_TEMPLATE, "eos_token": "<|end|>"}},
        {"tokenizer": {"chat_template": None, "eos_token": "<|none|>"}},
        {"tokenizer": {"eos_token": "\u0120"}},  # beyond the 32 of this model
        {"tokenizer": {"chat_template": [{"name": "rag", "template": "x"}], "eos_token": 5}},
        {"tokenizer": "[" * 10_000},
        {"tokenizer": json.dumps({"chat_template": OWN}) + " " * 2**22},
        {"added": {"<|user|>": 3, "h": 77}},
    ],
)
def test_what_does_not_differ_from_the_base_model_leaves_the_version_as_it_is(
    validation: Validation, adapter: Path, add: Callable[..., Any], files: dict[str, Any]
) -> None:
    plain = inspect(str(adapter), read_shape(str(adapter.parent / "base")), 64).digest
    version, _ = add(**files)
    assert (version.digest, version.template, version.eos_token) == (plain, False, None)
    kept = validation.store.path(version.digest)
    assert set(os.listdir(kept)) == {CONFIG_FILE, TENSORS_FILE}


@pytest.mark.parametrize("eos_token", ["<|pad|>", {"content": "<|pad|>", "special": True}])
def test_a_token_that_ends_its_answers_is_part_of_it(
    add: Callable[..., Any], eos_token: object
) -> None:
    plain, _ = add()
    version, remarks = add(tokenizer={"eos_token": eos_token})
    assert (version.eos_token, version.template, remarks) == (PAD, False, [])
    assert version.digest != plain.digest
    assert decode_version(json.loads(encode_version(version))) == version


def test_a_record_of_an_earlier_release_has_neither(add: Callable[..., Any]) -> None:
    record = json.loads(encode_version(add()[0]))
    del record["template"], record["eos_token"]
    version = decode_version(record)
    assert (version.template, version.eos_token) == (False, None)


def test_what_is_kept_is_not_rewritten(
    validation: Validation, adapter: Path, add: Callable[..., Any]
) -> None:
    version, _ = add(template=OWN, tokenizer={"eos_token": "<|pad|>"})
    file = Path(validation.store.path(version.digest), TOKENIZER_FILE)
    before = file.stat()
    again = validation._inspect(str(file.parent))
    assert (again.digest, again.chat.eos_token) == (version.digest, PAD)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("lines", ["\n\n", "\n\n\n", "\r\n", "\n\r\n"])
def test_the_line_breaks_at_its_end_stay_the_same_when_it_is_read_again(
    validation: Validation, add: Callable[..., Any], lines: str
) -> None:
    version, _ = add(template=OWN + lines)
    again = validation._inspect(validation.store.path(version.digest))
    assert again.digest == version.digest
    kept = validation.chat_template(version.digest)
    jinja = Environment()
    assert jinja.from_string(kept).render() == jinja.from_string(OWN + lines).render()


def test_a_version_of_an_earlier_release_is_fetched_without_its_template(
    validation: Validation, adapter: Path, tmp_path: Path
) -> None:
    digest = inspect(str(adapter), read_shape(str(tmp_path / "base")), 64).digest
    (adapter / TEMPLATE_FILE).write_text(OWN)
    path = validation.store.fetch([str(adapter)], digest)
    assert set(os.listdir(path)) == {CONFIG_FILE, TENSORS_FILE}
    with pytest.raises(AdapterFailed, match="its files changed"):
        validation.store.fetch([str(adapter)], "0" * 64)


def test_a_template_that_was_changed_in_the_store_is_noticed(
    validation: Validation, adapter: Path, add: Callable[..., Any]
) -> None:
    version, _ = add(template=OWN)
    file = Path(validation.store.path(version.digest), TOKENIZER_FILE)
    file.chmod(0o644)
    file.write_text(json.dumps({"chat_template": "other"}))
    validation.store.drop_damaged(version.digest)
    validation.store.fetch([str(adapter)], version.digest)
    assert validation.chat_template(version.digest) == OWN
    file.unlink()
    with pytest.raises(AdapterFailed, match="its chat template is gone"):
        validation.chat_template(version.digest)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("a\n{% if %}", r"a chat template that cannot be used: line 2: Expected an expression"),
        ("{{ x | nothing }}", "cannot be used: line 1: No filter named 'nothing'"),
        ("x" * (TEMPLATE_BYTES_MAX + 1), "its chat template is over 131072 bytes"),
        ("x" * (5 * 2**20), "its chat template is over 131072 bytes"),
        ("{{ 'x' * 999999999 }}", "cannot be used: it took more than 512 MiB"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(
    validation: Validation, adapter: Path, add: Callable[..., Any], template: str, reason: str
) -> None:
    with pytest.raises(AdapterRefused, match=reason) as caught:
        add(template=template)
    assert str(adapter) in caught.value.message
    assert caught.value.field == "lora_path"
    validation.store.drop_idle()
    store = Path(validation.store.path("x")).parent
    assert not [each for each in store.iterdir() if len(each.name) == 64], "it is held"


def test_a_link_out_of_the_roots_is_no_template(tmp_path: Path, adapter: Path) -> None:
    engine = settled_config(write_model_config(tmp_path / "base"))
    roots = (str(adapter),)
    config = FleetConfig(engine, adapter_roots=roots, directory=str(tmp_path / "fleet"))
    secret = tmp_path / "secret"
    secret.write_text("of another")
    (adapter / TEMPLATE_FILE).symlink_to(secret)
    validation = Validation(config, read_shape(engine.model), text=text())
    with (
        validation.adding() as adding,
        pytest.raises(BadRequest, match=f"has {TEMPLATE_FILE} as a link out of the allowed"),
    ):
        adding.version("a", str(adapter))


def test_what_is_not_used_is_said(add: Callable[..., Any]) -> None:
    unnamed = [{"name": "rag", "template": "x"}]
    _, remarks = add(tokenizer={"chat_template": unnamed, "eos_token": "<|none|>"})
    assert remarks == [
        "Its chat templates are not used: none is named default.",
        "Its eos_token is not used: '<|none|>' is no token of the base model's.",
    ]
    _, remarks = add(tokenizer={"eos_token": "\ud800"})
    assert remarks == [r"Its eos_token is not used: '\ud800' is no token of the base model's."]


def test_without_the_base_models_text_nothing_is_kept(tmp_path: Path, adapter: Path) -> None:
    engine = settled_config(write_model_config(tmp_path / "base"))
    config = FleetConfig(engine, directory=str(tmp_path / "fleet"))
    validation = Validation(config, read_shape(engine.model))
    (adapter / TEMPLATE_FILE).write_text(OWN)
    with validation.adding() as adding:
        version = adding.version("a", str(adapter), trusted=True)
    assert not version.template
    kept = validation.store.path(version.digest)
    assert set(os.listdir(kept)) == {CONFIG_FILE, TENSORS_FILE}


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("some/BASE", False),
        ("/data/base/", False),
        ("tiny-served", False),
        (None, False),
        (7, False),
        ("meta-llama/Llama-3.1-8B", True),
    ],
)
def test_another_base_model_is_told(
    tmp_path: Path, adapter: Path, named: object, told: bool
) -> None:
    edit_config(adapter, CONFIG_FILE, base_model_name_or_path=named)
    engine = settled_config(write_model_config(tmp_path / "base"))
    engine = dataclasses.replace(engine, served_model_name="tiny-served")
    config = FleetConfig(engine, directory=str(tmp_path / "fleet"))
    with Validation(config, read_shape(engine.model), text=text()).adding() as adding:
        adding.version("a", str(adapter), trusted=True)
    said = f"Its config names another base model, {named!r}; its shapes fit."
    assert adding.remarks["a"] == ([said] if told else [])
