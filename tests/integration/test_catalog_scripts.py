"""The catalog's scripts in a real Redis do what `tests/fake_catalog.py` does."""

import json
import random
import re
from typing import Any

import pytest
from redis import Redis

from cluster.catalog import keys
from cluster.catalog_scripts import (
    BEGIN,
    FORGET,
    FOUND,
    MERGE,
    PUT,
    REMOVE,
    RETRY,
    SETTLE,
    SNAPSHOT,
)
from cluster.recovery import encode_version
from cluster.redis_client import connect_blocking
from cluster.values import Version
from tests.fake_catalog import FakeServer

FUTURE = 10**13  # a generation beyond any clock
NAMES = ("a", "b", 'quo"te', "模型")


class Both:
    """One script call after another, on the real Redis and on the fake."""

    def __init__(self, client: Redis, fleet: str) -> None:
        self.client, self.keys = client, keys(fleet)
        self.fake = FakeServer(name=client.info("server")["run_id"])
        self.pubsub = client.pubsub()
        self.pubsub.subscribe(fleet)
        self.channel = fleet
        self.fake.inboxes.append([])
        self.scripts: dict[str, Any] = {}
        assert self.pubsub.get_message(timeout=10.0)["type"] == "subscribe"

    def call(self, script: str, *args: object) -> Any:
        registered = self.scripts.setdefault(script, self.client.register_script(script))
        texts = [self.channel, *map(str, args)]
        real = registered(keys=self.keys, args=texts)
        fake = self.fake.script(script, texts)
        if script is not SNAPSHOT:
            assert real == fake, (script, args)
        self.check()
        return fake

    def change(self, script: str, *args: object) -> Any:
        return self.call(script, self.fake.generation, self.fake.sequence, *args)

    def check(self) -> None:
        assert _without_times(self.client.hgetall(self.keys[0])) == _without_times(self.fake.state)
        assert self.client.hgetall(self.keys[1]) == self.fake.catalog
        for text in self.fake.inboxes[0]:
            message = self.pubsub.get_message(timeout=10.0)
            assert message is not None and json.loads(message["data"]) == json.loads(text)
        self.fake.inboxes[0].clear()

    def settle(self) -> None:
        """In a generation that no clock decides."""
        self.call(BEGIN, self.client.hget(self.keys[0], "settling") or "")
        settling = self.client.hget(self.keys[0], "settling")
        self.fake.state["settling"] = str(settling)
        self.fake.now_ms = int(str(settling).partition(":")[2])
        self.call(SETTLE, settling, 0, FUTURE + self.fake.generation, self.fake.sequence)


def _without_times(state: Any) -> dict[str, str]:
    return {key: re.sub(r":\d+$", ":TIME", value) for key, value in state.items()}


@pytest.fixture
def both(shared_redis: str, fleet: str) -> Both:
    return Both(connect_blocking(shared_redis), fleet)


def version(name: str, digest: str, **fields: Any) -> str:
    return encode_version(Version(name, digest, fields.pop("uri", "/a"), 8, 100, **fields))


def record(generation: int, sequence: int, version: str = "null") -> str:
    return f'{{"stamp":[{generation},{sequence}],"run":"","version":{version}}}'


@pytest.mark.parametrize("number", range(10))
def test_random_calls_end_alike(both: Both, seed: int, number: int) -> None:
    draw = random.Random(f"{seed} {number}")

    def put() -> None:
        pairs: list[str] = []
        for name in draw.sample(NAMES, draw.randint(1, 3)):
            digest, uri = draw.choice("xyz"), draw.choice(("/a", "/b"))
            pinned, weight = draw.random() < 0.2, draw.choice((1.0, 2.5))
            pairs += [name, version(name, digest, uri=uri, pinned=pinned, weight=weight)]
        both.change(PUT, draw.choice("01"), draw.choice(("", "", "run1", "run2")), *pairs)

    def remove() -> None:
        both.change(REMOVE, draw.choice(NAMES))

    def merge() -> None:
        pairs: list[str] = []
        for name in draw.sample(NAMES, draw.randint(1, 3)):
            generation = both.fake.generation + draw.choice((-1, 0, 0, 1))
            sequence = both.fake.sequence + draw.randint(-3, 3)
            content = draw.choice(("null", version(name, "old")))
            pairs += [name, record(generation, sequence, content)]
        both.call(MERGE, *pairs)

    def forget() -> None:
        items = list(both.fake.catalog.items())
        pairs = [part for item in draw.sample(items, min(2, len(items))) for part in item]
        both.call(FORGET, *pairs, "gone", record(1, 1))

    def retry() -> None:
        both.change(RETRY, json.dumps(draw.sample(("x", "y", "z"), draw.randint(1, 2))))

    def evict() -> None:
        hurt = draw.randrange(2)
        both.client.delete(both.keys[hurt])
        (both.fake.state, both.fake.catalog)[hurt].clear()

    def junk() -> None:
        name, text = draw.choice(NAMES), draw.choice(("what", "[]", '{"stamp": 3}', "7"))
        both.client.hset(both.keys[1], name, text)
        both.fake.catalog[name] = text

    both.settle()
    calls = [put] * 8 + [remove] * 4 + [merge] * 3 + [forget, retry, evict, junk, both.settle]
    for _ in range(80):
        draw.choice(calls)()
    both.settle()
    both.change(PUT, "1", "", "last", version("last", "d"))


def test_what_is_older_is_not_merged(both: Both) -> None:
    both.settle()
    generation = both.fake.generation
    both.call(MERGE, "a", record(generation, 5, version("a", "new")))
    both.call(MERGE, "a", record(generation, 4, version("a", "old")))
    both.call(MERGE, "a", record(generation - 1, 9, version("a", "old")))
    assert json.loads(both.client.hget(both.keys[1], "a") or "")["version"]["digest"] == "new"


def test_a_change_needs_a_settled_redis_that_has_what_its_caller_knows(both: Both) -> None:
    args = ("0", "", "a", version("a", "d"))
    assert both.call(PUT, 0, 0, *args) == ["unsettled", ""]
    both.settle()
    generation, sequence = both.fake.generation, both.fake.sequence
    assert both.call(PUT, generation - 1, sequence, *args) == ["unsettled", ""]
    assert both.call(PUT, generation, sequence + 1, *args) == ["unsettled", ""]
    assert both.call(PUT, generation, sequence, *args)[0] == "put"
    assert both.call(REMOVE, generation, sequence, "a")[1] == str(sequence + 2)
    both.client.hset(both.keys[0], "settled_by", "another")
    both.fake.state["settled_by"] = "another"
    assert both.call(PUT, generation, sequence, *args) == ["unsettled", ""]


def test_settling_takes_the_time_that_it_began_with(both: Both) -> None:
    both.call(BEGIN, "")
    settling = str(both.client.hget(both.keys[0], "settling"))
    both.fake.state["settling"] = settling
    both.fake.now_ms = int(settling.partition(":")[2])
    both.call(BEGIN, "")  # by one who has not seen it
    assert both.client.hget(both.keys[0], "settling") == settling
    both.call(SETTLE, settling, 3_600_000, FUTURE, 0)
    assert both.client.hget(both.keys[0], "generation") is None
    both.call(SETTLE, "another:1", 0, FUTURE, 0)
    assert both.client.hget(both.keys[0], "generation") is None
    both.call(SETTLE, settling, 0, FUTURE, 7)
    assert both.client.hget(both.keys[0], "generation") == str(FUTURE + 1)
    assert both.client.hget(both.keys[0], "sequence") == "7"


def test_what_is_founded_is_settled_at_once(both: Both) -> None:
    both.client.register_script(FOUND)(keys=both.keys)
    head = both.client.register_script(SNAPSHOT)(keys=both.keys, args=[both.channel])
    generation = int(head[0])
    assert 0 <= int(head[7]) - generation < 60_000  # it is Redis' time
    both.client.register_script(FOUND)(keys=both.keys)
    assert both.client.hget(both.keys[0], "generation") == head[0]
