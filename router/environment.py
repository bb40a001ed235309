"""The environment variables that Ray Serve and HAProxy need, and those that carry secrets."""

import os
from collections.abc import Mapping, MutableMapping

from cluster.errors import ConfigError

REDIS_URL = "LORAFLEET_REDIS_URL"
"""Holds Redis' URL. Arguments carry only the variable's name, since Serve shows them to anyone."""

API_KEYS = "LORAFLEET_API_KEYS"
"""Holds the API keys, separated by commas, for the same reason."""

REQUIRED: Mapping[str, str] = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
}
"""Make HAProxy stream straight from the replicas, and forward request bodies to the router."""

RECOMMENDED: Mapping[str, str] = {
    # The default is 8 MiB a connection; the router needs only the start of a body.
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": "65536",
}


def local(
    directory: str, stats_port: int, metrics_port: int, replica_ports: range, drain_s: float
) -> dict[str, str]:
    """The variables of a local fleet: ports and files of its own, and a fast shutdown."""
    return {
        **REQUIRED,
        **RECOMMENDED,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{directory}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{directory}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": directory,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{directory}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{directory}/metrics.sock",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replica_ports.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replica_ports.stop - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(drain_s),
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
