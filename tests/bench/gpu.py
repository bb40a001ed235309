"""On a GPU: checks the kernels, times them, and measures the whole engine at Llama-3.1-8B's size.

    python tests/bench/gpu.py --out DIR               on the GPU machine, 10 minutes a section
    python tests/bench/gpu.py --device cpu --tiny     that it runs, in Triton's interpreter

Needs torch, triton, transformers, numpy and safetensors, and no network: weights and adapters are
random, made on the device. Sections, each by itself with --only:

    check     kernels against the reference, by relative error
    time      kernels over their own floor of bytes or operations
    decode    decode steps over the bandwidth floor, what LoRA adds, prefill over its matmuls
    upstream  the published workloads, beside the published figures
    trace     how long the device waits while large adapters are copied in
"""

import argparse
import importlib
import os
import signal
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("check", "time", "decode", "upstream", "trace")
_MODULES = {"time": "times"}


def main(arguments: list[str] | None = None) -> int:
    args = _parse(arguments)
    _prepare(args.device)
    import torch

    from tests.bench.on_gpu.models import scratch
    from tests.bench.on_gpu.report import Report
    from tests.bench.on_gpu.served import release
    from tests.bench.on_gpu.setting import Setting

    device = torch.device(args.device)
    # Of tiny shapes on a processor only the sums can be right or wrong.
    report = Report(args.out, claims=("check",) if args.tiny else SECTIONS)
    torch.manual_seed(args.seed)
    # Whoever's time is up still gets the table.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with scratch(2**20) as directory:
        setting = Setting(device, args.tiny, directory, report, args.seed)
        setting.tables, setting.variants, setting.dtypes = args.tables, args.variants, args.dtypes
        heading = _heading(device, args)
        report.tell(heading[0])
        for name in args.only:
            setting.until_s = time.monotonic() + args.budget_s
            try:
                release(device)
                module = importlib.import_module(f"tests.bench.on_gpu.{_MODULES.get(name, name)}")
                module.run(setting)
            except Exception as error:
                # The other sections still have something to say.
                report.failed(name, "section", error)
            except KeyboardInterrupt:
                report.skipped(name, "the rest of the section", "it was interrupted")
                break
    report.finish(heading)
    return 1 if report.failures else 0


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
    parser.add_argument("--dtypes", type=_words, default=(), help="of check, with commas")
    parser.add_argument("--tables", type=_words, default=(), help="upstream's, with commas")
    parser.add_argument("--variants", type=_words, default=(), help="places, shared")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu: only with --tiny")
    return args


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _names(text: str) -> tuple[str, ...]:
    names = _words(text)
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
