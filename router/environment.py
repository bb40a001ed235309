"""The environment variables that Ray Serve and HAProxy need, and those that carry secrets."""

import math
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from cluster.errors import ConfigError

REDIS_URL = "LORAFLEET_REDIS_URL"
"""Holds Redis' URL. Arguments carry only the variable's name, since Serve shows them to anyone."""

REQUIRED: Mapping[str, str] = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
}
"""Make HAProxy stream straight from the replicas, and forward request bodies to the router."""

MODEL_HEADER = "x-lorafleet-model"
"""A header that names the model of a request whose body has `model` beyond HAProxy's buffer."""

BUFSIZE = "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE"

RECOMMENDED: Mapping[str, str] = {
    # The start of a body, in which the router looks for `model`; and all of a body that HAProxy
    # can send again. A connection takes up to two of them, and 8 MiB each is the default.
    BUFSIZE: "262144",
    # A request without a byte of an answer is sent once more. 502 means that the engine ended. The
    # words 503 and response-timeout would run what other replicas still run.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response 502",
    "RAY_SERVE_HAPROXY_RETRIES": "1",
    # Serve forwards one header to the router, meant for a session's id.
    "RAY_SERVE_SESSION_ID_HEADER_KEY": MODEL_HEADER,
    # Of two routers on a node, one may die.
    "RAY_SERVE_INGRESS_ROUTER_REPLICAS_PER_NODE": "2",
    # The time for a client to send its body, and for a router to answer.
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_TIMEOUT_S": "15",
    # The longest silence of a replica, such as the wait for a first token.
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "3600",
    # Three failures replace HAProxy. A check fails when nobody listens on its socket, however busy
    # the machine is.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.1",
    # The time for every HAProxy to learn that a replica leaves. It finishes its streams after that.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
}

# An old HAProxy process, which a change of its targets has replaced, ends its streams this long
# after the replicas do.
_HARD_STOP_MARGIN_S = 30


def local(
    directory: Path, fallback_port: int, replica_ports: range, drain_s: float
) -> dict[str, str]:
    """The variables of a local fleet: ports and files of its own."""
    return {
        **REQUIRED,
        **RECOMMENDED,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{directory}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{directory}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{directory}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{directory}/metrics.sock",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(drain_s) + _HARD_STOP_MARGIN_S),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replica_ports.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replica_ports.stop - 1),
        "RAY_SERVE_LOG_TO_STDERR": "0",
    }


def check(environment: Mapping[str, str]) -> None:
    """Raises ConfigError naming the first required variable that is missing."""
    for name, value in REQUIRED.items():
        if environment.get(name) != value:
            raise ConfigError(f"{name}={value} must be set before Ray starts", field=name)


def apply(variables: Mapping[str, str], environment: MutableMapping[str, str]) -> None:
    """Sets variables in `environment`. The operator's values win, except for REQUIRED ones."""
    for name, value in variables.items():
        if name in REQUIRED:
            environment[name] = value
        else:
            environment.setdefault(name, value)


def redis_url() -> str:
    """The URL of the fleet's Redis. Raises ConfigError if the variable is not set."""
    url = os.environ.get(REDIS_URL)
    if not url:
        raise ConfigError(f"{REDIS_URL} is not set: it must hold the URL of the fleet's Redis")
    return url
