"""Reads the operator's settings from a file and flags, and checks the files they name."""

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.adapter_paths import is_url
from cluster.config import EngineConfig, FleetConfig
from cluster.config_loader import load
from cluster.errors import ConfigError, FleetError
from cluster.versions import check_name
from replica.adapters.adapter_files import check_ranks, read_adapter
from replica.adapters.foreign_files import foreign
from replica.adapters.found_files import check_present
from replica.api.text import Text
from replica.engine.node import read_node
from replica.engine.sizing import shown
from replica.model.checkpoint import shape_of
from replica.serving.hub import download, hub_name
from replica.serving.keys import ADMIN_KEYS, API_KEYS, read_keys
from replica.simulation.traces import Recorded, read_trace
from replica.simulation.workload_file import Workload
from replica.simulation.workload_file import parse as parse_workload

_KEY_FILES = {"api_key_file": "api_keys", "admin_key_file": "admin_keys"}
_SECRETS = frozenset({"api_keys", "admin_keys", "redis_url"})


def read_settings(flags: Mapping[str, Any]) -> FleetConfig:
    """The settings of the --config file, overridden by the given flags. Raises ConfigError."""
    data: dict[str, Any] = {}
    if flags["config"] is not None:
        data = _read_yaml(flags["config"], f"--config {flags['config']}")
        if not data.keys().isdisjoint(_SECRETS):
            _warn_of_readers(flags["config"])
    engine = _section(data, "engine")
    engine_fields = {field.name for field in dataclasses.fields(EngineConfig)}
    for name, value in flags.items():
        if name == "config" or value is None or value == []:
            continue
        if name == "api_key":
            beside = data["api_keys"] if flags.get("api_key_file") is not None else []
            data["api_keys"] = [*beside, *value]
            continue
        if name in _KEY_FILES:
            data[_KEY_FILES[name]] = _read_lines(value, f"--{name.replace('_', '-')} {value}")
            continue
        if name in engine_fields:
            engine[name] = value
        elif name == "adapter":
            data["adapters"] = _section(data, "adapters") | _named_paths(value)
        elif name in ("adapter_root", "adapter_source", "allowed_origin"):
            data[f"{name}s"] = value
        else:
            data[name] = value
    for field, variable in (("api_keys", API_KEYS), ("admin_keys", ADMIN_KEYS)):
        data.setdefault(field, read_keys(variable))
    settings = load(FleetConfig, {**data, "engine": {"model": "", **engine}})
    if not settings.engine.model:
        raise ConfigError(
            "--model: required: the directory of a Hugging Face checkpoint, or its id on the Hub"
        )
    # Replicas run with other working directories.
    return dataclasses.replace(
        settings,
        engine=_with_directory(settings.engine),
        adapters={name: absolute(path) for name, path in settings.adapters.items()},
        adapter_roots=tuple(map(absolute, settings.adapter_roots)),
        adapter_sources=tuple(map(_source, settings.adapter_sources)),
        directory=absolute(settings.directory),
        request_log=absolute(settings.request_log) if settings.request_log else None,
    )


def shown_settings(settings: FleetConfig) -> str:
    """All fields as YAML that --config reads; keys and a password in a URL as ***."""
    fields = dataclasses.asdict(settings)
    for name in ("api_keys", "admin_keys"):
        fields[name] = ["***"] * len(fields[name])
    if settings.redis_url is not None:
        fields["redis_url"] = re.sub(r"(?<=://)[^/]*@", "***@", settings.redis_url)
    plain = json.loads(json.dumps(fields))  # YAML would tag tuples
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _source(source: str) -> str:
    path = absolute(source)
    if not is_url(path) and not Path(path).is_dir():
        raise ConfigError(f"--adapter-source {source}: no such directory", field="adapter_sources")
    return path


def _with_directory(engine: EngineConfig) -> EngineConfig:
    name = hub_name(engine.model)
    if name is None:
        return dataclasses.replace(engine, model=absolute(engine.model))
    served = engine.served_model_name or name
    return dataclasses.replace(engine, model=download(engine.model), served_model_name=served)


def read_workload(path: Path) -> tuple[Workload, list[Recorded]]:
    """A workload file and the slice of the trace that it names; without a trace, an empty list.

    A relative trace path is relative to the workload file. Raises ConfigError.
    """
    workload = parse_workload(_read_yaml(path, str(path)))
    arrivals = workload.arrivals
    if arrivals.trace is None:
        return workload, []
    trace = path.parent / os.path.expanduser(arrivals.trace)
    try:
        with trace.open(encoding="utf-8-sig") as lines:
            recorded = read_trace(lines, str(trace))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"arrivals.trace: {error}", field="arrivals.trace") from error
    end = arrivals.start + arrivals.requests
    if end > len(recorded):
        raise ConfigError(
            f"arrivals: {arrivals.requests} requests from number {arrivals.start} on, but {trace} "
            f"has {len(recorded)}",
            field="arrivals",
        )
    return workload, recorded[arrivals.start : end]


def read_adapters(path: Path) -> dict[str, str]:
    """Name → absolute path, from the section `adapters` of a YAML file. Raises ConfigError."""
    section = _section(_read_yaml(path, f"--file {path}"), "adapters")
    if not section:
        raise ConfigError(f"--file {path}: has no `adapters`", field="adapters")
    for name, adapter in section.items():
        if not isinstance(name, str) or not isinstance(adapter, str):
            raise ConfigError(f"adapters.{name}: {adapter!r} is not a path", field="adapters")
    return {name: absolute(adapter) for name, adapter in section.items()}


def _read_lines(path: Path, where: str) -> list[str]:
    """The lines of a file of keys that are not empty."""
    try:
        lines = [line for line in path.read_text().splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {_reason(error)}") from error
    if not lines:
        raise ConfigError(f"{where}: has no key")
    _warn_of_readers(path)
    return lines


def _warn_of_readers(path: Path) -> None:
    if path.stat().st_mode & 0o077:
        print(
            f"lorafleet: warning: {path} has secrets, and other users may read it: chmod 600 it",
            file=sys.stderr,
        )


def _reason(error: Exception) -> str:
    """In a few words, without the path."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        what = getattr(error, "problem", None) or "not YAML"
        return f"line {mark.line + 1}, column {mark.column + 1}: {what}"
    return " ".join(str(error).split())


def _read_yaml(path: Path, where: str) -> dict[str, Any]:
    try:
        # libyaml, where PyYAML has it, reads thousands of adapters ten times as fast.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        data = yaml.load(path.read_text(), loader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: {_reason(error)}", field="config") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: not a mapping of settings", field="config")
    return data


def _section(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = data.get(name)
    if not isinstance(section, dict | None):
        raise ConfigError(f"{name}: {section!r} is not a mapping", field=name)
    return dict(section or {})


def _named_paths(texts: Sequence[str]) -> dict[str, str]:
    paths: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--adapter {text}: must be NAME=PATH", field="adapter")
        if name in paths:
            raise ConfigError(
                f"--adapter {text}: {name!r} is {paths[name]} already", field="adapter"
            )
        paths[name] = path
    return paths


def check_files(settings: FleetConfig) -> None:
    """Checks the model's files and the adapters' headers, before anything starts. Raises
    ConfigError.
    """
    check_model(settings.engine)
    for name, path in settings.adapters.items():
        check_adapter(name, path, settings.engine)


def check_model(engine: EngineConfig) -> None:
    """Raises ConfigError for a model that cannot be served, or sizes that are not there."""
    _check_directory(Path(engine.model), engine.load_format == "dummy")
    try:
        shape = shape_of(engine.model)
        Text.read(engine.model)
    except FleetError as error:
        reason = error.message.removeprefix(f"{engine.model}: ")
        raise ConfigError(f"--model {engine.model}: {reason}", field="model") from error
    shape.divided(engine.tensor_parallel)
    _check_memory(engine)


def check_adapter(name: str, path: str, engine: EngineConfig) -> None:
    """Raises ConfigError. Reads headers only."""
    try:
        check_name(name, engine.base_name)
    except FleetError as error:
        reason = error.message.removeprefix("lora_name: ")
        raise ConfigError(f"--adapter {name!r}: {reason}", field="adapter") from error
    if "://" in path:
        return
    try:
        check_present(path)
        shape = shape_of(engine.model)
        if foreign(path, shape.vocabulary):
            return  # it is rewritten, and then checked, when it is added
        check_ranks(read_adapter(path, shape), engine.rank_max)
    except FleetError as error:
        reason = error.message.removeprefix("lora_path: ").removeprefix(f"{path}: ")
        reason = reason.removeprefix(f"{path!r}: ")
        raise ConfigError(f"--adapter {name}={path}: {reason}") from error


def _check_memory(engine: EngineConfig) -> None:
    """Raises ConfigError for a size of host memory that the machine does not have."""
    names = ["host_memory", "host_kv_memory"]
    if engine.device == "cpu" or (engine.device == "auto" and not Path("/dev/nvidiactl").exists()):
        names += ["adapter_memory", "kv_memory", "device_memory"]
    most = read_node().memory
    for name in names:
        size = getattr(engine, name)
        if size is not None and size > most:
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag}: {shown(size)}, but this machine has {shown(most)}: give less, "
                "or leave it out",
                field=name,
            )


def _check_directory(path: Path, dummy: bool) -> None:
    """Raises ConfigError unless it is a directory, with weights unless they are random."""
    if not path.is_dir():
        what = "not a directory" if path.exists() else "no such directory"
        raise ConfigError(f"--model {path}: {what}", field="model")
    if not dummy and (path / "config.json").exists() and not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"--model {path}: no weights (*.safetensors); engine.load_format: dummy makes random "
            "ones",
            field="model",
        )


def with_rank_expected(settings: FleetConfig) -> EngineConfig:
    """The engine configuration, with `rank_expected` set to the largest local adapter's rank
    unless it is given.

    Reads headers only. Skips adapters that it cannot read: other checks report them.
    """
    engine = settings.engine
    if engine.rank_expected is not None:
        return engine
    ranks = []
    for path in settings.adapters.values():
        if "://" not in path:
            with contextlib.suppress(FleetError):
                ranks.append(read_adapter(path, shape_of(engine.model)).rank)
    return dataclasses.replace(engine, rank_expected=max(ranks, default=None))


def absolute(path: str) -> str:
    """Makes a path absolute, from the current directory; leaves a URL unchanged."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
