"""Requests of adapters that add tokens have those tokens, and nobody else has."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.adapter_paths import (
    ADDED_FILE,
    CONFIG_FILE,
    TEMPLATE_FILE,
    TENSORS_FILE,
    TOKENIZER_FILE,
    VOCABULARY_FILE,
)
from cluster.config import FleetConfig
from cluster.values import AddedToken
from replica.api import call
from replica.api.interfaces import Claim
from replica.api.server import build_app
from replica.serving.local_catalog import LocalCatalog
from tests.models import edit_config
from tests.serving import BASE, CONFIG, client_of, text
from tests.small_files import settled_config, write_adapter, write_model_config
from tests.stub_engine import StubEngine
from tests.until import until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# The same texts with other ids, and the same ids with other texts.
TOKENS: Mapping[str, Mapping[str, int]] = {
    "one": {"<a>": 300, "<b>": 301, "<c>": 302},
    "two": {"<a>": 301, "<b>": 300, "<d>": 302},
    "three": {"<a>": 5, "<e>": 300},  # 5 is <|pad|> of the base model
}
WORDS = "x<a><b>y<c><d><e>"
TEMPLATE = "{% for m in messages %}<a>{{ m.content }}<b>{% endfor %}"
H, LETTER_I = text().word_tokens("hi")
SCRIPT = [H, 300, 301, LETTER_I, 302, 5, 303]
# Without the base model's padding token.
SHOWN = [token for token in SCRIPT if token != 5]


def expected(model: str, words: str = WORDS) -> list[int]:
    """The texts of the adapter's tokens never overlap, so that they can be cut out in any order."""
    for mark, token in TOKENS.get(model, {}).items():
        before, found, after = words.partition(mark)
        if found:
            return [*expected(model, before), token, *expected(model, after)]
    return list(text().word_tokens(words))


def decoded(model: str, tokens: list[int]) -> str:
    own = {token: mark for mark, token in TOKENS.get(model, {}).items()}
    return "".join(own.get(t, text().token_bytes(t).decode()) for t in tokens)


class Replica:
    """A catalog and the app over it. All adapters have the same tensors, and the same answers."""

    def __init__(self, tmp_path: Path) -> None:
        model = write_model_config(tmp_path / "base")
        edit_config(model, vocab_size=320)
        self._directory = tmp_path / "adapters"
        self.engine = StubEngine(script=SCRIPT)
        config = FleetConfig(settled_config(model), directory=str(tmp_path / "fleet"))
        self.catalog = LocalCatalog(self.engine, config, text=text())
        self.app = build_app(self.engine, self.catalog, text(), replace(CONFIG, context=10**4))

    def path(self, name: str, tokens: Mapping[str, int], **settings: Any) -> Path:
        path = Path(write_adapter(self._directory / name))
        (path / TOKENIZER_FILE).write_text(json.dumps(settings))
        (path / ADDED_FILE).write_text(json.dumps(tokens))
        return path

    async def add(self, name: str, tokens: Mapping[str, int], **settings: Any) -> str:
        path = str(self.path(name, tokens, **settings))
        return (await self.catalog.add(name, path, trusted=True, load_inplace=True)).digest

    async def post(self, path: str, **body: Any) -> Any:
        answer = await self.answer(path, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def answer(self, path: str, **body: Any) -> httpx.Response:
        async with client_of(self.app) as client:
            return await client.post(path, json=body)

    async def choice(self, model: str, **body: Any) -> dict[str, Any]:
        body = {"model": model, "prompt": WORDS, "max_tokens": 7} | body
        found: dict[str, Any] = (await self.post(COMPLETIONS, **body))["choices"][0]
        return found

    async def streamed(self, model: str, **body: Any) -> str:
        body = {"model": model, "prompt": WORDS, "max_tokens": 7, "stream": True} | body
        answer = await self.answer(COMPLETIONS, **body)
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


@pytest.fixture
async def replica(tmp_path: Path) -> Replica:
    replica = Replica(tmp_path)
    for name, tokens in TOKENS.items():
        await replica.add(name, tokens)
    await replica.add("plain", {})
    return replica


MODELS = (*TOKENS, "plain", BASE)


async def test_in_one_batch_each_request_has_the_tokens_of_its_adapter(replica: Replica) -> None:
    replica.engine.hold = True
    asked = [asyncio.create_task(replica.choice(model)) for model in MODELS * 3]
    await until(lambda: len(replica.engine.running) == len(asked))
    replica.engine.hold = False
    answers = await asyncio.gather(*asked)
    digests = {version.name: version.digest for version in replica.catalog.versions()}
    for model, answer in zip(MODELS * 3, answers, strict=True):
        assert answer["text"] == decoded(model, SCRIPT if model == "three" else SHOWN)
        seen = [r for r in replica.engine.seen if r.digest == digests.get(model)]
        assert {request.prompt for request in seen} == {tuple(expected(model))}
    assert len({tuple(expected(model)) for model in MODELS}) == 4


@pytest.mark.parametrize("model", MODELS)
async def test_every_text_of_an_answer_has_them(replica: Replica, model: str) -> None:
    whole = decoded(model, SCRIPT)
    options = {"skip_special_tokens": False}
    assert await replica.streamed(model, **options) == whole
    answer = await replica.choice(model, **options, echo=True, logprobs=2, return_token_ids=True)
    assert answer["text"] == WORDS + whole
    assert answer["prompt_token_ids"] == expected(model)
    each = [decoded(model, [token]) for token in (*expected(model), *SCRIPT)]
    assert answer["logprobs"]["tokens"] == each
    starts = [len("".join(each[:i])) for i in range(len(each))]
    assert answer["logprobs"]["text_offset"] == starts
    assert set(answer["logprobs"]["top_logprobs"][-6]) == {
        decoded(model, [token]) for token in (300, 301)
    }
    listed = await replica.choice(model, echo=True, prompt=expected(model), **options)
    assert listed["text"].endswith(whole)
    assert decoded(model, expected(model)).replace("<|pad|>", "") in listed["text"]
    told = (await replica.choice(model, prompt_logprobs=0))["prompt_logprobs"]
    names = [next(iter(row.values()))["decoded_token"] for row in told[1:]]
    assert names == [decoded(model, [token]) for token in expected(model)[1:]]


@pytest.mark.parametrize("model", MODELS)
async def test_so_have_sglangs_endpoint_and_those_of_texts(replica: Replica, model: str) -> None:
    params = {"max_new_tokens": 7, "skip_special_tokens": False}
    body: dict[str, Any] = {"text": WORDS, "sampling_params": params, "lora_path": model}
    if model == BASE:
        del body["lora_path"]
    found = await replica.post(
        "/generate", **body, return_logprob=True, return_text_in_logprobs=True
    )
    assert found["text"] == decoded(model, SCRIPT)
    names = [entry[2] for entry in found["meta_info"]["output_token_logprobs"]]
    assert names == [decoded(model, [token]) for token in SCRIPT]
    cut = await replica.post("/tokenize", model=model, prompt=WORDS, return_token_strs=True)
    assert cut["tokens"] == expected(model)
    assert cut["token_strs"] == [decoded(model, [token]) for token in expected(model)]
    back = await replica.post("/detokenize", model=model, tokens=[*cut["tokens"], 300, 5])
    assert back["prompt"] == WORDS + decoded(model, [300, 5])
    embedded = await replica.post("/v1/embeddings", model=model, input=WORDS)
    assert embedded["usage"]["prompt_tokens"] == len(expected(model))
    assert replica.engine.seen[-1].prompt == tuple(expected(model))


@pytest.mark.parametrize("model", MODELS)
async def test_chats_and_their_stops_have_them(replica: Replica, model: str) -> None:
    ask = {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 7}
    answer = (await replica.post(CHAT, model=model, **ask, stop="<b>", logprobs=True))["choices"][0]
    prompt = expected(model, f"<|begin|><|user|>{WORDS}<|end|><|assistant|>")
    assert replica.engine.seen[-1].prompt == tuple(prompt)
    whole = decoded(model, SCRIPT if model == "three" else SHOWN)
    assert answer["message"]["content"] == whole.partition("<b>")[0]
    assert answer["stop_reason"] == ("<b>" if "<b>" in whole else None)
    chat = await replica.post("/tokenize", model=model, messages=ask["messages"])
    assert chat["tokens"] == prompt
    response = await replica.post("/v1/responses", model=model, input=WORDS, max_output_tokens=16)
    assert replica.engine.seen[-1].prompt == tuple(prompt)
    said = response["output"][0]["content"][0]["text"]
    assert said.startswith(whole)


async def test_bad_words_and_biases_are_its_ids(replica: Replica) -> None:
    for model in TOKENS:
        await replica.choice(model, bad_words=["<a>"], logit_bias={"302": 5}, stop_token_ids=[302])
        sampling = replica.engine.seen[-1].sampling
        assert sampling.bad_words[0] == (TOKENS[model]["<a>"],)
        assert sampling.logit_bias == ((302, 5.0),)


async def test_its_own_special_tokens_are_skipped_and_its_eos_token_ends_answers(
    replica: Replica,
) -> None:
    settings = {"eos_token": "<b>", "additional_special_tokens": ["<a>"]}
    await replica.add("four", TOKENS["one"], **settings)
    answer = await replica.choice("four")
    assert (answer["text"], answer["finish_reason"]) == ("h", "stop")
    more = await replica.choice("four", ignore_eos=True, skip_special_tokens=False)
    assert more["text"] == "h<a><b>i<c><|pad|>"
    assert (await replica.choice("four", ignore_eos=True))["text"] == "hi<c>"
    # Others have the same ids.
    assert (await replica.choice("one"))["text"] == "h<a><b>i<c>"


async def test_a_long_text_of_few_tokens_is_no_long_prompt(replica: Replica) -> None:
    long = "<" + "x" * 100 + ">"
    await replica.add("four", {long: 300})
    answer = await replica.choice("four", prompt=long * 2000, return_token_ids=True)
    assert answer["prompt_token_ids"] == [300] * 2000


async def test_its_own_template_writes_them(replica: Replica) -> None:
    path = replica.path("four", TOKENS["two"])
    (path / TEMPLATE_FILE).write_text(TEMPLATE)
    await replica.catalog.add("four", str(path), trusted=True)
    ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    await replica.post(CHAT, model="four", **ask)
    assert replica.engine.seen[-1].prompt == (301, H, LETTER_I, 300)


async def test_a_name_that_is_re_pointed_has_the_new_tokens(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = expected("one"), expected("two")
    assert (await replica.choice("one", return_token_ids=True))["prompt_token_ids"] == tokens[0]
    claim, adding = replica.catalog.claim, list[asyncio.Task[str]]()
    old = (await replica.catalog.find("one")).digest  # type: ignore[union-attr]

    async def then_re_pointed(name: str) -> Claim | None:
        claimed = await claim(name)
        adding.append(asyncio.create_task(replica.add("one", TOKENS["two"])))
        await until(lambda: old not in {v.digest for v in replica.catalog.versions()})
        return claimed

    with monkeypatch.context() as patched:
        patched.setattr(replica.catalog, "claim", then_re_pointed)
        answer = await replica.choice("one", return_token_ids=True)
    assert answer["prompt_token_ids"] == tokens[0]
    assert answer["text"] == decoded("one", SHOWN)
    await adding[0]
    answer = await replica.choice("one", return_token_ids=True)
    assert answer["prompt_token_ids"] == tokens[1]
    assert answer["text"] == decoded("two", SHOWN)


async def test_more_adapters_than_are_kept_in_memory(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "TEMPLATES_KEPT", 1)
    for _ in range(2):
        for model in TOKENS:
            found = await replica.post("/tokenize", model=model, prompt=WORDS)
            assert found["tokens"] == expected(model)


async def test_files_that_a_client_sends_may_have_them(replica: Replica) -> None:
    path = replica.path("sent", {})
    (path / ADDED_FILE).unlink()
    added = [{"id": 300, "content": "<a>", "normalized": False}]
    head = json.dumps({"added_tokens": added, "model": {"vocab": {}}})
    (path / VOCABULARY_FILE).write_text(head + " " * 5 * 2**20)
    names = (TENSORS_FILE, CONFIG_FILE, VOCABULARY_FILE)
    async with client_of(replica.app) as client:
        files = [("files", (name, (path / name).read_bytes())) for name in names]
        sent = await client.post("/v1/load_lora_adapter", data={"lora_name": "sent"}, files=files)
        assert sent.status_code == 200, sent.text
        files[2] = ("files", (ADDED_FILE, b'{"<x>": 320}'))
        wrong = await client.post("/v1/load_lora_adapter", data={"lora_name": "bad"}, files=files)
    assert wrong.status_code == 400
    assert "adds tokens '<x>' (320) beyond the base model's 320" in wrong.json()["error"]["message"]
    found = await replica.post("/tokenize", model="sent", prompt="h<a>")
    assert found["tokens"] == [H, 300]
    by_path = await replica.catalog.add("path", str(path), trusted=True)
    assert by_path.digest == sent.headers["x-lorafleet-digest"]


TEACHES = """{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}<think></think>
{%- for m in messages %}{{ m.content }}{% endfor %}"""
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALLED = '{"name": "f", "arguments": {"x": 1}}'


@pytest.mark.parametrize("special", [False, True])
async def test_marks_of_thoughts_and_calls_may_be_its_own_tokens(
    replica: Replica, special: bool
) -> None:
    marks = {"<think>": 300, "</think>": 301, "<tool_call>": 302, "</tool_call>": 303}
    settings = {"additional_special_tokens": list(marks)} if special else {}
    path = replica.path("four", marks, **settings)
    (path / TEMPLATE_FILE).write_text(TEACHES)
    await replica.catalog.add("four", str(path), trusted=True)
    called = text().word_tokens(CALLED)
    ask = {"messages": [{"role": "user", "content": "hi"}], "model": "four"}
    replica.engine.script = (300, H, 301, 302, *called, 303, 1)
    tools = {"tools": [TOOL], "max_tokens": len(called) + 5}
    message = (await replica.post(CHAT, **ask, **tools))["choices"][0]["message"]
    assert message["reasoning_content"] == "h"
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"x": 1}'}
    replica.engine.script = (302, *called, 303, 1)
    await replica.answer(CHAT, **ask, **tools, tool_choice="required")
    assert "start: (<[302]>" in str(replica.engine.seen[-1].sampling.grammar)
    (path / TEMPLATE_FILE).write_text(TEACHES.replace("<think></think>", ""))
    await replica.catalog.add("five", str(path), trusted=True)
    answer = await replica.post(CHAT, **ask | {"model": "five"}, **tools)
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"] == call["function"]
    replica.engine.script = (300, H, 301, LETTER_I)
    plain = (await replica.post(CHAT, **ask, max_tokens=4))["choices"][0]["message"]
    assert (plain["reasoning_content"], plain["content"]) == ("h", "i")


async def test_each_version_is_read_once(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    read, digests = replica.catalog.added_tokens, list[str]()

    def noted(digest: str) -> list[AddedToken]:
        digests.append(digest)
        return read(digest)

    monkeypatch.setattr(replica.catalog, "added_tokens", noted)
    for model in (*TOKENS, *TOKENS):
        await replica.choice(model)
    assert len(digests) == len(set(digests)) == len(TOKENS)


async def test_requests_without_any_share_the_base_models(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> Any:
        raise AssertionError("it was made or read")

    monkeypatch.setattr(replica.catalog, "added_tokens", refuses)
    monkeypatch.setattr(type(text()), "with_added", refuses)
    for model in ("plain", BASE):
        assert (await replica.choice(model))["text"] == decoded(model, SHOWN)
