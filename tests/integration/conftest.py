"""One real redis-server for tests that only read and write. Each test has its own fleet name."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.redis_server import RedisServer


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its URL. Tests that stop, hang or empty Redis use `own_redis`."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "fleet") as server:
        yield server


@pytest.fixture
def fleet() -> str:
    return f"test-{secrets.token_hex(4)}"
