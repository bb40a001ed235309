"""Adapters' chat templates render as in transformers, in a process that can be killed."""

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import AdapterFailed, BadRequest
from replica.api import template_process
from replica.api.template_process import TemplateOverrun, TemplateProcess, _Overrun
from replica.api.text import OwnTemplate, Text
from tests.models import write_tokenizer
from tests.until import TIMEOUT_S

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BOMB = (
    "{% set n = namespace(x='a' * 999) %}"
    "{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
)
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be\r\nkind.", "name": None},
    {"role": "user", "content": "h\u00e9 \U0001f600 <|end|>"},
    {"role": "assistant", "content": "an answer", "reasoning": "thought"},
]
TOOL = {"type": "function", "function": {"name": "f\u00fc", "parameters": {"type": "object"}}}
KILLED = "__import__('os').kill(__import__('os').getpid(), 9)"
WHOLE = """{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
  {% for message in messages %}
    {%- if loop.index > 5 %}{% break %}{% endif %}
{{ bos_token }}{{ message.role }}|{{ message.name is defined }}|{{ message['content'] }}
    {%- if message.reasoning_content %}<think>{{ message.thinking }}{% endif %}{{ eos_token }}
  {% endfor %}
{% generation %}{{ strftime_now("%Y") }}{% endgeneration %}{{ mood | default("calm") }}
{% if add_generation_prompt %}<|assistant|>{% endif %}
"""


@pytest.fixture(scope="module")
def text() -> Iterator[Text]:
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(Path(directory))
        yield Text.read(directory)


@pytest.fixture(scope="module")
def process() -> TemplateProcess:
    return TemplateProcess()


def request(*messages: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"special_tokens": {}, "messages": messages or CHAT[1:2], "options": options}


@pytest.mark.parametrize(
    ("template", "options"),
    [
        (WHOLE, {}),
        (WHOLE, {"add_generation_prompt": False}),
        (WHOLE, {"tools": [TOOL]}),
        (WHOLE, {"template_arguments": {"mood": "bright", "bos_token": "other"}}),
        (WHOLE, {"add_generation_prompt": False, "continue_final_message": True}),
        ("{{ messages | length }}\n\n", {}),
    ],
)
async def test_it_renders_what_the_base_models_tokenizer_would(
    text: Text, template: str, options: dict[str, Any]
) -> None:
    given = {"add_generation_prompt": True, **options}
    arguments = given.pop("template_arguments", {})
    expected = text._tokenizer.apply_chat_template(
        CHAT, chat_template=template, tokenize=False, **given, **arguments
    )
    assert await text.render(CHAT, OwnTemplate("a", template), **options) == expected


async def test_what_a_template_refuses_names_the_adapter(text: Text) -> None:
    own = OwnTemplate("mine", "{{ raise_exception('no system') }}")
    with pytest.raises(BadRequest) as caught:
        await text.render(CHAT, own)
    expected = "messages: refused by the chat template of the adapter 'mine': no system"
    assert (caught.value.message, caught.value.field) == (expected, "messages")
    with pytest.raises(BadRequest, match="empty conversation"):
        await text.render([], own)
    with pytest.raises(BadRequest) as caught:
        await text.render(CHAT, own, template_arguments={"tokenize": True})
    assert caught.value.field == "chat_template_kwargs.tokenize"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ cycler.__init__.__globals__.os.environ }}", "access to attribute '__init__'"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ range(999999) }}", "Range too big"),
        ("{{ raise_exception('x' * 99999) }}", "^x{1000}$"),
    ],
)
async def test_the_sandbox_is_transformers_own(
    process: TemplateProcess, template: str, reason: str
) -> None:
    with pytest.raises(BadRequest, match=reason):
        await process.render(template, request())


async def test_the_process_has_no_keys_and_nobodys_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORAFLEET_ADMIN_KEYS", "sk-secret")
    process = TemplateProcess()
    assert await process.render("x", request()) == "x"
    assert process._child is not None
    proc = Path("/proc", str(process._child._popen.pid))
    assert b"sk-secret" not in (proc / "environ").read_bytes()
    assert {os.readlink(proc / "fd" / n) for n in "12"} == {"/dev/null"}


async def test_an_endless_template_is_refused_and_others_go_on() -> None:
    process = TemplateProcess()
    assert await process.render("before", request()) == "before"
    first = asyncio.create_task(process.render(ENDLESS, request()))
    again = asyncio.create_task(process.render(ENDLESS, request()))
    await asyncio.sleep(0)
    assert await asyncio.wait_for(process.render("other", request()), TIMEOUT_S) == "other"
    with pytest.raises(TemplateOverrun, match=r"longer than 2 s; its .* refused for 60 s"):
        await first
    child = process._child
    with pytest.raises(TemplateOverrun, match="it took longer than 2 s"):
        await again
    with pytest.raises(TemplateOverrun, match="it took longer than 2 s"):
        await process.render(ENDLESS, request())
    assert process._child is child and child is not None, "it was not tried again"


async def test_a_refused_template_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    process = TemplateProcess()
    process._overruns["x"] = _Overrun(time.monotonic() + TIMEOUT_S, "it took long", 0)
    with pytest.raises(TemplateOverrun):
        await process.render("x", request())
    process._overruns["x"] = _Overrun(time.monotonic(), "it took long", 0)
    assert await process.render("x", request()) == "x"
    assert process._overruns == {}


async def test_one_huge_chat_leaves_the_templates_small_ones() -> None:
    process = TemplateProcess()
    template = "{% for m in messages %}{% if m.n %}" + ENDLESS + "{% endif %}{% endfor %}fine"
    huge = {"role": "user", "content": "x" * 1000, "n": 1}
    assert await process.render(template, request()) == "fine"
    with pytest.raises(TemplateOverrun, match="longer than 2 s"):
        await process.render(template, request(huge))
    assert await process.render(template, request()) == "fine"
    with pytest.raises(TemplateOverrun, match="longer than 2 s"):
        await process.render(template, request({"role": "user", "content": "x" * 600}))


@pytest.mark.parametrize("template", [BOMB, "{{ 'x' * 999999999 }}"])
async def test_a_template_that_fills_memory_is_refused(template: str) -> None:
    process = TemplateProcess()
    with pytest.raises(TemplateOverrun, match="it took more than 512 MiB"):
        await process.render(template, request())
    assert await process.render("x", request()) == "x"


async def test_a_process_that_was_killed_is_started_again(process: TemplateProcess) -> None:
    assert await process.render("x", request()) == "x"
    assert process._child is not None
    process._child._popen.kill()
    process._child._popen.wait()
    assert await process.render("x", request()) == "x"


async def test_a_template_is_not_blamed_for_who_kills_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = str(tmp_path / "killed")
    killed = f"(open({mark!r}, 'w'), {KILLED})"
    answer = f"request[:8] + b'rdone' if __import__('os').path.exists({mark!r}) else {killed}"
    monkeypatch.setattr(template_process, "_CHILD", script(tmp_path, answer))
    process = TemplateProcess()
    assert await process.render("x", request()) == "done"
    assert process._overruns == {}


async def test_a_process_that_is_always_killed_is_the_templates_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_process, "_CHILD", script(tmp_path, KILLED))
    with pytest.raises(TemplateOverrun, match="or broke its process"):
        await TemplateProcess().render("x", request())


async def test_compiled_templates_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "KEPT_BYTES_MAX", 64 * 2**20)
    process = TemplateProcess()
    kept = []
    for i in range(3):  # Jinja computes constants when it compiles
        template = f"{{% set x = '{i} ' * 10000000 %}}{{{{ x | length }}}}"
        assert await process.render(template, request()) == "20000000"
        kept.append(process._child is not None)
    assert kept == [True, False, True]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("\ud800", "surrogates not allowed"),
        ("{{ raise_exception('\\ud800') }}", r"^\\ud800$"),
    ],
)
async def test_half_a_character_is_refused(
    process: TemplateProcess, template: str, reason: str
) -> None:
    with pytest.raises(BadRequest, match=reason):
        await process.render(template, request())


async def test_requests_have_a_limit(process: TemplateProcess) -> None:
    long = {"role": "user", "content": "x" * template_process.REQUEST_BYTES_MAX}
    with pytest.raises(BadRequest, match="bytes of JSON, the maximum is 16777216"):
        await process.render("x", request(long))
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"content": deep}
    with pytest.raises(BadRequest, match="nested too deep"):
        await process.render("x", request(deep))
    long = {"role": "user", "content": "x" * 10_000_000}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert await process.render(template, request(long)) == long["content"]


def script(tmp_path: Path, answer: str) -> Path:
    """A process that answers each request with this expression."""
    path = tmp_path / "child.py"
    path.write_text(
        "import sys\n"
        "def send(data):\n"
        "    with open(0, 'wb', closefd=False) as out: out.write(len(data).to_bytes(4) + data)\n"
        "send(b'ready')\n"
        "while length := sys.stdin.buffer.read(4):\n"
        "    request = sys.stdin.buffer.read(int.from_bytes(length))\n"
        f"    send({answer})\n"
    )
    return path


@pytest.mark.parametrize(
    "answer", ["bytes(8) + b'rstolen'", "request[:8] + b'r\\xff'", "b''", "bytes(2**27)"]
)
async def test_an_answer_to_another_request_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(template_process, "_CHILD", script(tmp_path, answer))
    process = TemplateProcess()
    with pytest.raises(TemplateOverrun, match="or broke its process"):
        await process.render("x", request())
    assert process._child is None


async def test_a_process_that_does_not_start_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_process, "_CHILD", tmp_path / "nothing.py")
    with pytest.raises(AdapterFailed, match=r"did not start \(exit status 2\)"):
        await TemplateProcess().render("x", request())


async def test_a_process_that_cannot_be_started_is_not_the_templates_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = TemplateProcess()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(AdapterFailed, match=r"did not start \(.*No such file"):
            await process.render("x", request())
    assert await process.render("x", request()) == "x"


def test_templates_that_are_added_are_queued_one_at_a_time(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)

    def submit(*_: object) -> Future[tuple[bytes, str]]:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)
            pytest.fail("two are in the queue, and a chat waits for both")
        done = Future[tuple[bytes, str]]()
        done.set_result((b"r", ""))
        return done

    monkeypatch.setattr(process._thread, "submit", submit)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(process.syntax_error, "ab")) == [None, None]


def test_a_syntax_error_has_its_line(process: TemplateProcess) -> None:
    assert process.syntax_error("a\n{% if %}") == (
        "line 2: Expected an expression, got 'end of statement block'"
    )
    assert process.syntax_error("{{ x | nothing }}") == "line 1: No filter named 'nothing'."
    for fine in ("{{ raise_exception('never') }}", "{{ 1 / 0 }}", json.dumps(CHAT)):
        assert process.syntax_error(fine) is None
