"""Many random lives, on all cores: `python -m tests.sim.seeds --seeds 5000`."""

import argparse
import multiprocessing
import os
import sys
import time

from tests.sim.random_run import live


def outcome(seed: int) -> str | None:
    try:
        live(seed)
    except AssertionError as error:
        return str(error)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    start_s = time.monotonic()
    seeds = range(options.first, options.first + options.seeds)
    with multiprocessing.Pool(options.processes) as pool:
        failures = [f for f in pool.imap_unordered(outcome, seeds, chunksize=20) if f]
    took_s = time.monotonic() - start_s
    for failure in sorted(failures):
        print(failure)
    print(f"{options.seeds} seeds, {len(failures)} failed, {took_s:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
