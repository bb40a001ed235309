"""The longest ITL while a large adapter loads, over the median ITL without a load.

Run with `python -m tests.bench.load_itl`. The adapter has rank 256 and is stored in fp32 (167 MB);
the model has 12 layers, is 768 wide and runs in bf16. The adapter is loaded and unloaded five times
while requests decode in the same engine. ITL is measured in the engine, between the ends of steps.
The adapter is pinned, so it loads without a request, whose prefill would take time of its own.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from cluster.config import EngineConfig
from cluster.values import Tier, Version
from replica.adapters.adapter_files import inspect
from replica.engine.engine import Engine
from replica.scheduling.request import NewRequest, Sampling
from tests.bench.decode import MODEL
from tests.models import make_adapter, make_model

_ENDLESS = Sampling(max_tokens=1900, temperature=0.0, ignore_eos=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8, help="requests that decode during the loads")
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="steps before each load")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        measure(args, Path(directory))


def measure(args: argparse.Namespace, directory: Path) -> None:
    model_dir = make_model(directory / "model", dtype=torch.bfloat16, **MODEL)
    path = make_adapter(directory / "large", model_dir, rank=256, strength=0.02)
    megabytes = (Path(path) / "adapter_model.safetensors").stat().st_size / 1e6
    engine = Engine(
        EngineConfig(model_dir, device="cpu", adapter_memory=128 * 2**20, threads=args.threads)
    )
    info = inspect(path, engine.shape, 256)
    version = Version("large", info.digest, path, info.rank, info.parameters, pinned=True)
    for i in range(args.rows):
        engine.add(NewRequest(f"{i}", tuple(range(10, 74)), _ENDLESS))
    gaps(engine, 20)
    medians, longest, seconds = [], [], []
    for n in range(args.loads + 1):
        before = gaps(engine, args.steps)
        during, load_s = one_load(engine, version)
        if n:  # The first load warms up.
            medians.append(statistics.median(before))
            longest.append(max(during))
            seconds.append(load_s)
    print(
        f"{args.rows} rows decoding, {torch.get_num_threads()} threads, {megabytes:.0f} MB on disk"
    )
    for median_s, longest_s, load_s in zip(medians, longest, seconds, strict=True):
        print(
            f"median ITL {median_s * 1e3:6.1f} ms; "
            f"longest during a load of {load_s:.2f} s {longest_s * 1e3:6.1f} ms"
        )
    pairs = zip(longest, medians, strict=True)
    ratio = statistics.median(longest_s / median_s for longest_s, median_s in pairs)
    print(f"longest during a load / median without: {ratio:.2f} (target 2.00 at most)")
    engine.close()


def gaps(engine: Engine, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        start_s = time.perf_counter()
        engine.step()
        found.append(time.perf_counter() - start_s)
    return found


def one_load(engine: Engine, version: Version) -> tuple[list[float], float]:
    """Loads the adapter, then unloads it. Returns the gaps during the load, and its duration."""
    engine.register(version, version.uri)
    found: list[float] = []
    start_s = time.perf_counter()
    while not any(e.tier is Tier.DEVICE for e in engine.adapter_states()):
        found += gaps(engine, 1)
    load_s = time.perf_counter() - start_s
    engine.forget(version.digest)
    gaps(engine, 2)
    return found, load_s


if __name__ == "__main__":
    main()
