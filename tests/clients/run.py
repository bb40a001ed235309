"""Runs other people's clients against a demo fleet, and schemathesis against a replica.

    make clients                                        # or, once installed:
    python -m tests.clients.run [--only with_openai …]

Each `with_*` script makes real calls, checks what it gets, and prints in one line what it did.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.demo import demo, model
from tests.fleet import replica

HERE = Path(__file__).parent
BIN = Path(".venv/clients/bin").absolute()
CLIENT_S = 300.0
SCHEMATHESIS_S = 1800.0
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="names of scripts, or schemathesis")
    parser.add_argument("--examples", type=int, default=10, help="of schemathesis, an operation")
    arguments = parser.parse_args()
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    model.make(demo.MODELS)
    wanted = arguments.only
    commands = {name: each for name, each in _commands() if not wanted or name in wanted}
    rows: list[tuple[str, bool, float, str]] = []
    if commands:
        port = demo.free_port()
        directory = demo.FLEET / "clients-state"
        directory.mkdir(parents=True, exist_ok=True)
        with demo.fleet(port, directory):
            url = f"http://127.0.0.1:{port}/v1"
            rows += [(name, *_run(command, url)) for name, command in commands.items()]
    if not wanted or "schemathesis" in wanted:
        rows.append(("schemathesis", *_schemathesis(arguments.examples)))
    width = max(len(name) for name, *_ in rows)
    for name, passed, took_s, said in rows:
        print(f"{name:{width}}  {'passed' if passed else 'FAILED'}  {took_s:5.1f} s  {said}")
    sys.exit(not all(passed for _, passed, *_ in rows))


def _commands() -> Iterator[tuple[str, list[str]]]:
    for script in sorted(HERE.glob("with_*.py")):
        own = Path(f".venv/clients-{script.stem}/bin").absolute()
        yield script.stem, [str((own if own.exists() else BIN) / "python"), str(script)]
    for script in sorted((HERE / "node").glob("with_*.mjs")):
        yield script.stem, ["node", str(script)]


def _run(command: Sequence[str], url: str) -> tuple[bool, float, str]:
    """Passed or not, how long it took, and its last line."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENAI_", "PYTHONPATH"))
    }
    environment |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "none"}
    began_s = time.monotonic()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=CLIENT_S
        )
    except subprocess.TimeoutExpired:
        return False, CLIENT_S, "no end"
    took_s = time.monotonic() - began_s
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, took_s, lines[-1] if lines else ""


def _schemathesis(examples: int) -> tuple[bool, float, str]:
    """All operations of a replica with the toy model: no 500, no answer that is not documented."""
    base, adapters = model.paths(demo.MODELS.resolve())
    log = demo.FLEET / "clients-replica.log"
    arguments = ["--adapter", f"pirate={adapters['pirate']}", "--device", "cpu"]
    arguments += ["--adapter-root", str(base.parent / "adapters")]
    with replica(base, arguments, log) as (_, url, _):
        command = [str(BIN / "schemathesis"), "run", f"{url}/openapi.json"]
        command += ["--checks", ",".join(CHECKS), "--max-examples", str(examples)]
        command += ["--phases", "coverage,fuzzing", "--generation-deterministic"]
        command += ["--header", "x-request-deadline-ms: 600000", "--request-timeout", "300"]
        command += ["--continue-on-failure", "--warnings", "off"]
        began_s = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=SCHEMATHESIS_S)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    counted = [line for line in done.stdout.splitlines() if "generated" in line]
    said = counted[-1].strip() if counted else "it did not run"
    return done.returncode == 0, time.monotonic() - began_s, said


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
