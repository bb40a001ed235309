"""A tokenizer with an adapter's own tokens has the ids and texts of transformers' with the same."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken as Entry
from transformers import AutoTokenizer

from cluster.adapter_paths import TOKENIZER_FILE
from cluster.values import AddedToken
from replica.adapters.added_tokens import own_tokens, read_added
from replica.adapters.json_files import read_object
from replica.api.text import Text
from tests.toy_tokenizers import BASE_ADDED, KINDS, write

OWN = (
    AddedToken(0, "<|im_start|>", special=True),
    AddedToken(0, "<|im_end|>", special=True),
    AddedToken(0, "<|im_end|>\n"),  # longer than another
    AddedToken(0, "<|im_"),  # a part of another
    AddedToken(0, "is", single_word=True),
    AddedToken(0, "<left>", lstrip=True, special=True),
    AddedToken(0, "<right>", rstrip=True, special=True),
    AddedToken(0, "<both>", lstrip=True, rstrip=True),
    AddedToken(0, "<normal>", normalized=True),
    AddedToken(0, "catuser", normalized=True),
    AddedToken(0, "é你"),
)
PARTS = (
    *(token.text for token in OWN),
    *BASE_ADDED,
    *(
        "<tool>",
        " <r>",
        " ",
        "  ",
        "\n",
        "the",
        " cat",
        "user",
        "is",
        "hello",
        "'s",
        "12",
        "<|",
        "|>",
    ),
    *("e\u0301", "\u0301", "\u0338", "你好", "👩‍👩", "é", "\t", ".", "_"),
)


def made(base: Path, path: Path, numbers: Sequence[int] | None = None) -> tuple[Any, Text]:
    """transformers' tokenizer with OWN, whose ids follow the base's, and ours with other ids."""
    expected = AutoTokenizer.from_pretrained(base)
    entries = [
        Entry(
            token.text,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            single_word=token.single_word,
            normalized=token.normalized,
            special=token.special,
        )
        for token in OWN
    ]
    assert expected.add_tokens(entries) == len(OWN)
    expected.save_pretrained(path)
    expected = AutoTokenizer.from_pretrained(path)
    theirs = [expected.convert_tokens_to_ids(token.text) for token in OWN]
    pairs = zip(OWN, numbers or theirs, strict=True)
    own = Text.read(str(base)).with_added([replace(token, id=number) for token, number in pairs])
    return expected, own


def texts(rng: random.Random, count: int) -> list[str]:
    drawn = ["".join(rng.choices(PARTS, k=rng.randint(1, 12))) for _ in range(count)]
    return ["", *PARTS, *(f"a{part}b" for part in PARTS), *drawn]


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_ids_and_texts_are_those_of_transformers(
    kind: str, gaps: bool, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    numbers = rng.sample(range(900, 1000), len(OWN)) if gaps else None
    expected, own = made(write(kind, tmp_path / "base"), tmp_path / "own", numbers)
    theirs = [expected.convert_tokens_to_ids(token.text) for token in OWN]
    ours = dict(zip(theirs, numbers or theirs, strict=True))
    for words in texts(rng, 400):
        for special in (True, False):
            tokens = await own.encode(words, add_special_tokens=special)
            known = expected(words, add_special_tokens=special).input_ids
            assert list(tokens) == [ours.get(token, token) for token in known], repr(words)
        long = await own.encode(words, among_many=True)
        assert long == await own.encode(words)
        assert own.word_tokens(words) == tokens
        for skip in (True, False):
            text = expected.decode(known, skip_special_tokens=skip)
            assert own.decode(tokens, skip_special_tokens=skip) == text
            assert own.decode([*tokens, 899, 5000], skip_special_tokens=skip) == text
            streamed = own.detokenizer(skip_special_tokens=skip)
            assert "".join(streamed.push([t]) for t in tokens) + streamed.flush() == text
    shuffled = rng.choices([*range(len(expected)), *theirs], k=600)
    at_once = own.decode([ours.get(token, token) for token in shuffled], skip_special_tokens=False)
    assert at_once == expected.decode(shuffled)


@pytest.mark.parametrize("kind", KINDS)
async def test_so_are_those_of_a_directory_that_transformers_wrote(
    kind: str, tmp_path: Path, seed: int
) -> None:
    expected, own = made(write(kind, tmp_path / "base"), tmp_path / "own")
    settings = read_object(str(tmp_path / "own"), TOKENIZER_FILE)
    base = Text.read(str(tmp_path / "base"))
    tokens = own_tokens(read_added(str(tmp_path / "own"), settings), settings, base, 2000)
    assert {replace(token, id=0) for token in tokens} == set(OWN)
    found = base.with_added(tokens)
    for words in texts(random.Random(seed), 50):
        assert list(await found.encode(words)) == expected(words).input_ids
        assert await found.encode(words) == await own.encode(words)


def renamed(path: Path, target: Path, old: str, new: str) -> Any:
    """transformers' tokenizer of the same files with one added token renamed."""
    target.mkdir()
    for file in path.iterdir():
        words = file.read_text()
        (target / file.name).write_text(words.replace(json.dumps(old), json.dumps(new)))
    return AutoTokenizer.from_pretrained(target)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_reserved_token_that_has_another_text_is_that_text_alone(
    kind: str, tmp_path: Path, seed: int
) -> None:
    old, new = "<|reserved_1|>", "<|im_start|>"
    base = Text.read(str(write(kind, tmp_path / "base")))
    expected = renamed(tmp_path / "base", tmp_path / "own", old, new)
    (number,) = base.word_tokens(old)[-1:]
    own = base.with_added([AddedToken(number, new, special=True)])
    rng = random.Random(seed)
    for words in [new, old, *(part for part in texts(rng, 200))]:
        words = rng.choice((words, f"{words}{new}{words}{old}"))
        tokens = await own.encode(words)
        assert list(tokens) == expected(words).input_ids, repr(words)
        for skip in (True, False):
            text = expected.decode(tokens, skip_special_tokens=skip)
            assert own.decode(tokens, skip_special_tokens=skip) == text
    assert own.token_bytes(number) == new.encode() and base.token_bytes(number) == old.encode()
    assert own.is_special(new) and not own.is_special(old) and base.is_special(old)


async def test_a_text_that_moves_to_another_id_leaves_the_old_one(tmp_path: Path) -> None:
    base = Text.read(str(write("llama3", tmp_path)))
    before = await base.encode("</s><pad>")
    bos, end, pad = before
    own = base.with_added([AddedToken(pad, "</s>", special=True), AddedToken(bos, "<start>")])
    assert await own.encode("</s><start>") == (bos, pad, bos)
    assert own.decode([pad, end, bos], skip_special_tokens=False) == "</s><start>"
    assert own.token_bytes(end) == b"" and own.decode([end], skip_special_tokens=False) == ""
    # The base model's own stays as it was.
    assert await base.encode("</s><pad>") == before
    assert base.decode(before, skip_special_tokens=False) == "<s></s><pad>"


async def test_adapters_with_the_same_texts_and_ids_stay_apart(tmp_path: Path) -> None:
    base = Text.read(str(write("qwen", tmp_path)))
    plain = await base.encode("<a>the<b>")
    one = base.with_added([AddedToken(900, "<a>"), AddedToken(901, "<b>")])
    two = base.with_added([AddedToken(901, "<a>"), AddedToken(900, "<b>")])
    (bos, the), (only,) = await base.encode("the"), [base.with_added([AddedToken(900, "<c>")])]
    for _ in range(2):
        assert await one.encode("<a>the<b>") == (bos, 900, the, 901)
        assert await two.encode("<a>the<b>") == (bos, 901, the, 900)
        assert await only.encode("<a>the<b>") == await base.encode("<a>the<b>") == plain
        assert [t.decode([900, the]) for t in (one, two, only)] == ["<a>the", "<b>the", "<c>the"]
        assert base.decode([900, the]) == "the" and base.token_bytes(900) == b""


def test_what_is_put_around_a_text_stays_around_it(tmp_path: Path) -> None:
    write("gpt2", tmp_path)
    edited = json.loads((tmp_path / "tokenizer.json").read_text())
    single = edited["post_processor"]["single"]
    edited["post_processor"]["single"] = [*single, {"SpecialToken": {"id": "<s>", "type_id": 0}}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(edited))
    base = Text.read(str(tmp_path))
    own = base.with_added([AddedToken(900, "<a>")])
    bos = base.word_tokens("<s>")
    for words in ("", "a", "<s>", "aa"):
        assert asyncio.run(own.encode(words)) == asyncio.run(base.encode(words))
    assert asyncio.run(own.encode("<a>")) == (*bos, 900, *bos)


def test_many_tokens_and_a_hostile_text_take_little(tmp_path: Path) -> None:
    """Tokens that begin alike, and texts that nearly have them, over and over."""
    base = Text.read(str(write("llama2", tmp_path)))
    tokens = [AddedToken(1000 + i, "a" * (i + 1) + "b") for i in range(240)]
    own, words = base.with_added(tokens), "a" * 200_000
    began_s = time.process_time()
    own.word_tokens(words)
    own.word_tokens(words.replace("aaa", "aab"))
    assert time.process_time() - began_s < 20 * max(_takes_s(base, words), 0.02)
    assert own.tokens_min("a" * 241) == 1


def _takes_s(text: Text, words: str) -> float:
    began_s = time.process_time()
    text.word_tokens(words)
    return time.process_time() - began_s


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_without_some_ids_takes_no_tokens(kind: str, tmp_path: Path) -> None:
    write(kind, tmp_path)
    assert Text.read(str(tmp_path)).takes_tokens
    edited = json.loads((tmp_path / "tokenizer.json").read_text())
    edited["model"]["vocab"]["zz"] = 2000
    (tmp_path / "tokenizer.json").write_text(json.dumps(edited))
    assert not Text.read(str(tmp_path)).takes_tokens


def test_a_literal_in_a_grammar_is_its_own_token(tmp_path: Path) -> None:
    base = Text.read(str(write("llama3", tmp_path)))
    own = base.with_added([AddedToken(900, "<call>"), AddedToken(901, "<end>", special=True)])
    assert [own.literal(word) for word in ("<call>", "<end>")] == ["<[900]>", "<[901]>"]
    assert [base.literal(word) for word in ("<call>", "<tool>")] == ['"<call>"', '"<tool>"']
    assert own.literal("<tool>") == '"<tool>"'
    assert not own.is_special("<call>") and own.is_special("<end>") and not base.is_special("<end>")
