"""Many random runs on all cores, at depth 1 and 2: `python -m tests.sim.seeds --seeds 5000`."""

import argparse
import multiprocessing
import os
import sys
import time

from tests.sim.random_run import run_seed


def outcome(seed_and_depth: tuple[int, int]) -> str | None:
    """Runs a seed at a depth. Returns the failure, if any."""
    try:
        run_seed(*seed_and_depth)
    except AssertionError as error:
        return str(error)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--depth", type=int, choices=(1, 2), help="one depth only")
    options = parser.parse_args()
    start_s = time.monotonic()
    depths = (options.depth,) if options.depth else (1, 2)
    seeds = range(options.first, options.first + options.seeds)
    runs = [(seed, depth) for seed in seeds for depth in depths]
    with multiprocessing.Pool(options.processes) as pool:
        failures = [f for f in pool.imap_unordered(outcome, runs, chunksize=20) if f]
    took_s = time.monotonic() - start_s
    for failure in sorted(failures):
        print(failure)
    print(f"{len(runs)} runs, {len(failures)} failed, {took_s:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
