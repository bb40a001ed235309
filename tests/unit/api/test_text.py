"""Detokenized text does not depend on how its tokens arrive; stop strings may span pieces."""

import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cluster.errors import BadRequest, ModelUnsupported
from replica.api.stop_strings import StopStrings
from replica.api.text import HELD_TOKENS_MAX, INLINE_CHARACTERS, Text
from tests.models import write_tokenizer
from tests.serving import text, tokens_of

WORDS = "Hällo wörld 你好, 👩‍👩‍👧 naïve\n  tabs\tand   spaces €"


def spaced_text() -> Text:
    """A tokenizer like Llama 2's: ▁ for spaces, a space before the text, byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁cat", "s", "▁sat", ".", "▁", "é"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Text(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def ids(spaced: Text, *pieces: str) -> list[int]:
    vocabulary = spaced._backend.get_vocab()
    return [vocabulary[piece] for piece in pieces]


def streamed(
    reader: Text, tokens: Sequence[int], prompt: Sequence[int] = (), **options: Any
) -> str:
    detokenizer = reader.detokenizer(prompt, **options)
    pieces = [detokenizer.push((token,)) for token in tokens]
    return "".join([*pieces, detokenizer.flush()])


def test_text_comes_back_token_by_token() -> None:
    assert streamed(text(), tokens_of(WORDS)) == WORDS


def test_a_character_is_emitted_with_its_last_byte() -> None:
    detokenizer = text().detokenizer()
    pieces = [detokenizer.push((token,)) for token in tokens_of("a你b")]
    assert pieces == ["a", "", "", "你", "b"]


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    detokenizer = text().detokenizer()
    assert [detokenizer.push((token,)) for token in tokens_of("a你")[:2]] == ["a", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_tokens_that_form_no_character_are_released() -> None:
    half = tokens_of("你")[0]
    detokenizer = text().detokenizer()
    out = [detokenizer.push((half,)) for _ in range(10 * HELD_TOKENS_MAX)]
    assert len(detokenizer._window) <= 2 * HELD_TOKENS_MAX
    assert len("".join(out)) >= 9 * HELD_TOKENS_MAX


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_streamed_text_equals_the_whole_text(data: st.DataObject) -> None:
    words = data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    tokens = list(tokens_of_sync(words))
    detokenizer = text().detokenizer()
    out, start = "", 0
    while start < len(tokens):
        count = data.draw(st.integers(1, 5))
        out += detokenizer.push(tokens[start : start + count])
        start += count
    assert out + detokenizer.flush() == words


def tokens_of_sync(words: str) -> Sequence[int]:
    encoded: Sequence[int] = text()._backend.encode(words, add_special_tokens=False).ids
    return encoded


def test_streamed_tokens_decode_as_at_once(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        # Runs of stray bytes, shorter than HELD_TOKENS_MAX.
        tokens = [
            token
            for _ in range(10)
            for token in (*draw.choices(range(6, 262), k=4), *tokens_of_sync("a"))
        ]
        assert streamed(text(), tokens) == text().decode(tokens)


def test_special_tokens_are_skipped_by_default() -> None:
    tokens = [3, *tokens_of_sync("hi"), 1]
    assert streamed(text(), tokens) == "hi"
    assert streamed(text(), tokens, skip_special_tokens=False) == "<|user|>hi<|end|>"


def test_spaces_between_tokens_survive() -> None:
    spaced = spaced_text()
    tokens = ids(spaced, "▁the", "▁cat", "s", "▁sat", ".")
    assert streamed(spaced, tokens) == "the cats sat."
    # After a prompt the first token's space is part of the answer.
    assert streamed(spaced, tokens[1:], prompt=tokens[:1]) == " cats sat."


def test_byte_tokens_between_pieces_become_characters() -> None:
    spaced = spaced_text()
    hello = [f"<0x{byte:02X}>" for byte in "你好".encode()]
    tokens = ids(spaced, "▁the", "▁", *hello, "s")
    assert streamed(spaced, tokens) == "the 你好s"


def test_a_token_stands_for_its_bytes() -> None:
    assert b"".join(text().token_bytes(token) for token in tokens_of(WORDS)) == WORDS.encode()
    assert text().token_bytes(1) == b"<|end|>"
    assert text().token_bytes(319) == b""  # An id in the padding of the model's vocabulary.
    spaced = spaced_text()
    assert spaced.token_bytes(ids(spaced, "▁cat")[0]) == b" cat"
    assert spaced.token_bytes(ids(spaced, "<0xE4>")[0]) == b"\xe4"


async def test_a_long_text_survives_tokenization_on_a_thread() -> None:
    words = WORDS * 400
    tokens = await text().encode(words)
    assert text().decode(tokens) == words
    assert text().tokens_min(words) <= len(tokens)


def test_the_models_chat_template_is_used() -> None:
    rendered = text().render_chat([{"role": "user", "content": "hi"}])
    assert rendered == "<|begin|><|user|>hi<|end|><|assistant|>"


def test_without_a_chat_template_chat_is_refused() -> None:
    with pytest.raises(BadRequest, match="no chat template") as caught:
        spaced_text().render_chat([{"role": "user", "content": "hi"}])
    assert caught.value.field == "messages"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools"])
def test_template_arguments_cannot_replace_ours(name: str) -> None:
    with pytest.raises(BadRequest, match=name):
        text().render_chat([{"role": "user", "content": "hi"}], template_arguments={name: "x"})


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ModelUnsupported, match=r"tokenizer\.json"):
        Text.read(str(tmp_path))


CORPUS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then")


def write_sentencepiece(path: Path) -> None:
    """As old Llamas have it: `tokenizer.model` alone."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece")
    rng = random.Random(0)
    trained = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices(CORPUS, k=12)) for _ in range(200)),
        model_writer=trained,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
    )
    (path / "tokenizer.model").write_bytes(trained.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def write_merges(path: Path) -> None:
    """As GPT-2 has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, "th", "the", "\u0120the", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n\u0120 the\n")
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')


@pytest.mark.parametrize("write", [write_sentencepiece, write_merges])
async def test_a_model_without_tokenizer_json_has_the_tokenizer_of_its_other_files(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path)
    expected, found = AutoTokenizer.from_pretrained(tmp_path), Text.read(str(tmp_path))
    for words in ("the quick fox and the dog", " then\n\u00e9 \u4f60\u597d"):
        tokens = await found.encode(words)
        assert list(tokens) == expected(words).input_ids
        assert found.decode(tokens) == expected.decode(tokens, skip_special_tokens=True)
        assert found.detokenizer().push(tokens) == found.decode(tokens)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", b'{"version": "1.0", "added', "tokenizer.json: Unterminated string"),
        ("tokenizer.json", b"{}", "tokenizer.json: Model missing"),
        ("tokenizer.json", b"[]", "tokenizer.json: not a JSON object"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: Expecting property name"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: not a JSON object"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json: 'utf-8' codec"),
        ("chat_template.jinja", b"{{ \xff }}", "chat_template.jinja: 'utf-8' codec"),
        ("chat_template.jinja", b"a\n{% if %}", "its chat template, line 2: Expected"),
        ("chat_template.jinja", b"{{ x | nothing }}", "its chat template, line 1: No filter"),
    ],
)
def test_a_broken_file_of_the_tokenizer_is_named(
    file: str, content: bytes, words: str, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelUnsupported, match=re.escape(words)) as caught:
        Text.read(str(tmp_path))
    assert caught.value.message.startswith(str(tmp_path))


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[7].a.b }}", ""])
def test_a_template_that_refuses_some_messages_is_accepted(template: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    Text.read(str(tmp_path))


def test_the_http_server_imports_neither_torch_nor_ray() -> None:
    script = "import sys, replica.api.server, transformers; transformers.PreTrainedTokenizerFast; "
    script += "print(sorted({'torch', 'ray', 'redis', 'fastapi'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def push_all(stops: StopStrings, pieces: Sequence[str]) -> list[str]:
    out = []
    for piece in pieces:
        out.append(stops.push(piece))
        if stops.found is not None:
            break
    return out


def test_text_that_may_begin_a_stop_is_held_back() -> None:
    stops = StopStrings(["END"])
    assert push_all(stops, ["a E", "N", "x EN", "D b"]) == ["a ", "", "ENx ", ""]
    assert stops.found == "END"


def test_the_earliest_stop_wins_and_the_longer_of_two() -> None:
    stops = StopStrings(["later", "now", "nowadays"])
    assert stops.push("so nowadays later") == "so "
    assert stops.found == "nowadays"


def test_the_stop_is_included_when_asked_for() -> None:
    stops = StopStrings(["."], include=True)
    assert stops.push("one. two") == "one."


def test_held_text_is_released_at_the_end() -> None:
    stops = StopStrings(["END"])
    assert stops.push("the EN") == "the "
    assert stops.release("") == "EN"


@settings(max_examples=300, deadline=None)
@given(
    words=st.text("ab", max_size=30),
    stop=st.text("ab", min_size=1, max_size=5),
    data=st.data(),
)
def test_stops_are_found_however_the_text_is_cut(
    words: str, stop: str, data: st.DataObject
) -> None:
    pieces = []
    rest = words
    while rest:
        length = data.draw(st.integers(1, 4))
        pieces.append(rest[:length])
        rest = rest[length:]
    stops = StopStrings([stop])
    out = "".join(push_all(stops, pieces))
    if stop in words:
        assert (out, stops.found) == (words[: words.index(stop)], stop)
    else:
        assert out + stops.release("") == words


@settings(max_examples=300, deadline=None)
@given(
    words=st.text("ab", max_size=20),
    marks=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
    cut=st.integers(0, 20),
)
def test_of_several_stops_all_are_found_as_if_the_text_were_searched_whole(
    words: str, marks: list[str], cut: int
) -> None:
    stops = StopStrings(marks)
    out = "".join(push_all(stops, [words[:cut], words[cut:]]))
    first = words[:cut] if any(mark in words[:cut] for mark in marks) else words
    hits = [(first.find(mark), -len(mark), mark) for mark in marks if mark in first]
    if hits:
        start, _, mark = min(hits)
        assert (out, stops.found) == (words[:start], mark)
    else:
        assert out + stops.release("") == words


def test_text_released_without_a_search_begins_no_stop() -> None:
    stops = StopStrings(["ab"])
    assert stops.release("a") == "a"
    assert stops.push("b") == "b" and stops.found is None


async def test_a_text_among_many_is_tokenized_off_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, calls = text(), []

    async def aside(*given: Any, **options: Any) -> Any:
        calls.append(given)
        return given[0](*given[1:], **options)

    monkeypatch.setattr("replica.api.text.asyncio.to_thread", aside)
    assert await reader.encode("ab") == await reader.encode("ab", among_many=True)
    assert len(calls) == 1


@pytest.mark.parametrize("large", [False, True])
async def test_large_inputs_are_rendered_and_decoded_off_the_event_loop(
    large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def on(method: Any) -> Any:
        def noted(*given: Any, **options: Any) -> Any:
            threads.append(threading.current_thread() is threading.main_thread())
            return method(*given, **options)

        return noted

    reader = text()
    monkeypatch.setattr(reader, "render_chat", on(reader.render_chat), raising=False)
    monkeypatch.setattr(reader, "decode", on(reader.decode), raising=False)
    content = "ab" * (INLINE_CHARACTERS if large else 2)
    call = {"function": {"arguments": {"x": content}}}
    for message in ({"role": "user", "content": content}, {"role": "user", "tool_calls": [call]}):
        await reader.render([{"content": "", **message}])
    tokens = [*reader.word_tokens(content), *reader.special]
    assert await reader.decode_long(tokens) == content
    assert threads == [not large] * 3
