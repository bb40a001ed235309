"""The program: parses arguments and calls; `app` is what `serve run` and the manifests name."""

import asyncio
import dataclasses
import importlib.metadata
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from cluster.errors import AdapterRefused, ConfigError, FleetError
from replica.adapters.found_files import check_present
from replica.serving.process import ending_at_once, listen, until_signalled
from replica.serving.settings import (
    absolute,
    check_files,
    read_adapters,
    read_settings,
    with_rank_expected,
)
from router.flags import AllRows, ApiKey, AsJson, Filter, Url, with_flags

EXIT_FAILED, EXIT_USAGE = 1, 2

cli = typer.Typer(
    name="lorafleet",
    help="One base model, thousands of LoRA adapters, a fleet of replicas.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
adapters_cli = typer.Typer(
    help="Add, remove and list the adapters of a running fleet.", no_args_is_help=True
)
cli.add_typer(adapters_cli, name="adapters")
config_cli = typer.Typer(help="What the configuration is.", no_args_is_help=True)
cli.add_typer(config_cli, name="config")
simulate_cli = typer.Typer(
    help="Run the scheduler on a virtual clock; no model or GPU is needed.", no_args_is_help=True
)
cli.add_typer(simulate_cli, name="simulate")


def _say_version(asked: bool) -> None:
    if asked:
        print(importlib.metadata.version("lorafleet"))
        raise typer.Exit


@cli.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_say_version)
    ] = False,
) -> None:
    pass


def app(arguments: dict[str, Any]) -> Any:
    """The Serve application, from the fields of FleetConfig. `serve run lorafleet:app` calls it."""
    from router.app import build

    return build(arguments)


def main() -> None:
    try:
        cli()
    except (ConfigError, AdapterRefused) as error:
        _exit(error.message, EXIT_USAGE)
    except FleetError as error:
        _exit(error.message, EXIT_FAILED)


LOCAL_URL = "http://127.0.0.1:8000"
PRIVATE = 0o077  # a fleet's files, sockets and logs are its user's alone


@cli.command()
@with_flags()
def serve(flags: Mapping[str, Any]) -> None:
    """Serve a model and its adapters on one or more replicas, until Ctrl-C.

    Ctrl-C lets running requests end, for `drain_s` at most; a second one does not.

    Example: lorafleet serve --model ./llama --adapter fr=./adapters/french --replicas 2

    A SIZE is a number of bytes, or one such as 64MiB or 8GiB.
    """
    os.umask(PRIVATE)
    settings = read_settings(flags)
    check_files(settings)
    listen(settings.host, settings.port).close()  # HAProxy's own words are harder to read
    from router.local import LocalFleet

    fleet = LocalFleet(settings)
    with until_signalled(fleet.kill) as signalled:
        try:
            with ending_at_once(fleet.abandon):
                fleet.start()
            fleet.say(f"ready: {fleet.url}/v1")
            fleet.wait(signalled)
        finally:
            fleet.stop()


@cli.command()
@with_flags("replicas", "redis_url", "directory")
def replica(flags: Mapping[str, Any]) -> None:
    """Serve a model and its adapters from this one process and its engine: no Ray, no Redis.

    Example: lorafleet replica --model ./llama --adapter fr=./adapters/french --port 8001

    A SIZE is a number of bytes, or one such as 64MiB or 8GiB.
    """
    os.umask(PRIVATE)
    settings = read_settings(flags)
    check_files(settings)
    settings = dataclasses.replace(settings, engine=with_rank_expected(settings))
    from replica.serving.single_process import run

    with listen(settings.host, settings.port) as listener, until_signalled():
        asyncio.run(run(settings, listener))


@cli.command()
@with_flags()
def doctor(flags: Mapping[str, Any]) -> None:
    """Look at what `serve` with the same flags needs, and say what is wrong and what to do.

    Example: lorafleet doctor --model ./llama --adapter fr=./adapters/french --replicas 2

    Exits with 1 if anything would keep the fleet from starting.
    """
    from router.doctor import State, examine

    failed = False
    for found in examine(read_settings(flags)):
        print(f"{found.state:7}  {found.about:8}  {found.text}", flush=True)
        if found.step:
            print(f"{'':19}-> {found.step}", flush=True)
        failed = failed or found.state is State.FAILED
    raise SystemExit(EXIT_FAILED if failed else 0)


@config_cli.command("show")
@with_flags()
def show(flags: Mapping[str, Any]) -> None:
    """Print the whole configuration that these flags and files make, as YAML, without secrets.

    Example: lorafleet config show --config fleet.yaml --replicas 2
    """
    from replica.serving.settings import shown_settings

    print(shown_settings(read_settings(flags)), end="")


@cli.command()
def status(
    name: Filter = "",
    every: AllRows = False,
    as_json: AsJson = False,
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
) -> None:
    """Show each replica's load, and where each adapter is: those on most devices first.

    device: ready to run. loading: on its way. host, disk: near. -: not there.
    """
    from router.client import call
    from router.tables import load_table, narrowed, show, tier_table

    page, left = narrowed(call(url, api_key, "GET", "/v1/adapters").json(), name, every or as_json)
    show(page, [load_table(page), tier_table(page)], left, as_json)


@adapters_cli.command()
def add(
    name: Annotated[
        str | None, typer.Argument(help="The model name that clients will ask for.")
    ] = None,
    path: Annotated[
        str | None,
        typer.Argument(
            help="Directory of the adapter. On the fleet's machine its own user may add any; "
            "others, those below an --adapter-root."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="YAML with `adapters: {NAME: PATH, …}`: add all of them."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Point an existing name at this adapter.")
    ] = False,
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Load it at once, and keep it on every device.")
    ] = False,
    weight: Annotated[
        float, typer.Option(help="Its share of the batch against others', with --fair-share.")
    ] = 1.0,
    upload: Annotated[
        bool,
        typer.Option("--upload", help="Send the files of a directory of this machine."),
    ] = False,
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
) -> None:
    """Add an adapter, or all of a file, to the whole fleet.

    Example: lorafleet adapters add fr ./adapters/french
    """
    from router.client import add_adapters, upload_adapter

    if not math.isfinite(weight):  # JSON has no word for it
        raise ConfigError(f"--weight {weight}: must be a finite number", field="weight")
    if (file is None) == (name is None or path is None):
        raise ConfigError("adapters add: give either NAME and PATH, or --file")
    if upload:
        if not (name and path):
            raise ConfigError("adapters add --upload: takes NAME and PATH")
        check_present(absolute(path))
        fields = {"lora_name": name, "load_inplace": replace, "pinned": pinned, "weight": weight}
        print(upload_adapter(url, api_key, absolute(path), fields))
        return
    paths = {name: absolute(path)} if name and path else read_adapters(file or Path())
    entries = [
        {"lora_name": name, "lora_path": path, "pinned": pinned, "weight": weight}
        for name, path in paths.items()
    ]
    for line in add_adapters(url, api_key, entries, replace):
        print(line)


@adapters_cli.command()
def rm(
    name: Annotated[str, typer.Argument(help="The adapter's name.")],
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
) -> None:
    """Remove an adapter from the whole fleet; requests that run with it are finished."""
    from router.client import call

    print(call(url, api_key, "POST", "/v1/unload_lora_adapter", {"lora_name": name}).text)


@adapters_cli.command()
def ls(
    name: Filter = "",
    every: AllRows = False,
    as_json: AsJson = False,
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
) -> None:
    """List the adapters, those on most devices first.

    Name, rank, weight, version, on how many devices, files.
    """
    from router.client import call
    from router.tables import adapter_table, narrowed, show

    page, left = narrowed(call(url, api_key, "GET", "/v1/adapters").json(), name, every or as_json)
    show(page, [adapter_table(page)], left, as_json)


@config_cli.callback()
@simulate_cli.callback()
def _group() -> None:
    """Without it typer takes a group's only command for the group."""


@simulate_cli.command()
def upstream(
    json_only: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, of which the median is taken.")] = 5,
    depth: Annotated[
        int,
        typer.Option(
            min=1,
            max=2,
            help="For ours: 2 plans a step while the one before it runs, which is how the engine "
            "runs on CUDA; 1 plans it when that one has ended.",
        ),
    ] = 2,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold",
            help="Adapters start as files, and are read from disk once (1.3 GB/s), by all servers.",
        ),
    ] = False,
) -> None:
    """Replay the published upstream tables: before and after them, and ours (under a minute)."""
    import json

    from replica.simulation.comparison import HEADER, as_json, compare, lines
    from replica.simulation.upstream import TABLES

    if json_only:
        print(json.dumps(as_json([compare(name, seeds, depth, cold) for name in TABLES]), indent=2))
        return
    print(HEADER)
    for name in TABLES:
        print("", *lines(compare(name, seeds, depth, cold)), sep="\n", flush=True)


@simulate_cli.command("workload")
def simulate_workload(
    file: Annotated[
        Path, typer.Argument(help="YAML: a card, its memory, adapters, and who comes when.")
    ],
    json_only: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="ours: as the engine is configured. skip: adapters never take turns; who has no "
            "place waits until one is idle. drain: nor do they here, but one in use lets nobody "
            "new in when another has waited 3 s. resident: every adapter has a place, beside the "
            "same pages. Repeat it to compare (default: ours)."
        ),
    ] = None,
    ttft_slo: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Goodput: most seconds to the first token (default: `engine.ttft_target_s` of the "
            "file, or 1).",
        ),
    ] = None,
    tpot_slo: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Goodput: most seconds a token after it, on average (default: "
            "`engine.tpot_target_s` of the file, or 0.05).",
        ),
    ] = None,
) -> None:
    """Play a workload on the scheduler and a virtual clock: waits, copies, what is computed twice.

    Steps and copies take as long as Llama-3.1-8B would on the card named.
    Each figure is the median over the file's seeds. The README shows a file.

    goodput: the share of requests that met both targets.
    computed_over_needed: 1 when no token was computed twice.
    parks: rows that left the batch so that other adapters could have a turn.

    Example: lorafleet simulate workload chat.yaml --policy ours --policy skip
    """
    import json

    from replica.serving.settings import read_workload
    from replica.simulation.workload import POLICIES, Slo, simulate, table

    chosen = policy or ["ours"]
    for name in chosen:
        if name not in POLICIES:
            raise ConfigError(f"--policy: {name!r} is not one of {', '.join(POLICIES)}")
    workload, recorded = read_workload(file)
    slo = Slo(ttft_slo, tpot_slo)
    found = {name: simulate(workload, name, recorded, slo) for name in chosen}
    if json_only:
        print(
            json.dumps({name: dataclasses.asdict(each) for name, each in found.items()}, indent=2)
        )
    else:
        print(*table(found), sep="\n")


def _exit(message: str, code: int) -> NoReturn:
    print(f"lorafleet: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
