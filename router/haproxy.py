"""Serve runs this file in HAProxy's place: it hardens the configuration that Serve wrote, and
becomes HAProxy.

Serve starts a new HAProxy as `PROGRAM -db -f CONFIG …` after every rewrite of CONFIG, and has no
setting for what is changed here. Uses the standard library only, since it runs without our paths.
"""

import ctypes
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Kept in HAProxy's environment. Its admin socket shows all of it, and Ray's has secrets.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "TZ", "LORAFLEET_RUN")
_PR_SET_PDEATHSIG = 1

# Seconds for a client to send its headers, first or next on its connection. They bound how long an
# idle or slow connection lives.
HEADERS_S = 10
KEEP_ALIVE_S = 60
# The longest silence of a client in the middle of its body, or while it reads an answer.
CLIENT_S = 120

# A connection takes one descriptor for the client, one for the replica, and may take a pipe.
_DESCRIPTORS_PER_CONNECTION = 2.5
_DESCRIPTORS_RESERVED = 500
_CONNECTIONS_MAX = 50_000
_MEMORY_SHARE = 8
_SHARE_OF_ONE_SOURCE = 2

_REQUEST_ID = "^[!-~]{1,128}$"
_PRINTABLE = "^[!-~]+$"
_MODEL = "x-lorafleet-model"
_NO_WEBSOCKETS = (
    '{"error":{"message":"upgrade: websockets are not supported",'
    '"type":"invalid_request_error","param":"upgrade","code":"invalid_value"}}'
)
_NO_PATH = (
    '{"error":{"message":"the path should begin with /",'
    '"type":"invalid_request_error","param":null,"code":"invalid_value"}}'
)
_NOBODY = (
    '{"error":{"message":"the fleet is starting or stopping: send the request again",'
    '"type":"server_error","param":null,"code":"unavailable"}}'
)
# Changes of the catalog: any replica will do, so no router is asked. HAProxy still waits for the
# body: it can send again only what it has.
_CHANGES = " ".join(
    f"{prefix}/{name}"
    for prefix in ("/v1", "")
    for name in ("load_lora_adapter", "load_lora_adapters", "unload_lora_adapter")
)
_ASKS = r"^    http-request lua\.route_via_ingress_request_router if METH_POST .*$"
_MARK = "# hardened\n"


@dataclass(frozen=True, slots=True)
class Settings:
    """binary: HAProxy's path. bind: where clients connect; None: where Serve says. sockets: where
    statistics and metrics are served, on Unix sockets; None: statistics on 127.0.0.1 alone,
    metrics on every interface. source_connections: most connections of one client address; None:
    half of all.
    """

    binary: str
    bind: str | None = None
    sockets: str | None = None
    source_connections: int | None = None


def hardened(config: str, settings: Settings, connections: int) -> str:
    """The configuration, with every change made. Raises AssertionError where Serve's template is
    not the known one: better no HAProxy than an open one.

    connections: most at a time.
    """
    if config.startswith(_MARK):  # started again without a rewrite
        return config
    of_source = settings.source_connections or max(connections // _SHARE_OF_ONE_SOURCE, 1)
    bind = r"\g<bind>" if settings.bind is None else settings.bind
    stats, metrics = r"bind 127.0.0.1:\1", r"bind :\1"
    if settings.sockets is not None:
        stats = f"bind unix@{settings.sockets}/stats.sock mode 600"
        metrics = f"bind unix@{settings.sockets}/prometheus.sock mode 600"
    frontend = f"""    # One address may not take every connection from the others.
    stick-table type ipv6 size 100k expire 1m store conn_cur
    tcp-request connection track-sc0 src
    tcp-request connection reject if {{ sc0_conn_cur gt {of_source} }}
    # A connection is one client's, so limits of connections hold: no hundred streams of HTTP/2.
    option disable-h2-upgrade
    # No answer is a websocket. h2c is only offered by clients, so it may be passed over.
    http-request return status 400 content-type application/json string '{_NO_WEBSOCKETS}' \
if {{ req.hdr(upgrade) -m str -i websocket }}
    http-request del-header upgrade
    http-request return status 400 content-type application/json string '{_NO_PATH}' \
unless {{ path -m beg / }}
    # Serve's own proxy answers in the place of replicas that have left: to be sent again.
    http-response return status 503 content-type application/json hdr retry-after 1 \
string '{_NOBODY}' if {{ status 404 }} !{{ res.hdr(x-lorafleet-replica) -m found }}
    http-request del-header x-request-id if {{ req.fhdr_cnt(x-request-id) gt 1 }}
    http-request del-header x-request-id unless {{ req.fhdr(x-request-id) -m reg {_REQUEST_ID} }}
    # A router refuses it as HTTP, and nobody would be asked. Then the body alone names the model.
    http-request del-header {_MODEL} unless {{ req.fhdr({_MODEL}) -m reg {_PRINTABLE} }}
"""
    defaults = f"""    timeout client {CLIENT_S}s
    timeout http-request {HEADERS_S}s
    timeout http-keep-alive {KEEP_ALIVE_S}s
    # A silent replica's node has vanished: known within 25 s.
    option srvtcpka
    srvtcpka-idle 10s
    srvtcpka-intvl 5s
    srvtcpka-cnt 3
"""
    # Timeouts of clients that Serve sets.
    config = re.sub(r"(?m)^    timeout (client|http-request|http-keep-alive) \d+s\n", "", config)
    # Absent until Serve has started a router.
    config = re.sub(f"(?m){_ASKS}", rf"\g<0> !{{ path {_CHANGES} }}", config)
    for pattern, replacement in (
        (r"^(    stats socket \S+) mode 666 level admin", r"\1 mode 600 level admin"),
        (r"^    maxconn \d+$", f"    maxconn {connections}"),
        (r"^    option redispatch 1\n", r"\g<0>" + defaults),
        (r"^    bind :(\d+)$", metrics),
        (r"^  bind \*:(\d+)$", "  " + stats),
        (
            r"^(?P<name>frontend http_frontend\n    bind )(?P<bind>\S+)\n",
            rf"\g<name>{bind}\n" + frontend,
        ),
        # Until HAProxy knows the application, clients get what they send again.
        (
            r"^(backend default_backend\n +http-request return status) 404 .*",
            rf"\1 503 content-type application/json hdr retry-after 1 string '{_NOBODY}'",
        ),
    ):
        config, count = re.subn(pattern, replacement, config, flags=re.MULTILINE)
        assert count == 1, f"HAProxy's configuration has {pattern!r} {count} times instead of once"
    return _MARK + config


def connections_max(descriptors: int, memory: int, buffer: int) -> int:
    """How many clients HAProxy can serve with so many file descriptors, and with its share of so
    many bytes of memory: one buffer each, which slow clients fill and HAProxy keeps.
    """
    left = max(descriptors - _DESCRIPTORS_RESERVED, _DESCRIPTORS_RESERVED)
    buffers = memory // _MEMORY_SHARE // buffer
    return min(int(left / _DESCRIPTORS_PER_CONNECTION), max(buffers, 1), _CONNECTIONS_MAX)


def _memory() -> int:
    """Bytes that this machine or container has."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def launcher(settings: Settings) -> str:
    """A program of this file with these settings."""
    own = Path(__file__).resolve()
    given = json.dumps({name: getattr(settings, name) for name in settings.__slots__})
    assert "'" not in given and "'" not in sys.executable + str(own), given
    return f"#!/bin/sh\nexec '{sys.executable}' -I -S '{own}' '{given}' \"$@\"\n"


def main(given: str, *arguments: str) -> None:
    """given: Settings as JSON. arguments: Serve's, for HAProxy."""
    settings = Settings(**json.loads(given))
    # The kernel ends HAProxy with Serve, even if that is killed; else it would keep its port.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.umask(0o077)
    file = Path(arguments[arguments.index("-f") + 1])
    config = file.read_text()
    buffer = re.search(r"(?m)^    tune.bufsize (\d+)$", config)
    assert buffer is not None
    connections = connections_max(most, _memory(), int(buffer[1]))
    file.write_text(hardened(config, settings, connections))
    file.chmod(0o600)
    os.execve(settings.binary, [settings.binary, *arguments], _kept(os.environ))


def _kept(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: environment[name] for name in _ENVIRONMENT if name in environment}


if __name__ == "__main__":
    main(*sys.argv[1:])
