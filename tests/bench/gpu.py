"""On a GPU: checks the kernels, times them, and measures the whole engine at Llama-3.1-8B's size.

    sh tests/bench/gpu.sh all DIR                     on the GPU machine, what is worth most first
    python tests/bench/gpu.py --only decode --out DIR     one section
    python tests/bench/gpu.py --device cpu --tiny     that it runs, in Triton's interpreter

Needs torch, triton, transformers, numpy and safetensors, and no network: weights and adapters are
random, made on the device. Sections, each by itself with --only:

    smoke     a minute: each thing that may fail on a GPU in a process of its own; only by itself
    check     kernels against the reference, by relative error
    time      kernels over their own floor of bytes or operations
    decode    what LoRA adds to decode, mixed steps and prefill; decode over its bandwidth floor;
              the engine's steps over the runner's
    upstream  the published workloads, beside the published figures
    trace     how long the device waits while large adapters are copied in
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
    # Of tiny shapes on a processor only the sums can be right or wrong.
    report = Report(args.out, claims=("check",) if args.tiny else _claims(args.device))
    # Whoever's time is up still gets the table.
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
    """Milliseconds of published workloads are claimed of the card that they were worked out for."""
    import torch

    published = device == "cuda" and "H200" in torch.cuda.get_device_name()
    return tuple(name for name in SECTIONS if name != "upstream" or published)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=_names, default=SECTIONS, help="sections, with commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, few requests")
    parser.add_argument(
        "--budget-s", type=float, default=540.0, help="no section begins anything new after it"
    )
    parser.add_argument("--out", type=Path, help="for results.jsonl and table.md")
    parser.add_argument("--kernels", type=_words, default=(), help="of check, with commas")
    parser.add_argument("--dtypes", type=_words, default=(), help="of check, with commas")
    parser.add_argument("--tables", type=_words, default=(), help="upstream's, with commas")
    parser.add_argument("--variants", type=_words, default=(), help="places, shared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe", help=argparse.SUPPRESS)  # what smoke starts
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
    """Before torch and triton are imported."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    # A profiler that is taken down between two profiles does not live with captured graphs.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    # This file's own directory comes first by default, and holds a router.py and a scheduler.py.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT / "tests/bench"]
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    if "tests" not in sys.modules:
        # Ours has no __init__.py: any installed package of that name would be found instead.
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
    """The assembler that Triton uses: some wrong sums are its own."""
    try:
        from triton import knobs

        return str(knobs.nvidia.ptxas.version)
    except Exception:  # differs from version to version of Triton, and is only told
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
