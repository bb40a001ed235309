"""Chats with an adapter that brings its own chat template, and what else it says of chats."""

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.adapter_paths import CONFIG_FILE, TEMPLATE_FILE, TENSORS_FILE, TOKENIZER_FILE
from cluster.config import FleetConfig
from replica.api.interfaces import Claim
from replica.api.server import build_app
from replica.api.template_process import TemplateProcess
from replica.api.text import INLINE_CHARACTERS
from replica.serving.local_catalog import LocalCatalog
from tests.models import SPECIAL_TOKENS
from tests.serving import BASE, CONFIG, client_of, text
from tests.small_files import settled_config, write_adapter, write_model_config
from tests.stub_engine import StubEngine
from tests.until import TIMEOUT_S, until

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "hi"}]
PAD = SPECIAL_TOKENS.index("<|pad|>")
PLAIN = "<|begin|><|user|>hi<|end|><|assistant|>"
SQUARE = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ eos_token }}"
ROUND = SQUARE.replace("[", "(").replace("]", ")")
# Endless for one that asks for it, so that it can be added.
ENDLESS = (
    "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}fine"
)
TEACHES = """{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}<think></think>
{%- for m in messages %}{{ m.content }}{% endfor %}"""
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


class Replica:
    """A catalog and the app over it. All adapters have the same tensors."""

    def __init__(self, tmp_path: Path) -> None:
        engine = settled_config(write_model_config(tmp_path / "base"))
        self._directory = tmp_path / "adapters"
        self.config = FleetConfig(engine, directory=str(tmp_path / "fleet"))
        self.engine = StubEngine(script=(10, PAD, 11, 12))
        self.catalog = LocalCatalog(self.engine, self.config, text=text())
        self.app = build_app(self.engine, self.catalog, text(), replace(CONFIG, context=10**4))

    def path(self, name: str, template: str | None = None, eos_token: str | None = None) -> Path:
        path = Path(write_adapter(self._directory / name))
        if template is not None:
            (path / TEMPLATE_FILE).write_text(template)
        (path / TOKENIZER_FILE).write_text(json.dumps({"eos_token": eos_token}))
        return path

    async def add(self, name: str, template: str | None = None, **settings: Any) -> str:
        path = self.path(name, template, settings.pop("eos_token", None))
        done = await self.catalog.add(name, str(path), trusted=True, **settings)
        return done.digest

    async def post(self, path: str, **body: Any) -> httpx.Response:
        async with client_of(self.app) as client:
            return await client.post(path, json=body)

    async def prompt(self, model: str, path: str = CHAT, **body: Any) -> str:
        """The text that the engine got."""
        asked = {"input": "hi"} if path == "/v1/responses" else {"messages": ASK}
        answer = await self.post(path, model=model, **asked, **body)
        assert answer.status_code == 200, answer.text
        return text().decode(self.engine.seen[-1].prompt, skip_special_tokens=False)


@pytest.fixture
def replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replica:
    # A process for each test, without templates that were refused before.
    monkeypatch.setattr(text(), "_templates", TemplateProcess())
    return Replica(tmp_path)


@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
async def test_each_adapters_chats_have_its_own_template(replica: Replica, path: str) -> None:
    digests = {await replica.add(n, t) for n, t in (("a", SQUARE), ("b", ROUND), ("c", None))}
    assert len(digests) == 3, "the same tensors with other templates are other versions"
    for _ in range(2):
        assert await replica.prompt("a", path) == "[hi]<|end|>"
        assert await replica.prompt(BASE, path) == PLAIN
        assert await replica.prompt("b", path) == "(hi)<|end|>"
        assert await replica.prompt("c", path) == PLAIN


async def test_its_template_writes_its_own_eos_token(replica: Replica) -> None:
    await replica.add("a", SQUARE, eos_token="<|pad|>")
    assert await replica.prompt("a") == "[hi]<|pad|>"
    await replica.add("b", SQUARE)
    assert await replica.prompt("b") == "[hi]<|end|>"


async def test_tokenize_has_it_too(replica: Replica) -> None:
    await replica.add("a", SQUARE)
    for model, expected in (("a", "[hi]<|end|>"), (BASE, PLAIN), (None, PLAIN)):
        answer = await replica.post("/tokenize", model=model, messages=ASK)
        assert text().decode(answer.json()["tokens"], skip_special_tokens=False) == expected
    assert (await replica.post("/tokenize", model="nobody", messages=ASK)).status_code == 404
    assert (await replica.post("/tokenize", model="nobody", prompt="hi")).status_code == 404
    assert (await replica.post("/detokenize", model="nobody", tokens=[9])).status_code == 404
    # And holds the version no longer.
    await asyncio.wait_for(replica.catalog.remove("a"), 60)


async def test_a_name_that_is_re_pointed_has_the_new_template(replica: Replica) -> None:
    await replica.add("a", SQUARE)
    assert await replica.prompt("a") == "[hi]<|end|>"
    await replica.add("a", ROUND, load_inplace=True)
    assert await replica.prompt("a") == "(hi)<|end|>"
    (replica.path("a") / TEMPLATE_FILE).unlink()
    await replica.catalog.add("a", str(replica.path("a")), trusted=True, load_inplace=True)
    assert await replica.prompt("a") == PLAIN


async def test_a_request_has_the_template_of_the_version_that_it_claimed(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await replica.add("a", SQUARE)
    claim, adding = replica.catalog.claim, list[asyncio.Task[str]]()

    async def then_re_pointed(name: str) -> Claim | None:
        claimed = await claim(name)
        adding.append(asyncio.create_task(replica.add("a", ROUND, load_inplace=True)))
        await until(lambda: replica.catalog.versions()[0].digest != old)
        return claimed

    with monkeypatch.context() as patched:
        patched.setattr(replica.catalog, "claim", then_re_pointed)
        assert await replica.prompt("a") == "[hi]<|end|>"
    assert replica.engine.seen[-1].digest == old
    await adding[0]
    assert await replica.prompt("a") == "(hi)<|end|>"


async def test_files_that_a_client_sends_may_have_a_template(replica: Replica) -> None:
    path = replica.path("sent", SQUARE, "<|pad|>")
    names = (TENSORS_FILE, TEMPLATE_FILE, CONFIG_FILE, TOKENIZER_FILE)
    async with client_of(replica.app) as client:
        files = [("files", (name, (path / name).read_bytes())) for name in names]
        answer = await client.post("/v1/load_lora_adapter", data={"lora_name": "sent"}, files=files)
        assert answer.status_code == 200, answer.text
        files[1] = ("files", (TEMPLATE_FILE, b"x\n\n{% if %}"))
        wrong = await client.post("/v1/load_lora_adapter", data={"lora_name": "bad"}, files=files)
    assert wrong.status_code == 400
    assert "has a chat template that cannot be used: line 3: " in wrong.json()["error"]["message"]
    assert await replica.prompt("sent") == "[hi]<|pad|>"
    (version,) = replica.catalog.versions()
    assert version.eos_token == PAD
    by_path = await replica.catalog.add("path", str(path), trusted=True)
    assert by_path.digest == version.digest


async def test_a_store_that_is_opened_again_has_it_still(replica: Replica, tmp_path: Path) -> None:
    digest = await replica.add("a", SQUARE)
    await replica.catalog.stop()
    (tmp_path / "fleet" / "adapters" / ".boot").write_text("an earlier start of the machine")
    again = Replica(tmp_path)
    assert await again.add("a", SQUARE) == digest
    assert await again.prompt("a") == "[hi]<|end|>"


async def test_an_endless_template_holds_up_nobody(replica: Replica) -> None:
    await replica.add("endless", ENDLESS)
    await replica.add("a", SQUARE)
    assert await replica.prompt("endless") == "fine"
    loop = {"model": "endless", "messages": [{"role": "user", "content": "loop"}]}
    asking = asyncio.create_task(replica.post(CHAT, **loop))
    assert await replica.prompt(BASE) == PLAIN
    assert not asking.done(), "chats of the base model did not wait"
    assert await replica.prompt("a") == "[hi]<|end|>"
    for answer in (await asking, await replica.post(CHAT, **loop)):
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "model")
        assert "the chat template of the adapter 'endless': it took longer" in error["message"]
    # What needs no template goes on.
    body = {"model": "endless", "prompt": "hi"}
    assert (await replica.post("/v1/completions", **body)).status_code == 200


async def test_adapters_that_take_long_to_check_leave_chats_their_threads(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, checked = threading.Event(), TemplateProcess.syntax_error

    def waits(process: TemplateProcess, template: str) -> str | None:
        assert ends.wait(TIMEOUT_S)
        return checked(process, template)

    monkeypatch.setattr(TemplateProcess, "syntax_error", waits)
    adding = [asyncio.create_task(replica.add(f"a{i}", f"{SQUARE}{i}")) for i in range(40)]
    try:
        long = "x" * (INLINE_CHARACTERS + 1)
        asked = replica.post("/tokenize", model=BASE, prompt=long)
        assert (await asyncio.wait_for(asked, TIMEOUT_S / 2)).status_code == 200
        assert not any(task.done() for task in adding)
    finally:
        ends.set()
    await asyncio.gather(*adding)
    assert len(replica.catalog.versions()) == 40


async def test_its_template_tells_how_it_calls_tools_and_thinks(replica: Replica) -> None:
    await replica.add("a", SQUARE)
    await replica.add("b", TEACHES)
    answer = await replica.post(CHAT, model="a", messages=ASK, tools=TOOLS)
    assert "knows no tools" in answer.json()["error"]["message"]
    assert (await replica.prompt("b", tools=TOOLS)).startswith('[{"type": "function"')
    answer = await replica.post(CHAT, model="b", messages=ASK)
    assert "reasoning_content" in answer.json()["choices"][0]["message"]
    answer = await replica.post(CHAT, model="a", messages=ASK)
    assert "reasoning_content" not in answer.json()["choices"][0]["message"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_its_eos_token_ends_its_answers(replica: Replica, path: str) -> None:
    await replica.add("a", eos_token="<|pad|>")
    await replica.add("b")

    async def reason(model: str, **body: Any) -> tuple[str, int]:
        body |= {"messages": ASK} if path == CHAT else {"prompt": "hi"}
        answer = (await replica.post(path, model=model, max_tokens=4, **body)).json()
        return answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]

    assert await reason("a") == ("stop", 2)
    assert await reason("b") == await reason(BASE) == ("length", 4)
    assert await reason("a", ignore_eos=True) == ("length", 4)
    assert await reason("a", min_tokens=3) == ("length", 4)
