"""The longest gap between tokens while a large adapter loads, over the median gap without.

Run with `python -m tests.bench.load_itl`. An r=256 adapter stored in fp32 (167 MB) for a 12-layer,
768-wide bf16 model is loaded while requests decode in the same engine. Gaps are between the ends of
steps, as the engine sees them; the loads come five times, each after the adapter was unloaded. It
is pinned, so that it comes without a request, whose prompt would be one more thing that takes time.
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
    parser.add_argument("--rows", type=int, default=8, help="requests that decode meanwhile")
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="steps without a load before each")
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
    calm, longest, seconds = [], [], []
    for n in range(args.loads + 1):
        before = gaps(engine, args.steps)
        during, load_s = one_load(engine, version)
        if n:  # The first warms up.
            calm.append(statistics.median(before))
            longest.append(max(during))
            seconds.append(load_s)
    print(
        f"{args.rows} rows decoding, {torch.get_num_threads()} threads, {megabytes:.0f} MB on disk"
    )
    for median_s, longest_s, load_s in zip(calm, longest, seconds, strict=True):
        print(
            f"median ITL {median_s * 1e3:6.1f} ms; "
            f"longest during a load of {load_s:.2f} s {longest_s * 1e3:6.1f} ms"
        )
    ratio = statistics.median(most / usual for most, usual in zip(longest, calm, strict=True))
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
    """Gaps until the adapter is on the device; then it goes."""
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
