"""Adding thousands of adapters to a live fleet of two: from a YAML file, and one by one.

    python -m tests.bench.many_adapters [--adapters 3000] [--known 10000]

Real Ray, HAProxy, Redis and engines with a toy model on a CPU. Adapters are tiny, so that the
catalog counts and not the disk. First a file, with `lorafleet adapters add --file` (the command's
own start is part of the time), then another until `--known` adapters are known. Then as many again
one by one, over one connection. Prints seconds, the processors' milliseconds that an adapter cost
the fleet (which a busy machine changes less), and the answers that named a replica as late.
"""

import argparse
import contextlib
import http.client
import json
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import torch
import yaml

from replica.model.shape import read_shape
from tests.bench import processor
from tests.bench.toys import toy_adapter
from tests.fleet import LORAFLEET, Fleet, fleet
from tests.models import make_model

RANK = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=3000, help="adapters that a way adds")
    parser.add_argument("--known", type=int, default=10_000, help="known before one by one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lf-many-") as directory:
        root = Path(directory)
        model = make_model(root / "tiny")
        known = max(arguments.known, arguments.adapters)
        paths = write_adapters(root / "adapters", model, known + arguments.adapters)
        options = ["--model", model, "--replicas", "2", "--device", "cpu"]
        with fleet([*options, "--adapter-root", str(root / "adapters")], root) as running:
            measure(running, root, paths, arguments.adapters, known)
    print(processor.shown())


def measure(running: Fleet, root: Path, paths: dict[str, str], count: int, known: int) -> None:
    names = list(paths)
    for part in (names[:count], names[count:known]):
        if part:
            named = {name: paths[name] for name in part}
            with Meter(running, "from a YAML file", len(part)) as meter:
                meter.late = add_file(running, root / "adapters.yaml", named)
    connection = connect(running)
    with Meter(running, f"one by one, {known} known", count) as meter:
        for name in names[known:]:
            meter.late += add_one(connection, name, paths[name])
    page = running.adapters()
    assert len(page["data"]) == len(paths), f"{len(page['data'])} of {len(paths)} are there"


class Meter:
    """Prints what a way of adding took. late: answers that named a replica as late."""

    def __init__(self, running: Fleet, what: str, count: int) -> None:
        self._running, self._what, self._count = running, what, count
        self.late = 0

    def __enter__(self) -> "Meter":
        self._busy_s, self._started_s = self._busy(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        seconds, busy_s = time.perf_counter() - self._started_s, self._busy() - self._busy_s
        print(
            f"{self._what:26} {self._count:6} adapters {seconds:7.2f} s, "
            f"{seconds / self._count * 1e3:6.2f} ms each; "
            f"{busy_s / self._count * 1e3:6.2f} ms of processors each; {self.late} late",
            flush=True,
        )

    def _busy(self) -> float:
        total_s = 0.0
        for process in self._running.processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total_s += times.user + times.system
        return total_s


def add_file(running: Fleet, file: Path, paths: dict[str, str]) -> int:
    """Returns the calls after which a replica was late."""
    file.write_text(yaml.safe_dump({"adapters": paths}))
    command = [LORAFLEET, "adapters", "add", "--file", str(file), "--url", running.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.count("Not yet acknowledged")


def connect(running: Fleet) -> http.client.HTTPConnection:
    address = urlsplit(running.url)
    return http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)


def add_one(connection: http.client.HTTPConnection, name: str, path: str) -> bool:
    """True if a replica was late."""
    body = json.dumps({"lora_name": name, "lora_path": path})
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/load_lora_adapter", body, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    assert answer.status == 200, text
    return "x-lorafleet-pending" in answer.headers


def write_adapters(root: Path, model: str, count: int) -> dict[str, str]:
    """Name → path. They differ in one weight, since PEFT takes long to write thousands."""
    first = Path(toy_adapter(root / "a00000", read_shape(model), RANK, 1, torch.float32))
    config = (first / "adapter_config.json").read_bytes()
    tensors = (first / "adapter_model.safetensors").read_bytes()
    paths = {first.name: str(first)}
    for number in range(1, count):
        directory = root / f"a{number:05}"
        directory.mkdir()
        (directory / "adapter_config.json").write_bytes(config)
        last = struct.pack("<f", number / 2**20)
        (directory / "adapter_model.safetensors").write_bytes(tensors[: -len(last)] + last)
        paths[directory.name] = str(directory)
    return paths


if __name__ == "__main__":
    main()
