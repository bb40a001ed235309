"""Finding the model's name in the prefix of a request's body that HAProxy forwards."""

import gzip
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from router.environment import MODEL_HEADER
from router.ingress import Ingress, find_model, inflated, prompt_tokens


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model": "fr", "prompt": "x"}', "fr"),
        (b'{"prompt":"x","model":"fr"}', "fr"),
        (b'\n {\t"model"\n:\r "fr" , "n": 1}', "fr"),
        (b'{"model": "org/fr-1.5"}', "org/fr-1.5"),
        (b'{"model": ""}', ""),
        ('{"model": "français"}'.encode(), "français"),
        (rb'{"model": "fran\u00e7ais \"q\" \\"}', 'français "q" \\'),
        (rb'{"mode\u006c": "fr"}', "fr"),
        # Other keys named `model`: in a message, a nested object, a list, a string.
        (b'{"messages": [{"role": "user", "content": "x", "model": "no"}]}', None),
        (b'{"messages": [{"model": "no"}], "model": "fr"}', "fr"),
        (b'{"options": {"model": "no"}, "model": "fr"}', "fr"),
        (rb'{"prompt": "say \"model\": \"no\"", "model": "fr"}', "fr"),
        (rb'{"prompt": "} ] \\", "model": "fr"}', "fr"),
        (rb'{"prompt": "\\\" , \"model\":\"no\" \\\\", "model": "fr"}', "fr"),
        (b'{"prompt": ["model", "no"], "model": "fr"}', "fr"),
        (b'{"stop": "model", "model": "fr"}', "fr"),
        (b'{"a": "model", "b": ": ", "model": "fr"}', "fr"),
        (b'["model", "no"]', None),
        (b'[{"model": "no"}]', None),
        # The last of several keys counts, as in the parser of the whole body.
        (b'{"model": "first", "model": "last"}', "last"),
        # Values that are no valid name.
        (b'{"model": 5}', None),
        (b'{"model": null}', None),
        (b'{"model": {"model": "no"}}', None),
        (b'{"model": ["no"]}', None),
        (rb'{"model": "\ud800"}', None),
        (b'{"model": "\xff"}', None),
        (rb'{"model": "\x"}', None),
        # Truncated, or not JSON.
        (b'{"model": "f', None),
        (b'{"model": "fr"', "fr"),
        (b'{"model"', None),
        (b'{"model":', None),
        (b'{"model": "fr", "prompt": "a { b [ c \\', "fr"),
        (b'{"prompt": "long { \\"model\\": \\"no', None),
        (b"", None),
        (b"{", None),
        (b'"', None),
        (b"model=fr", None),
        (b"\x00\xff\xfe}}}]]{{", None),
    ],
)
def test_only_the_top_level_model_is_found(body: bytes, model: str | None) -> None:
    assert find_model(body) == model


def test_every_prefix_gives_the_model_or_nothing() -> None:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": 'a "model": "no" \\ { ['}],
            "tools": {"model": "no"},
            "model": "fr",
            "stop": ["}", '"model": "no"'],
        }
    ).encode()
    found = [find_model(body[:length]) for length in range(len(body) + 1)]
    assert set(found) == {None, "fr"}
    assert found[-1] == "fr"


def test_a_model_behind_a_long_prompt_is_found_quickly() -> None:
    prompt = ("x" * 50 + '\\"model\\": \\"no\\" {') * 20_000
    body = b'{"prompt": "' + prompt.encode() + b'", "model": "fr"}'
    assert len(body) > 10**6
    # CPU time, so that other processes do not count. A quadratic scan would take hours.
    start_s = time.process_time()
    assert find_model(body) == "fr"
    assert find_model(body[:-40]) is None
    assert time.process_time() - start_s < 10


def test_a_model_behind_a_long_list_of_token_ids_is_found() -> None:
    body = json.dumps({"prompt": list(range(100_000)), "model": "fr"}).encode()
    assert find_model(body) == "fr"


@pytest.mark.parametrize(
    ("headers", "tokens"),
    [
        ([], 25),
        ([(b"x-body-truncated", b"100/4000")], 1000),
        ([(b"x-body-truncated", b"nonsense")], 25),
        ([(b"x-body-truncated", b"100/")], 25),
    ],
)
def test_a_truncated_body_counts_with_its_whole_size(
    headers: list[tuple[bytes, bytes]], tokens: int
) -> None:
    assert prompt_tokens({"headers": headers}, b"x" * 100) == tokens


def test_an_upload_of_files_is_no_prompt() -> None:
    headers = [(b"x-body-truncated", b"100/400000000")]
    assert prompt_tokens({"headers": headers}, b"--boundary\r\n" + b"x" * 100) == 0


class Handle:
    """A deployment's handle that remembers what it was asked and picks a fixed replica.

    looks: how often it says that it knows no replica yet.
    """

    def __init__(self, looks: int = 0) -> None:
        self.asked: list[tuple[str | None, int]] = []
        self.connected = False
        self.looks = looks

    def options(self) -> "Handle":
        self.connected = True
        return self

    def running_replicas_populated(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    @asynccontextmanager
    async def choose_replica(
        self, model: str | None, tokens: int, *, _reserve: bool
    ) -> AsyncIterator[Any]:
        self.asked.append((model, tokens))
        replica_id = SimpleNamespace(to_full_id_str=lambda: "r")
        yield SimpleNamespace(
            _replica=SimpleNamespace(backend_http_endpoint=("h", 1), replica_id=replica_id)
        )


@pytest.mark.parametrize(
    ("body", "named", "model"),
    [
        (b'{"prompt": "' + b"x" * 400, "fr", "fr"),
        (b'{"prompt": "' + b"x" * 400, None, None),
        (b'{"model": "de", "prompt": "x"}', "fr", "de"),
        (b"", "fran\u00e7ais", "fran\u00e7ais"),
        (b"", "", None),
    ],
)
async def test_a_header_names_the_model_of_a_body_that_hides_it(
    body: bytes, named: str | None, model: str | None
) -> None:
    handle = Handle()
    headers = [] if named is None else [(MODEL_HEADER.encode(), named.encode())]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    app = await Ingress(handle).__serve_build_asgi_app__()
    await app({"type": "http", "headers": headers}, receive, send)
    assert handle.asked == [(model, len(body) // 4)]
    assert json.loads(sent[1]["body"])["replica_id"] == "r"


async def test_a_router_serves_once_it_is_connected_and_knows_the_replicas() -> None:
    handle = Handle(looks=2)
    ingress = Ingress(handle)
    assert handle.connected
    await ingress.__serve_build_asgi_app__()
    assert handle.looks < 0


async def test_a_router_without_replicas_serves_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.ingress._REPLICAS_S", 0.0)
    assert await Ingress(Handle(looks=10**9)).__serve_build_asgi_app__()


def test_the_model_of_a_compressed_body_is_found_in_what_its_start_inflates_to() -> None:
    body = b'{"model": "fr", "prompt": "' + bytes(range(97, 123)) * 9999
    packed = gzip.compress(body)
    for part in (packed, packed[:100]):
        assert find_model(inflated(part)) == "fr"
    assert inflated(body) == body
    assert len(inflated(gzip.compress(bytes(2**24)))) == 2**18
    assert find_model(inflated(b"\x1f\x8b no gzip")) is None
