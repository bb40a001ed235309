"""Reads the operator's settings from a file and flags, and checks the files they name."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.config import EngineConfig, FleetConfig, load
from cluster.errors import ConfigError, FleetError
from cluster.versions import check_name
from replica.adapters.adapter_files import inspect, read_adapter
from replica.api.text import Text
from replica.model.shape import read_shape
from replica.simulation.traces import Recorded, read_trace
from replica.simulation.workload_file import Workload
from replica.simulation.workload_file import parse as parse_workload


def read_settings(flags: Mapping[str, Any]) -> FleetConfig:
    """The settings of the --config file, overridden by the given flags. Raises ConfigError."""
    data: dict[str, Any] = {}
    if flags["config"] is not None:
        data = _read_yaml(flags["config"], f"--config {flags['config']}")
    engine = _section(data, "engine")
    engine_fields = {field.name for field in dataclasses.fields(EngineConfig)}
    for name, value in flags.items():
        if name == "config" or value is None or value == []:
            continue
        if name in engine_fields:
            engine[name] = value
        elif name == "adapter":
            data["adapters"] = _section(data, "adapters") | _named_paths(value)
        elif name == "adapter_root":
            data["adapter_roots"] = value
        else:
            data[name] = value
    settings = load(FleetConfig, {**data, "engine": {"model": "", **engine}})
    if not settings.engine.model:
        raise ConfigError("--model: required: the directory of a Hugging Face checkpoint")
    # Replicas run with other working directories.
    return dataclasses.replace(
        settings,
        engine=dataclasses.replace(settings.engine, model=absolute(settings.engine.model)),
        adapters={name: absolute(path) for name, path in settings.adapters.items()},
        adapter_roots=tuple(map(absolute, settings.adapter_roots)),
        directory=absolute(settings.directory),
    )


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


def _read_yaml(path: Path, where: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: {reason}", field="config") from error
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
    """Checks the model's and the adapters' files before anything starts. Raises ConfigError."""
    engine = settings.engine
    if not Path(engine.model).is_dir():
        raise ConfigError(f"--model {engine.model}: no such directory", field="model")
    try:
        shape = read_shape(engine.model)
        Text.read(engine.model)
    except FleetError as error:
        raise ConfigError(f"--model {engine.model}: {error.message}", field="model") from error
    shape.divided(engine.tensor_parallel)
    for name, path in settings.adapters.items():
        try:
            check_name(name, engine.base_name)
        except FleetError as error:
            raise ConfigError(f"--adapter {name!r}: {error.message}", field="adapter") from error
        if "://" in path:
            continue
        try:
            inspect(path, shape, engine.rank_max)
        except FleetError as error:
            raise ConfigError(f"--adapter {name}={path}: {error.message}") from error


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
                ranks.append(read_adapter(path, read_shape(engine.model)).rank)
    return dataclasses.replace(engine, rank_expected=max(ranks, default=None))


def absolute(path: str) -> str:
    """Makes a path absolute, from the current directory; leaves a URL unchanged."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
