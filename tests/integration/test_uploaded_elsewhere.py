"""What a client uploaded to one node reaches replicas of the others, and nobody else."""

import dataclasses
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from cluster.adapter_paths import ADDED_FILE, CONFIG_FILE, TEMPLATE_FILE, TENSORS_FILE, files_of
from cluster.config import FleetConfig
from cluster.downloads import PEER_PATH
from cluster.errors import AdapterFailed
from cluster.redis_client import connect
from cluster.registry import Registry
from replica.api.access import Rules
from replica.api.server import build_app
from replica.serving.membership import Membership
from tests.serving import BASE, CONFIG, live, text
from tests.small_files import settled_config, write_adapter, write_model_config
from tests.stub_engine import StubEngine
from tests.until import TIMEOUT_S, until

LOAD = "/v1/load_lora_adapter"
ADMIN = {"authorization": "Bearer sk-admin"}
RULES = Rules(("sk-use",), ("sk-admin",), changes=False)


class Node:
    """A replica with a directory of its own, and its server."""

    def __init__(self, membership: Membership, engine: StubEngine, url: str, store: Path) -> None:
        self.membership, self.engine, self.url, self.store = membership, engine, url, store

    async def post(self, name: str, directory: Path) -> httpx.Response:
        files = [
            ("files", (file, (directory / file).read_bytes())) for file in files_of(str(directory))
        ]
        async with httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_S) as client:
            return await client.post(LOAD, data={"lora_name": name}, files=files, headers=ADMIN)

    def has(self, digest: str) -> bool:
        return digest in self.engine.paths

    def kept(self) -> set[str]:
        return {entry.name for entry in self.store.iterdir() if len(entry.name) == 64}


class Fleet:
    def __init__(self, redis: str, name: str, directory: Path) -> None:
        self._directory = directory
        self._config = FleetConfig(
            settled_config(write_model_config(directory / "base")),
            name=name,
            redis_url=redis,
            lease_s=2.0,
            report_s=0.05,
            acknowledge_s=TIMEOUT_S,
        )
        self._ends = AsyncExitStack()

    async def node(self, name: str, rules: Rules = RULES) -> Node:
        directory = self._directory / name
        config = dataclasses.replace(self._config, directory=str(directory))
        engine, url = StubEngine(), ""
        membership = Membership(engine, config, name, url=lambda: url, text=text())
        server = dataclasses.replace(CONFIG, replica_id=name, rules=rules)
        member = membership
        app = build_app(engine, member, text(), server, None, member.others, member.files)
        url = await self._ends.enter_async_context(live(app))
        self._ends.push_async_callback(membership.stop)
        await membership.start()
        return Node(membership, engine, url, directory / "adapters")

    async def close(self) -> None:
        await self._ends.aclose()


@pytest.fixture
async def running(shared_redis: str, fleet: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    made = Fleet(shared_redis, fleet, tmp_path)
    yield made
    await made.close()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(write_adapter(tmp_path / "trained"))


async def test_replicas_of_other_nodes_get_the_files_from_one_that_has_them(
    running: Fleet, adapter: Path
) -> None:
    a, b = await running.node("a"), await running.node("b")
    answer = await a.post("mine", adapter)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-lorafleet-applied"] == "a, b"
    digest = answer.headers["x-lorafleet-digest"]
    assert a.kept() == b.kept() == {digest}
    for file in (CONFIG_FILE, TENSORS_FILE):
        assert (b.store / digest / file).read_bytes() == (adapter / file).read_bytes()
    # One that joins later, too; and from one that had them from another.
    await a.membership.stop()
    c = await running.node("c")
    assert c.has(digest) and c.kept() == {digest}


async def test_a_chat_template_of_its_own_comes_with_them(running: Fleet, adapter: Path) -> None:
    plain = await (await running.node("a")).post("plain", adapter)
    (adapter / TEMPLATE_FILE).write_text("[{{ messages[0].content }}]")
    b, c = await running.node("b"), await running.node("c")
    answer = await b.post("mine", adapter)
    assert answer.headers["x-lorafleet-applied"] == "a, b, c"
    digest = answer.headers["x-lorafleet-digest"]
    assert digest != plain.headers["x-lorafleet-digest"]
    assert c.kept() == {digest, plain.headers["x-lorafleet-digest"]}
    for name, prompt in (("mine", "[hi]"), ("plain", "<|begin|><|user|>hi<|end|><|assistant|>")):
        body = {"model": name, "messages": [{"role": "user", "content": "hi"}]}
        async with httpx.AsyncClient(base_url=c.url, timeout=TIMEOUT_S) as client:
            chat = await client.post("/v1/chat/completions", json=body, headers=ADMIN)
        assert chat.status_code == 200, chat.text
        assert text().decode(c.engine.seen[-1].prompt, skip_special_tokens=False) == prompt


async def test_tokens_of_its_own_come_with_them(running: Fleet, adapter: Path) -> None:
    (adapter / ADDED_FILE).write_text('{"<mine>": 5, "<|user|>": 3}')
    a, b = await running.node("a"), await running.node("b")
    answer = await a.post("mine", adapter)
    assert answer.headers["x-lorafleet-applied"] == "a, b"
    await a.membership.stop()
    for node in (b, await running.node("c")):
        async with httpx.AsyncClient(base_url=node.url, timeout=TIMEOUT_S) as client:
            for model, tokens in (("mine", [5]), (BASE, list(text().word_tokens("<mine>")))):
                body = {"model": model, "prompt": "<mine>"}
                cut = await client.post("/tokenize", json=body, headers=ADMIN)
                assert cut.json()["tokens"] == tokens


async def test_a_restart_finds_the_files_in_the_store(running: Fleet, adapter: Path) -> None:
    first = await running.node("a")
    digest = (await first.post("mine", adapter)).headers["x-lorafleet-digest"]
    await first.membership.stop()
    again = await running.node("a")
    assert again.has(digest)


async def test_files_that_nobody_has_any_more_are_told(
    running: Fleet, adapter: Path, tmp_path: Path
) -> None:
    a = await running.node("a")
    digest = (await a.post("mine", adapter)).headers["x-lorafleet-digest"]
    await a.membership.stop()
    b = await running.node("b")
    assert not b.has(digest)
    with pytest.raises(AdapterFailed, match="it was uploaded, and no live replica has its files"):
        await b.membership.claim("mine")
    page = await b.membership.describe()
    (entry,) = page["data"]
    assert "no live replica has its files; upload it again" in str(entry)
    # Again is enough.
    assert (await b.post("mine", adapter)).status_code == 200
    claim = await b.membership.claim("mine")
    assert claim is not None and claim.version.digest == digest and b.has(digest)


async def test_what_another_replica_gives_is_checked(running: Fleet, adapter: Path) -> None:
    a = await running.node("a")
    digest = (await a.post("mine", adapter)).headers["x-lorafleet-digest"]
    tensors = a.store / digest / TENSORS_FILE
    other = Path(write_adapter(adapter.parent / "other", seed=1)) / TENSORS_FILE
    os.chmod(tensors, 0o644)
    shutil.copyfile(other, tensors)
    b = await running.node("b")
    assert not b.has(digest) and not b.kept()
    with pytest.raises(AdapterFailed, match="its files changed"):
        await b.membership.claim("mine")


async def test_files_are_for_replicas_alone(
    running: Fleet, adapter: Path, shared_redis: str, fleet: str
) -> None:
    a, b = await running.node("a"), await running.node("b", Rules())
    digest = (await a.post("mine", adapter)).headers["x-lorafleet-digest"]
    await until(lambda: b.has(digest))
    redis = connect(shared_redis)
    _, _, found = await Registry(redis, fleet).read()
    await redis.aclose()
    keys = {lease.replica_id: lease.files_key for lease, _, _ in found}
    assert len(set(keys.values())) == 2 and all(len(key) > 40 for key in keys.values())
    assert keys["a"] not in repr(found)
    page = str(await a.membership.describe())
    assert not any(key in page for key in keys.values())
    path = f"{PEER_PATH}/{digest}/{CONFIG_FILE}"
    async with httpx.AsyncClient() as client:

        async def status(node: Node, path: str, key: str | None) -> int:
            headers = {} if key is None else {"authorization": f"Bearer {key}".encode()}
            return (await client.get(node.url + path, headers=headers)).status_code

        assert await status(a, path, keys["a"]) == 200
        for node in (a, b):  # with keys, and without
            for key in (None, "x", "sk-use", "sk-admin", "\u00e9"):
                assert await status(node, path, key) == 404, key
        assert await status(b, path, keys["a"]) == 404
        for other in (
            f"{PEER_PATH}/{digest}/tokenizer.json",
            f"{PEER_PATH}/{digest}/..%2f.lock",
            f"{PEER_PATH}/../{CONFIG_FILE}",
            f"{PEER_PATH}/..%2f{digest}/{CONFIG_FILE}",
            f"{PEER_PATH}/.unchecked-{digest}/{CONFIG_FILE}",
            f"{PEER_PATH}/{'0' * 64}/{CONFIG_FILE}",
        ):
            assert await status(a, other, keys["a"]) == 404, other
