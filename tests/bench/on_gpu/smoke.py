"""The first minute on a GPU: what has never run there, each in a process of its own, side by side.

Whatever one of them does (raise, hang, crash, lose CUDA), the others have their say. Each adds a
line of JSON to `smoke.jsonl` when it ends; what failed is printed in full.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Whether each launch is waited for, so that an error is raised by the one that made it. Not where
# launches are captured, or are to run beside something.
PROBES = {
    "versions": True,
    "integers": True,
    "prefill": True,
    "decode": True,
    "lora": True,
    "fused": True,
    "sampling": True,
    "fetch": True,
    "lock": True,
    "eager": True,
    "captured": False,
    "captured-in-line": False,
    "copies": False,
    "profiler": False,
}
# A killed process tells where it was, and is killed in earnest after so long.
_LAST_WORDS_S = 3.0
_ERROR_LINES = 25


@dataclass(frozen=True, slots=True)
class _Probe:
    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    started_s: float

    @classmethod
    def start(cls, name: str, command: Sequence[str], out: Path) -> "_Probe":
        log = out / f"smoke-{name}.log"
        blocking = "1" if PROBES[name] else "0"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, "--probe", name, "--out", str(out)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"CUDA_LAUNCH_BLOCKING": blocking, "PYTHONUNBUFFERED": "1"},
            )
        return cls(name, process, log, time.monotonic())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGABRT)
        try:
            self.process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run(command: Sequence[str], out: Path, seconds: float, at_once: int) -> None:
    """command: of the bench, to which a probe's name is added. seconds: that each may take."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / "smoke.jsonl"
    results.write_text("")
    start_s = time.monotonic()
    waiting, running = list(PROBES), list[_Probe]()
    failed = 0
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(_Probe.start(waiting.pop(0), command, out))
        for probe in list(running):
            took_s, ended = time.monotonic() - probe.started_s, None
            if probe.process.poll() is not None:
                ended = f"ended with status {probe.process.returncode}"
            elif _late(probe, seconds):
                probe.kill()
                ended = f"killed after {seconds:g} s"
            if ended is not None:
                running.remove(probe)
                failed += not _tell(_line_of(probe, results, ended, took_s))
        time.sleep(0.05)
    took_s = time.monotonic() - start_s
    print(f"smoke: {len(PROBES) - failed} of {len(PROBES)} without a fault, {took_s:.0f} s")


def _late(probe: _Probe, seconds: float) -> bool:
    return time.monotonic() - probe.started_s > seconds


def _line_of(probe: _Probe, results: Path, ended: str, took_s: float) -> dict[str, Any]:
    """Its own, or else what its log says of its end."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    own: list[dict[str, Any]] = [line for line in lines if line["name"] == probe.name]
    if own:
        return own[0]
    log = probe.log.read_text(errors="replace").strip().splitlines()
    line = {
        "name": probe.name,
        "ok": False,
        "seconds": round(took_s, 1),
        "found": [text for text in log if text.startswith("[")][-_ERROR_LINES:],
        "error": "\n".join([ended, *log[-_ERROR_LINES:]]),
    }
    append(results, line)
    return line


def append(results: Path, line: dict[str, Any]) -> None:
    """Whole, beside what others append."""
    file = os.open(results, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (json.dumps(line) + "\n").encode())
    os.close(file)


def _tell(line: dict[str, Any]) -> bool:
    print(f"{'ok    ' if line['ok'] else 'FAILED'} {line['name']:<17} {line['seconds']:5.1f} s")
    for found in line["found"]:
        print(f"       {found[:150]}")
    for text in line.get("error", "").splitlines():
        print(f"       ! {text[:170]}")
    sys.stdout.flush()
    return bool(line["ok"])
