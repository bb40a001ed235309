"""Redis' URL, and the settings that may lose the catalog."""

import ssl
from typing import Any

import pytest
from redis.asyncio.connection import SSLConnection

from cluster.redis_address import risks, sentinel_address
from cluster.redis_client import connect, connect_blocking


@pytest.mark.parametrize(
    ("url", "sentinels", "service", "options", "sentinel_options"),
    [
        ("redis+sentinel://s1/fleet", [("s1", 26379)], "fleet", {"db": 0}, {}),
        (
            "redis+sentinel://:p%40ss@s1:1,[::1]:2,s3/fleet/4?sentinel_password=other",
            [("s1", 1), ("::1", 2), ("s3", 26379)],
            "fleet",
            {"db": 4, "password": "p@ss"},
            {"password": "other"},
        ),
        (
            "rediss+sentinel://user:pass@s1/fleet?ssl_ca_certs=/ca.pem&sentinel_username=u",
            [("s1", 26379)],
            "fleet",
            {
                "db": 0,
                "username": "user",
                "password": "pass",
                "ssl": True,
                "ssl_ca_certs": "/ca.pem",
            },
            {"ssl": True, "ssl_ca_certs": "/ca.pem", "username": "u"},
        ),
    ],
)
def test_a_sentinels_url(
    url: str,
    sentinels: list[tuple[str, int]],
    service: str,
    options: dict[str, Any],
    sentinel_options: dict[str, Any],
) -> None:
    address = sentinel_address(url)
    assert address is not None
    assert (address.sentinels, address.service) == (sentinels, service)
    assert (address.options, address.sentinel_options) == (options, sentinel_options)


@pytest.mark.parametrize("url", ["redis://h:1/0", "rediss://h", "unix:///a/b", "nonsense"])
def test_other_urls_are_no_sentinels(url: str) -> None:
    assert sentinel_address(url) is None


@pytest.mark.parametrize(
    "url",
    [
        "http+sentinel://s1/fleet",
        "redis+sentinel://s1",
        "redis+sentinel:///fleet",
        "redis+sentinel://s1:port/fleet",
        "redis+sentinel://s1,/fleet",
        "redis+sentinel://s1/fleet/one",
        "redis+sentinel://s1/fleet?ssl_ca_certs=/ca.pem",
        "redis+sentinel://s1/fleet?unknown=1",
    ],
)
def test_what_is_wrong_with_a_sentinels_url_is_noticed(url: str) -> None:
    with pytest.raises(ValueError):
        sentinel_address(url)


async def test_tls_is_used_where_the_url_says_so() -> None:
    async with connect("rediss://h:1/0?ssl_ca_certs=/ca.pem") as client:
        connection = client.connection_pool.make_connection()
    assert isinstance(connection, SSLConnection)
    assert connection.ssl_context.ca_certs == "/ca.pem"
    assert connection.ssl_context.cert_reqs == ssl.CERT_REQUIRED
    async with connect("rediss+sentinel://h:1/fleet?ssl_ca_certs=/ca.pem") as client:
        connection = client.connection_pool.make_connection()
    assert isinstance(connection, SSLConnection)
    blocking = connect_blocking("rediss+sentinel://h:1/fleet")
    assert "SSL" in type(blocking.connection_pool.make_connection()).__name__


SAFE = {"maxmemory_policy": "noeviction", "aof_enabled": "1", "save": ""}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (SAFE, []),
        ({}, []),  # it shows nothing
        (SAFE | {"maxmemory_policy": "volatile-lru"}, []),
        (SAFE | {"maxmemory_policy": "allkeys-lru"}, ["maxmemory-policy allkeys-lru"]),
        (SAFE | {"maxmemory_policy": "allkeys-random"}, ["maxmemory-policy allkeys-random"]),
        (SAFE | {"aof_enabled": "0"}, ["keeps nothing on disk"]),
        (SAFE | {"aof_enabled": "0", "save": "3600 1"}, ["saves snapshots alone (save '3600 1')"]),
        ({"aof_enabled": "0"}, []),  # it may save snapshots
        (
            {"maxmemory_policy": "allkeys-lfu", "aof_enabled": "0", "save": ""},
            ["allkeys-lfu", "keeps nothing"],
        ),
    ],
)
def test_each_risk_is_named(facts: dict[str, str], words: list[str]) -> None:
    found = risks(facts)
    assert len(found) == len(words)
    assert all(word in risk for word, risk in zip(words, found, strict=True))
