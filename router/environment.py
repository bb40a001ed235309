"""What must be in the environment before Ray starts, and how secrets reach the replicas."""

import os
from collections.abc import Mapping, MutableMapping

from cluster.errors import ConfigError

REDIS_URL = "LORAFLEET_REDIS_URL"
"""Names the variable, never the URL: Serve shows the configuration of a deployment to anyone."""

API_KEYS = "LORAFLEET_API_KEYS"
"""Keys, separated by commas; here for the same reason."""

REQUIRED: Mapping[str, str] = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
}
"""HAProxy streams straight from the replicas, and shows request bodies to the router."""

RECOMMENDED: Mapping[str, str] = {
    # 8 MiB a connection by default; the router needs only the head of a body.
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": "65536",
}


def local(
    directory: str, stats_port: int, metrics_port: int, replica_ports: range, drain_s: float
) -> dict[str, str]:
    """For a fleet on this machine alone: nothing shared with another fleet, and a quick end."""
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
    """Raises ConfigError naming what is missing."""
    for name, value in REQUIRED.items():
        if environment.get(name) != value:
            raise ConfigError(f"{name}={value} must be set before Ray starts", field=name)


def apply(variables: Mapping[str, str], environment: MutableMapping[str, str]) -> None:
    """What the operator has set wins, except for what cannot work otherwise."""
    for name, value in variables.items():
        if name in REQUIRED:
            environment[name] = value
        else:
            environment.setdefault(name, value)


def redis_url() -> str:
    """Raises ConfigError when the variable is not set."""
    url = os.environ.get(REDIS_URL)
    if not url:
        raise ConfigError(f"{REDIS_URL} is not set: it must hold the URL of the fleet's Redis")
    return url
