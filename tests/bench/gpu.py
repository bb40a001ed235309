"""On a GPU: checks the kernels, times them, and measures the whole engine at Llama-3.1-8B's size.

    sh tests/bench/gpu.sh all DIR                     on a GPU machine, most valuable parts first
    python tests/bench/gpu.py --only decode --out DIR     one section
    python tests/bench/gpu.py --device cpu --tiny     a trial run in Triton's interpreter

Needs torch, triton, transformers, numpy and safetensors, but no network: it makes random weights
and adapters on the device. Sections, chosen with --only:

    smoke     a minute: each feature that may fail on a GPU, in its own process; excludes the others
    check     kernels against the reference, by relative error
    time      kernels against their floors of bytes or operations
    decode    LoRA's cost in decode, mixed steps and prefill; decode against its bandwidth floor;
              the engine's steps against the runner's
    upstream  the published workloads, next to the published figures
    trace     the device's idle time while large adapters are copied in
"""

import argparse
import importlib
import os
import signal
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("check", "time", "decode", "upstream", "trace")
_MODULES = {"time": "times"}


def main(arguments: list[str] | None = None) -> int:
    args = _parse(arguments)
    _prepare(args.device)
    if args.only == ("smoke",):
        return _smoke(args)
    import torch

    from tests.bench.on_gpu.models import scratch
    from tests.bench.on_gpu.report import Report
    from tests.bench.on_gpu.served import release
    from tests.bench.on_gpu.setting import Setting

    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    if args.probe is not None:
        from tests.bench.on_gpu import probes

        with scratch(2**20) as directory:
            report = Report(args.out, keep=False)
            layers = 1 if args.tiny else 2
            setting = Setting(device, args.tiny, directory, report, args.seed, layers)
            setting.until_s = time.monotonic() + args.budget_s
            probes.run(args.probe, setting, _heading(device, args))
        return 0
    # With tiny shapes on a CPU, only the kernels' results mean anything.
    report = Report(args.out, claims=("check",) if args.tiny else _claims(args.device))
    # When gpu.sh ends a section at its time limit, still write the table.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with scratch(2**20) as directory:
        setting = Setting(device, args.tiny, directory, report, args.seed)
        setting.kernels, setting.dtypes = args.kernels, args.dtypes
        setting.tables, setting.variants = args.tables, args.variants
        heading = _heading(device, args)
        report.tell(heading[0])

        def run(name: str) -> None:
            release(device)
            module = importlib.import_module(f"tests.bench.on_gpu.{_MODULES.get(name, name)}")
            module.run(setting)

        for name in args.only:
            setting.until_s = time.monotonic() + args.budget_s
            try:
                setting.attempt(name, "section", partial(run, name))
            except KeyboardInterrupt:
                report.skipped(name, "the rest of the section", "it was interrupted")
                break
    report.finish(heading)
    return 1 if report.failures else 0


def _smoke(args: argparse.Namespace) -> int:
    from tests.bench.on_gpu import smoke

    each_s = min(args.budget_s, 45.0 if args.device == "cuda" else 180.0)
    command = [sys.executable, str(Path(__file__)), "--device", args.device]
    command += ["--seed", str(args.seed), "--budget-s", str(each_s - 10)]
    command += ["--tiny"] if args.tiny else []
    at_once = len(smoke.PROBES) if args.device == "cuda" else os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as directory:
        smoke.run(command, args.out or Path(directory), each_s, at_once)
    return 0


def _claims(device: str) -> tuple[str, ...]:
    """The sections whose limits apply. Those of `upstream` are milliseconds on an H200."""
    import torch

    published = device == "cuda" and "H200" in torch.cuda.get_device_name()
    return tuple(name for name in SECTIONS if name != "upstream" or published)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=_names, default=SECTIONS, help="sections, comma-separated")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, few requests")
    parser.add_argument(
        "--budget-s", type=float, default=540.0, help="after it, a section starts nothing new"
    )
    parser.add_argument("--out", type=Path, help="directory for results.jsonl and table.md")
    parser.add_argument("--kernels", type=_words, default=(), help="for check, comma-separated")
    parser.add_argument("--dtypes", type=_words, default=(), help="for check, comma-separated")
    parser.add_argument("--tables", type=_words, default=(), help="for upstream, comma-separated")
    parser.add_argument("--variants", type=_words, default=(), help="of places, shared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe", help=argparse.SUPPRESS)  # used by smoke
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu: only with --tiny")
    return args


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _names(text: str) -> tuple[str, ...]:
    names = _words(text)
    if names == ("smoke",):
        return names
    if unknown := set(names) - set(SECTIONS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not a section")
    return names


def _prepare(device: str) -> None:
    """Sets the environment and sys.path. Call it before torch and triton are imported."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    # Profiling fails with captured CUDA graphs if CUPTI is torn down between two profiles.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    # Python puts this file's directory first, and its router.py would shadow the router package.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT / "tests/bench"]
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    if "tests" not in sys.modules:
        # Our tests/ has no __init__.py, so an installed package of that name would take precedence.
        package = types.ModuleType("tests")
        package.__path__ = [str(ROOT / "tests")]
        sys.modules["tests"] = package


def _heading(device: "object", args: argparse.Namespace) -> list[str]:
    import torch
    import triton

    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, interpreted"
    sizes = "tiny shapes" if args.tiny else "Llama-3.1-8B's shapes"
    return [
        f"{name}, torch {torch.__version__}, triton {triton.__version__}, CUDA "
        f"{torch.version.cuda}, ptxas {_ptxas()}, Python {sys.version.split()[0]}, {sizes}"
    ]


def _ptxas() -> str:
    """The version of Triton's assembler, since some wrong results are its bugs."""
    try:
        from triton import knobs

        return str(knobs.nvidia.ptxas.version)
    except Exception:  # the attribute varies with Triton's version, and is only printed
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
