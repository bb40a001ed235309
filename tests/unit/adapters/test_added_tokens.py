"""An adapter's added tokens are part of its version, wherever it says so, or it is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.adapter_paths import (
    ADDED_FILE,
    CONFIG_FILE,
    HEAD_BYTES,
    TEMPLATE_FILE,
    TENSORS_FILE,
    TOKENIZER_FILE,
    VOCABULARY_FILE,
)
from cluster.config import FleetConfig
from cluster.errors import AdapterFailed, AdapterRefused
from cluster.recovery import decode_version, encode_version
from cluster.values import AddedToken, Version
from replica.adapters.added_tokens import CHARACTERS_MAX, TOKENS_MAX
from replica.adapters.json_files import member_at_start
from replica.adapters.validation import Validation
from replica.model.shape import read_shape
from tests.models import SPECIAL_TOKENS, edit_config
from tests.serving import text
from tests.small_files import settled_config, write_adapter, write_model_config

VOCAB = 320  # of 262 in the tokenizer
START, END = AddedToken(300, "<|im_start|>", special=True), AddedToken(301, "<|im_end|>")
FILES = (TEMPLATE_FILE, TOKENIZER_FILE, ADDED_FILE, VOCABULARY_FILE)
BASE_ENTRIES = [{"id": i, "content": text} for i, text in enumerate(SPECIAL_TOKENS)]


def entry(token: AddedToken, **fields: Any) -> dict[str, Any]:
    options = {"special": token.special, "normalized": token.normalized, "lstrip": token.lstrip}
    return {"content": token.text, **options, **fields}


def decoder(*tokens: AddedToken) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(token.id): entry(token) for token in tokens}}


def vocabulary(*tokens: AddedToken) -> str:
    added = [*BASE_ENTRIES, *(entry(token, id=token.id) for token in tokens)]
    return json.dumps({"version": "1.0", "truncation": None, "added_tokens": added, "model": {}})


@pytest.fixture
def validation(tmp_path: Path) -> Validation:
    model = write_model_config(tmp_path / "base")
    edit_config(model, vocab_size=VOCAB)
    config = FleetConfig(settled_config(model), directory=str(tmp_path / "fleet"))
    return Validation(config, read_shape(model), text=text())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(write_adapter(tmp_path / "adapter"))


Add = Callable[..., tuple[Version, list[str]]]


@pytest.fixture
def add(validation: Validation, adapter: Path) -> Add:
    """Adds the adapter with these files in place of its earlier ones. Returns its remarks, too."""

    def added(files: dict[str, Any] | None = None) -> tuple[Version, list[str]]:
        for name in FILES:
            (adapter / name).unlink(missing_ok=True)
        for name, content in (files or {}).items():
            words = content if isinstance(content, str) else json.dumps(content)
            (adapter / name).write_text(words)
        with validation.adding() as adding:
            version = adding.version("a", str(adapter), trusted=True)
            return version, adding.remarks["a"]

    return added


def test_they_are_read_from_each_file_into_the_same_version(
    validation: Validation, add: Add
) -> None:
    plain, _ = add()
    assert not plain.added_tokens
    named = {"additional_special_tokens": [START.text], "eos_token": "<|end|>"}
    not_normalized = AddedToken(END.id, END.text, normalized=True)
    ways: list[dict[str, Any]] = [
        {TOKENIZER_FILE: decoder(START, not_normalized)},
        {TOKENIZER_FILE: named, ADDED_FILE: {END.text: 301, START.text: 300, "<|user|>": 3}},
        {TOKENIZER_FILE: named, ADDED_FILE: {}, VOCABULARY_FILE: vocabulary(START, not_normalized)},
        # The first of them counts.
        {
            TOKENIZER_FILE: decoder(START, not_normalized),
            ADDED_FILE: {"x": 302},
            VOCABULARY_FILE: vocabulary(AddedToken(303, "y")),
        },
        {VOCABULARY_FILE: vocabulary(not_normalized, START)[:-14] + "broken" + " " * HEAD_BYTES},
    ]
    digests = set[str]()
    for files in ways:
        version, remarks = add(files)
        assert version.added_tokens and remarks == []
        assert validation.added_tokens(version.digest) == [START, not_normalized]
        kept = validation.store.path(version.digest)
        assert set(os.listdir(kept)) == {CONFIG_FILE, TENSORS_FILE, TOKENIZER_FILE}
        assert validation._inspect(kept).digest == version.digest
        digests.add(version.digest)
    assert len(digests) == 1 and plain.digest not in digests
    assert decode_version(json.loads(encode_version(version))) == version
    for other in (AddedToken(302, END.text), AddedToken(301, "other"), END):
        digests.add(add({TOKENIZER_FILE: decoder(START, other)})[0].digest)
    assert len(digests) == 4


@pytest.mark.parametrize(
    "files",
    [
        {TOKENIZER_FILE: {"added_tokens_decoder": {str(i): e for i, e in enumerate(BASE_ENTRIES)}}},
        {VOCABULARY_FILE: vocabulary()},
        {ADDED_FILE: "[" * 10_000},
        {VOCABULARY_FILE: '{"added_tokens": ' + "[" * 10_000},
        {VOCABULARY_FILE: '{"version": "1.0"'},
        {VOCABULARY_FILE: "\x00"},
        {VOCABULARY_FILE: {"added_tokens": {"id": 300, "content": "x"}}},
        {VOCABULARY_FILE: {"added_tokens": [5, None, {"id": "x", "content": "x"}, {"id": 300}]}},
        {ADDED_FILE: {"a": -1, "b": "x", "c": True, "d": None, "": 300, "\ud800": 300}},
        {
            TOKENIZER_FILE: {
                "added_tokens_decoder": {"x": {"content": "x"}, "300": 5, "1" * 99: "y"}
            }
        },
        {TOKENIZER_FILE: {"added_tokens_decoder": [entry(START)]}},
        {TOKENIZER_FILE: {"model_max_length": 5}, ADDED_FILE: {"<|pad|>": 5}},
    ],
)
def test_without_tokens_of_its_own_the_version_stays_the_same(
    add: Add, files: dict[str, Any]
) -> None:
    plain, _ = add()
    version, remarks = add(files)
    assert (version, remarks) == (plain, [])


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ({"<|a|>": 320}, r"adds tokens '<|a|>' (320) beyond the base model's 320, so that"),
        (
            {f"<|{i}|>": 400 + i for i in range(5)},
            "'<|0|>' (400), '<|1|>' (401), '<|2|>' (402) and 2 more beyond the base model's 320",
        ),
        ({"<|a|>": 100}, "'<|a|>' (100) with ids of the base model's ordinary tokens"),
        ({"<|a|>": 300, "<|b|>": 300}, "'<|a|>' (300), '<|b|>' (300): an id or a text is there"),
        ({"x" * (CHARACTERS_MAX + 1): 300}, "characters; the maximum is"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    validation: Validation, adapter: Path, add: Add, tokens: dict[str, int], reason: str
) -> None:
    for name in FILES:
        (adapter / name).unlink(missing_ok=True)
    with pytest.raises(AdapterRefused) as caught:
        add({ADDED_FILE: tokens})
    assert reason in caught.value.message and str(adapter) in caught.value.message
    assert caught.value.field == "lora_path"
    validation.store.drop_idle()
    store = Path(validation.store.path("x")).parent
    assert not [each for each in store.iterdir() if len(each.name) == 64], "it is held"


def test_more_than_the_maximum_are_refused(tmp_path: Path, adapter: Path) -> None:
    model = write_model_config(tmp_path / "base")
    edit_config(model, vocab_size=5000)
    config = FleetConfig(settled_config(model), directory=str(tmp_path / "fleet"))
    validation = Validation(config, read_shape(model), text=text())
    for count in (TOKENS_MAX, TOKENS_MAX + 1):
        tokens = {f"<|{i}|>": 300 + i for i in range(count)}
        (adapter / ADDED_FILE).write_text(json.dumps(tokens))
        with validation.adding() as adding:
            if count <= TOKENS_MAX:
                version = adding.version("a", str(adapter), trusted=True)
                assert len(validation.added_tokens(version.digest)) == count
                continue
            with pytest.raises(AdapterRefused, match="adds 1025 tokens of"):
                adding.version("a", str(adapter), trusted=True)


def test_a_base_model_without_some_ids_takes_none(
    validation: Validation, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text(), "takes_tokens", False)
    with pytest.raises(AdapterRefused, match="the base model's vocabulary leaves out ids"):
        add({ADDED_FILE: {"<|a|>": 300}})
    add({ADDED_FILE: {"<|user|>": 3}})


def test_a_padding_token_beyond_the_vocabulary_is_only_told(add: Add) -> None:
    plain, _ = add()
    for pad in ("[PAD]", {"content": "[PAD]"}):
        version, remarks = add({TOKENIZER_FILE: {"pad_token": pad}, ADDED_FILE: {"[PAD]": 320}})
        assert version == plain
        assert remarks == [
            "Its pad_token '[PAD]' (320) is not used: it is beyond the base model's 320."
        ]
    version, remarks = add({TOKENIZER_FILE: {"pad_token": "[PAD]"}, ADDED_FILE: {"[PAD]": 319}})
    assert version.added_tokens and remarks == []
    for other in ("eos_token", "bos_token"):  # it does more than to pad
        with pytest.raises(AdapterRefused, match=r"'\[PAD\]' \(320\) beyond"):
            names = {"pad_token": "[PAD]", other: "[PAD]"}
            add({TOKENIZER_FILE: names, ADDED_FILE: {"[PAD]": 320}})


def test_a_vocabulary_before_the_tokens_is_told(add: Add) -> None:
    plain, _ = add()
    late = json.dumps({"model": "x" * HEAD_BYTES, "added_tokens": [entry(START, id=300)]})
    version, remarks = add({VOCABULARY_FILE: late})
    assert version == plain
    assert remarks == [
        "Added tokens in its tokenizer.json are not used: they are not in its first 2097152 bytes."
    ]


def test_its_eos_token_may_be_one_of_its_own(add: Add) -> None:
    for files in (
        {TOKENIZER_FILE: {"eos_token": END.text, **decoder(START, END)}},
        {TOKENIZER_FILE: {"eos_token": "<|end|>"}, ADDED_FILE: {"<|end|>": 301}},
    ):
        version, remarks = add(files)
        assert (version.eos_token, remarks) == (301, [])
    version, _ = add({TOKENIZER_FILE: {"eos_token": "<|end|>", **decoder(END)}})
    assert version.eos_token is None  # the base model's


def test_a_version_of_an_earlier_release_is_fetched_without_them(
    validation: Validation, adapter: Path, add: Add
) -> None:
    template = "{{ messages }}"
    for files in ({}, {TEMPLATE_FILE: template}):
        version, _ = add(files)
        validation.store.drop_idle()
        for tokens in ({"<|a|>": 300}, {"<|a|>": 999}):
            (adapter / ADDED_FILE).write_text(json.dumps(tokens))
            path = validation.store.fetch([str(adapter)], version.digest)
            assert validation._inspect(path).digest == version.digest
            validation.store.release(version.digest)
            validation.store.drop_idle()
    with pytest.raises(AdapterFailed, match="its files changed"):
        validation.store.fetch([str(adapter)], "0" * 64)


def test_tokens_that_are_gone_from_the_store_are_noticed(validation: Validation, add: Add) -> None:
    version, _ = add({ADDED_FILE: {"<|a|>": 300}})
    Path(validation.store.path(version.digest), TOKENIZER_FILE).unlink()
    with pytest.raises(AdapterFailed, match="its added tokens are gone"):
        validation.added_tokens(version.digest)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ('{"a": [1, {"b": 2}], "x": [3]', [3]),
        (' {\n"x" :\t"y" , "z"', "y"),
        ('{"a": {"x": 1}, "b": 2}', None),
        ('{"x": [1, 2', None),
        ('["x", 1]', None),
        ('{"a" 1, "x": 2}', None),
        ("", None),
    ],
)
def test_a_member_is_found_in_the_start_of_an_object(given: str, found: object) -> None:
    assert member_at_start(given, "x") == found
