"""A Redis that is not the fleet's own: restored, evicting, shared, or behind a sentinel."""

import asyncio
import datetime
import ipaddress
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from redis import Redis

from cluster.catalog import Catalog
from cluster.errors import ConfigError
from cluster.redis_client import check_reachable, connect, prefix
from cluster.redis_server import find_redis_server
from cluster.values import Version
from tests.integration.test_catalog import settled
from tests.until import TIMEOUT_S, until, until_now
from tests.wire import Wire

LEASE_S = 0.3


class Server:
    """A redis-server on a port of its own, with its data in a directory."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.options = options
        self.port = _free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir()

    def start(self) -> None:
        command = [find_redis_server(), "--port", str(self.port), "--dir", str(self.directory)]
        self.process = subprocess.Popen(
            [*command, *self.options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with Redis.from_url(self.url) as client:
            until_now(lambda: _answers(client))

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except OSError:
        return False
    except Exception:  # redis-py has its own ConnectionError
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


Launch = Callable[..., Server]
Follow = Callable[[str], Awaitable[Catalog]]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    servers: list[Server] = []

    def start(*options: str) -> Server:
        servers.append(Server(tmp_path / f"redis{len(servers)}", *options))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        if server.process is not None and server.process.poll() is None:
            server.kill()


@pytest.fixture
async def follow(fleet: str) -> AsyncIterator[Follow]:
    """Replicas' copies of the catalog that stay up to date until the test ends."""
    tasks: list[asyncio.Task[None]] = []
    clients = []

    async def open_one(url: str) -> Catalog:
        clients.append(connect(url))
        catalog = Catalog(clients[-1], fleet, "base", lease_s=LEASE_S)
        tasks.append(asyncio.create_task(catalog.run()))
        await until(lambda: catalog.connected)
        return catalog

    yield open_one
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=TIMEOUT_S)
    for client in clients:
        await client.aclose()


def version(name: str, digest: str = "d1") -> Version:
    return Version(name, digest, f"/adapters/{name}", 8, 100)


def names(catalog: Catalog) -> list[str]:
    return [version.name for version in catalog.book.by_name()]


async def agree(*catalogs: Catalog) -> None:
    """They are settled, and at one state."""
    await until(
        lambda: all(
            c.connected and c.settles_in_s is None and c.stamp == catalogs[0].stamp
            for c in catalogs
        )
    )


async def test_a_restored_snapshot_takes_no_adapter_away_and_undoes_no_removal(
    launch: Launch, follow: Follow
) -> None:
    server = launch("--save", "3600", "1")
    one, other = await follow(server.url), await follow(server.url)
    await settled(lambda: one.put_all([version("old"), version("gone")]))
    with Redis.from_url(server.url) as client:
        client.save()
    await one.put(version("new"))
    await one.remove("gone")
    await until(lambda: names(other) == ["new", "old"])
    server.kill()
    server.start()
    with Redis.from_url(server.url, decode_responses=True) as client:
        run_id = client.info("server")["run_id"]
        state = prefix(one._channel.split(":")[1]) + "catalog:state"
        await until(lambda: client.hget(state, "settled_by") == run_id)
    await agree(one, other)
    late = await follow(server.url)
    assert names(one) == names(other) == names(late) == ["new", "old"]
    _, changed = await late.put(version("new"))
    assert changed is False


async def test_one_write_before_the_living_have_spoken_waits_for_them(
    launch: Launch, follow: Follow
) -> None:
    server = launch("--save", "", "--appendonly", "no")
    one = await follow(server.url)
    await settled(lambda: one.put(version("a", "d1")))
    await until(lambda: names(one) == ["a"])
    server.kill()  # it keeps nothing
    server.start()
    newcomer = await follow(server.url)  # may well be there first
    from cluster.errors import BadRequest

    with pytest.raises(BadRequest, match="'a' is already loaded"):
        await settled(lambda: newcomer.put(version("a", "d2")))
    await agree(one, newcomer)
    assert names(newcomer) == ["a"]


async def test_a_full_redis_that_evicts_is_warned_of_and_loses_nothing(
    launch: Launch, follow: Follow, fleet: str
) -> None:
    limits = ("--maxmemory", "6mb", "--maxmemory-policy", "allkeys-lru", "--save", "")
    server = launch(*limits, "--appendonly", "no")
    risks = check_reachable(server.url)
    assert len(risks) == 2 and "allkeys-lru" in risks[0] and "keeps nothing" in risks[1]
    one, other = await follow(server.url), await follow(server.url)
    adapters = [version(f"a{i}", f"d{i}") for i in range(200)]
    await settled(lambda: one.put_all(adapters))
    await until(lambda: len(other.book) == 200)
    with Redis.from_url(server.url) as client:
        number = 0
        while client.exists(prefix(fleet) + "catalog", prefix(fleet) + "catalog:state") == 2:
            client.set(f"others:{number}", "x" * 20_000)
            number += 1
            assert number < 100_000, "nothing is evicted"
        for key in client.scan_iter("others:*"):
            client.delete(key)
    await settled(lambda: one.put(version("b")))
    await agree(one, other)
    assert len((await other.read())[1]) == 201


async def test_a_slow_redis_only_takes_longer(launch: Launch, follow: Follow) -> None:
    server = launch("--appendonly", "yes")
    wire = Wire(server.port, delay_s=0.2)
    await wire.join()
    url = f"redis://127.0.0.1:{wire.port}/0"
    one, other = await follow(url), await follow(url)
    await settled(lambda: one.put(version("a")))
    await other.put(version("b"))
    await until(lambda: names(one) == names(other) == ["a", "b"])
    assert one.connected and other.connected
    await wire.cut()


async def test_a_redis_behind_tls_is_followed_if_its_authority_is_trusted(
    launch: Launch, follow: Follow, tmp_path: Path
) -> None:
    """The redis-server of the tests is built without TLS, so a wire in front of it speaks that."""
    server = launch("--appendonly", "yes")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(_certificate(tmp_path))
    wire = Wire(server.port, tls=context)
    await wire.join()
    untrusted = f"rediss://127.0.0.1:{wire.port}/0"
    url = f"{untrusted}?ssl_ca_certs={_certificate(tmp_path)}"
    assert await asyncio.to_thread(check_reachable, url) == []
    one, other = await follow(url), await follow(url)
    await settled(lambda: one.put(version("a")))
    await until(lambda: names(one) == names(other) == ["a"])
    await wire.cut()
    await until(lambda: not one.connected)
    await wire.join()
    await until(lambda: one.connected and other.connected)
    await other.put(version("b"))
    await until(lambda: names(one) == ["a", "b"])
    for refused, reason in (
        (untrusted, "certificate verify failed"),
        (url.replace("127.0.0.1", "localhost"), "certificate is not valid for 'localhost'"),
    ):
        with pytest.raises(ConfigError, match=reason):
            await asyncio.to_thread(check_reachable, refused)
    await wire.cut()


def _certificate(directory: Path) -> Path:
    """A self-signed certificate for 127.0.0.1, and its key, in one PEM file."""
    path = directory / "redis.pem"
    if path.exists():
        return path
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "redis")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .issuer_name(name)
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(certificate.public_bytes(form[0]) + key.private_bytes(*form))
    return path


async def test_fleets_of_one_name_in_two_databases_hear_nothing_of_each_other(
    shared_redis: str, follow: Follow
) -> None:
    first, second = f"{shared_redis}?db=0", f"{shared_redis}?db=1"
    one, other = await follow(first), await follow(second)
    await settled(lambda: one.put(version("a")))
    await settled(lambda: other.put(version("b")))
    looks = 0
    look = other.resync

    async def counted() -> None:
        nonlocal looks
        looks += 1
        await look()

    other._subscription._resync = counted
    for number in range(20):
        await one.put(version(f"a{number}"))
    await until(lambda: len(one.book) == 21)
    await other.put(version("c"))
    await until(lambda: names(other) == ["b", "c"])
    assert looks == 0


async def test_a_sentinel_names_the_master_and_a_failover_loses_nothing(
    launch: Launch, follow: Follow, tmp_path: Path
) -> None:
    first, second = launch("--appendonly", "yes"), launch("--appendonly", "yes")
    with Redis.from_url(second.url) as client:
        client.replicaof("127.0.0.1", str(first.port))
        until_now(lambda: client.info("replication")["master_link_status"] == "up")
    sentinel = _sentinel(tmp_path, first.port)
    try:
        url = f"redis+sentinel://127.0.0.1:{sentinel[1]}/fleet/0"
        until_now(lambda: _reachable(url))
        one, other = await follow(url), await follow(url)
        await settled(lambda: one.put(version("a")))
        await until(lambda: names(one) == names(other) == ["a"])
        with Redis.from_url(second.url) as client:
            client.replicaof("NO", "ONE")  # it lags from now on
            await one.put(version("b"))
            await until(lambda: names(one) == names(other) == ["a", "b"])
            client.replicaof("127.0.0.1", str(first.port))
            until_now(lambda: client.info("replication")["master_link_status"] == "up")
        first.kill()
        await until(lambda: one.connected and _holds(second.url, one))
        await settled(lambda: other.put(version("c")))
        await until(lambda: names(one) == names(other) == ["a", "b", "c"])
        await agree(one, other)
        assert names(one) == names(other) == ["a", "b", "c"]
        with Redis.from_url(second.url) as client:
            assert client.info("replication")["role"] == "master"
    finally:
        sentinel[0].kill()
        sentinel[0].wait()


def _holds(url: str, catalog: Catalog) -> bool:
    with Redis.from_url(url) as client:
        return bool(client.hexists(catalog._keys[1], "a"))


def _reachable(url: str) -> bool:
    try:
        check_reachable(url)
    except ConfigError:
        return False
    return True


def _sentinel(directory: Path, master_port: int) -> tuple[subprocess.Popen[bytes], int]:
    port = _free_port()
    config = directory / "sentinel.conf"
    config.write_text(
        f"port {port}\ndir {directory}\nsentinel monitor fleet 127.0.0.1 {master_port} 1\n"
        "sentinel down-after-milliseconds fleet 500\nsentinel failover-timeout fleet 3000\n"
    )
    command = [find_redis_server(), str(config), "--sentinel"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), port
