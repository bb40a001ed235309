"""Where Redis is, from its URL, and which of its settings may lose the catalog."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SENTINEL_PORT = 26379
_SENTINEL_OPTIONS = frozenset(("sentinel_username", "sentinel_password")) | frozenset(
    ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs")
)


@dataclass(frozen=True, slots=True)
class SentinelAddress:
    """service: the name under which the sentinels know the master. options: for connections to
    Redis; sentinel_options: to the sentinels.
    """

    sentinels: list[tuple[str, int]]
    service: str
    options: dict[str, Any]
    sentinel_options: dict[str, Any]


def sentinel_address(url: str) -> SentinelAddress | None:
    """Parses redis+sentinel://[[USER]:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]/SERVICE[/DB][?OPTIONS].

    With rediss+sentinel:// all connections use TLS. OPTIONS: sentinel_username, sentinel_password,
    and redis-py's ssl_ca_certs, ssl_certfile, ssl_keyfile, ssl_cert_reqs. Returns None for another
    scheme; raises ValueError.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or not scheme.endswith("+sentinel"):
        return None
    parts = urlsplit(url)
    if scheme not in ("redis+sentinel", "rediss+sentinel"):
        raise ValueError("unknown scheme")
    credentials, _, hosts = parts.netloc.rpartition("@")
    service, _, database = parts.path.strip("/").partition("/")
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if unknown := query.keys() - _SENTINEL_OPTIONS:
        raise ValueError(f"unknown option {sorted(unknown)[0]}")
    tls: dict[str, Any] = {n: value for n, value in query.items() if n.startswith("ssl_")}
    if scheme == "rediss+sentinel":
        tls["ssl"] = True
    elif tls:
        raise ValueError("options of TLS need rediss+sentinel://")
    if not service or not hosts:
        raise ValueError("a sentinel's address and the service's name are needed")
    username, _, password = credentials.partition(":")
    options: dict[str, Any] = {**tls, "db": int(database or 0)}
    options |= _given(username=unquote(username), password=unquote(password))
    sentinel_options = tls | _given(
        username=query.get("sentinel_username"), password=query.get("sentinel_password")
    )
    sentinels = [_host_and_port(host) for host in hosts.split(",")]
    return SentinelAddress(sentinels, service, options, sentinel_options)


def _given(**options: str | None) -> dict[str, str]:
    return {name: value for name, value in options.items() if value}


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a sentinel has no host")
    return parts.hostname, parts.port or SENTINEL_PORT


def risks(facts: Mapping[str, str]) -> list[str]:
    """facts: of INFO, and `save` of the configuration."""
    found = []
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys"):
        found.append(
            f"it evicts any key when its memory is full (maxmemory-policy {policy}): replicas "
            "write the catalog back, but without a living replica it is gone; set noeviction or "
            "volatile-lru"
        )
    if facts.get("aof_enabled", "1") == "0":
        if facts.get("save") == "":
            found.append(
                "it keeps nothing on disk: if it restarts while no replica lives, the catalog is "
                "gone; set appendonly yes"
            )
        elif "save" in facts:
            found.append(
                f"it saves snapshots alone (save {facts['save']!r}): if it restarts while no "
                "replica lives, changes since the last one are gone; set appendonly yes"
            )
    return found
