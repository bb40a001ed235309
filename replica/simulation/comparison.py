"""Simulated figures beside the published ones, and the claims about them."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from replica.scheduling.turns import Sharing
from replica.simulation.cards import image_bytes
from replica.simulation.published import published
from replica.simulation.simulator import Figures
from replica.simulation.upstream import (
    CHUNK_TOKENS,
    POLICIES,
    SHARED,
    TABLES,
    Replay,
    Table,
    replay,
)

TITLES = {
    "ttft_mean_ms": "TTFT mean",
    "ttft_p50_ms": "TTFT median",
    "ttft_p99_ms": "TTFT P99",
    "e2e_mean_ms": "E2E mean",
    "itl_max_ms": "ITL longest",
    "tpot_p50_ms": "TPOT median",
}
REPORTED = ("ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms", "e2e_mean_ms", "itl_max_ms")
_TTFT = ("ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms")

# Table → figure → upper bound for ours, in milliseconds.
GOALS: Mapping[str, Mapping[str, float]] = {
    "14795": {"ttft_mean_ms": 300},
    "17913": {"ttft_p99_ms": 800, "ttft_p50_ms": 150},
    "17913-packed": {"ttft_p99_ms": 200},
    "15512-large": {"ttft_p99_ms": 700, "ttft_mean_ms": 200},
    "15512-small": {"ttft_p99_ms": 600, "ttft_mean_ms": 150},
}
# Upper bound with one memory for adapters and KV pages, in every table.
SHARED_TTFT_P99_MS = 150.0


@dataclass(frozen=True, slots=True)
class Check:
    """text: the claim, with its figures."""

    holds: bool
    text: str


@dataclass(frozen=True, slots=True)
class Compared:
    """One replayed table.

    replays: by policy.
    all_base: the same requests for the base model only, if the table has a base stream.
    depth: at which ours ran.
    cold: adapters started as files.
    """

    table: Table
    replays: Mapping[str, Replay]
    all_base: Replay | None
    seeds: int = 0
    depth: int = 2
    cold: bool = False

    def median(self, policy: str, stream: str) -> Figures:
        return self.replays[policy].median(stream)


def compare(name: str, seeds: int, depth: int = 2, cold: bool = False) -> Compared:
    table = TABLES[name]
    replays = {
        policy: replay(table, policy, range(seeds), depth, cold) for policy in (*POLICIES, SHARED)
    }
    all_base = None
    if any(stream.name == "base" for stream in table.streams):
        all_base = replay(table.all_base(), "ours", range(seeds), depth)
    return Compared(table, replays, all_base, seeds, depth, cold)


def as_json(compared: Sequence[Compared]) -> dict[str, dict[str, object]]:
    """Table → policy → figures; by stream if there are two."""
    return {each.table.name: {p: _json(each, p) for p in each.replays} for each in compared}


def _json(compared: Compared, policy: str) -> object:
    by_stream = {}
    for stream in compared.table.streams:
        found = compared.median(policy, stream.name)
        by_stream[stream.name] = {key: round(getattr(found, key), 1) for key in REPORTED}
    return by_stream if len(by_stream) > 1 else by_stream[compared.table.streams[0].name]


def reproduction(compared: Compared) -> Iterator[Check]:
    """Each published figure is simulated within a factor of 2, and its change has the same sign."""
    name = compared.table.name
    for stream in compared.table.streams:
        stated = {p: published(name, p, stream.name) for p in ("before", "after")}
        for key in stated["before"]:
            found = {p: getattr(compared.median(p, stream.name), key) for p in stated}
            for policy, figures in stated.items():
                far = max(found[policy], figures[key]) / min(found[policy], figures[key])
                text = (
                    f"{stream.name} {TITLES[key]} {policy}: {_ms(found[policy])}, published "
                    f"{_ms(figures[key])}: within a factor of 2"
                )
                if far > 2:
                    values = [
                        getattr(f, key) for f in compared.replays[policy].figures[stream.name]
                    ]
                    text += f"; the seeds gave {_ms(min(values))} to {_ms(max(values))}"
                yield Check(far <= 2, text)
            before, after = stated["before"][key], stated["after"][key]
            same = (after < before) == (found["after"] < found["before"])
            text = (
                f"{stream.name} {TITLES[key]}: {_ms(found['before'])} → {_ms(found['after'])}, "
                f"the way of {_ms(before)} → {_ms(after)}"
            )
            yield Check(same, text)


def claims(compared: Compared) -> Iterator[Check]:
    """What ours must show."""
    name = compared.table.name
    for stream in compared.table.streams:
        ours, after, before = (compared.median(p, stream.name) for p in ("ours", "after", "before"))
        for key in _TTFT:
            yield _below(f"{stream.name} {TITLES[key]}", key, ours, getattr(after, key), "after")
        better = min(before.e2e_mean_ms, after.e2e_mean_ms)
        share = 1.2 if name == "14795" and stream.name == "lora" else 1.05
        yield _below(
            f"{stream.name} E2E mean",
            "e2e_mean_ms",
            ours,
            share * better,
            f"{share} × the better of before and after",
        )
        yield _below(
            f"{stream.name} ITL longest",
            "itl_max_ms",
            ours,
            itl_bound_ms(compared.table),
            "the bound of its turns",
        )
        if stream.name == "lora":
            for key, most in GOALS[name].items():
                yield _below(f"{stream.name} {TITLES[key]}", key, ours, most, "the goal")
        elif compared.all_base is not None:
            alone = compared.all_base.median("base")
            for key, share in (("ttft_mean_ms", 1.1), ("e2e_mean_ms", 1.05)):
                most = share * getattr(alone, key)
                yield _below(f"base {TITLES[key]}", key, ours, most, f"{share} × all base")
        if SHARED in compared.replays:
            shared = compared.median(SHARED, stream.name)
            what = f"{stream.name} TTFT P99 with one memory"
            yield _below(what, "ttft_p99_ms", shared, SHARED_TTFT_P99_MS, "the goal")


def itl_bound_ms(table: Table) -> float:
    """31 × ceil((A − S) ÷ S) × (slice + 2 copies) for A adapters on S places, plus 2 prompt chunks.

    31: it is overdue after 30 turns of all, and the others may be too (`Turns.bound_s`). The
    chunks are those of the two steps that may be planned before the adapter's turn.
    """
    adapters, places = len(table.ranks), table.places
    copy_s = table.card.copy_s(image_bytes(max(table.ranks.values())))
    turns = math.ceil((adapters - places) / places)
    chunk_s = table.card.prompt_s(CHUNK_TOKENS)
    return (31 * turns * (table.ours.sharing.quantum_s + 2 * copy_s) + 2 * chunk_s) * 1e3


def _below(what: str, key: str, ours: Figures, most: float, of: str) -> Check:
    value = getattr(ours, key)
    return Check(value <= most, f"{what}: {_ms(value)} ≤ {_ms(most)} ({of})")


def lines(compared: Compared) -> Iterator[str]:
    """The table and its checks, as text."""
    table = compared.table
    yield f"{table.name}: {table.title}"
    for stream in table.streams:
        base = compared.all_base if stream.name == "base" else None
        heads = ["before", "after", "before", "after", "ours"]
        heads += ["one memory"] if SHARED in compared.replays else []
        heads += ["all base"] if base is not None else []
        yield f"  {stream.name + ', ms':14}" + "".join(f"{head:>11}" for head in heads)
        for key, title in TITLES.items():
            cells = [published(table.name, p, stream.name).get(key) for p in ("before", "after")]
            cells += [getattr(compared.median(p, stream.name), key) for p in compared.replays]
            if base is not None:
                cells.append(getattr(base.median("base"), key))
            yield f"  {title:14}" + "".join(f"{_ms(cell):>11}" for cell in cells)
    for check in claims(compared):
        yield f"  {'✓' if check.holds else '✗'} {check.text}"
        if not check.holds and TITLES["e2e_mean_ms"] in check.text:
            yield from _turn_costs(compared)
        if not check.holds and check.text.startswith("base TTFT"):
            yield from _mixing_costs(compared)
    # The published servers had their adapters in host memory.
    reproduced = [] if compared.cold else list(reproduction(compared))
    if reproduced:
        holding = sum(check.holds for check in reproduced)
        yield f"  reproduced: {holding} of {len(reproduced)} comparisons with what was published"
    for check in reproduced:
        if not check.holds:
            yield f"  ✗ {check.text}"


HEADER = (
    "Medians over the seeds. First two columns: published. The others: simulated, "
    "upstream before and after, ours at the same places, and ours with one memory for adapters "
    "and KV pages on the whole card."
)


def _turn_costs(compared: Compared) -> Iterator[str]:
    """How much of our E2E time comes from copies, and how much from taking turns at all."""
    table = compared.table
    free = dataclasses.replace(table.card, copy_bytes_per_s=math.inf)
    waits = dataclasses.replace(table.ours, sharing=Sharing(park=False))
    for what, changed in (
        ("with copies that take no time", dataclasses.replace(table, card=free)),
        ("without parking", dataclasses.replace(table, ours=waits)),
    ):
        seeds = range(compared.seeds)
        found = replay(changed, "ours", seeds, compared.depth, compared.cold).median("lora")
        yield (
            f"    ours {what}: E2E mean {_ms(found.e2e_mean_ms)}, "
            f"TTFT P99 {_ms(found.ttft_p99_ms)}, ITL longest {_ms(found.itl_max_ms)}"
        )


def _mixing_costs(compared: Compared) -> Iterator[str]:
    """What decodes in the batch of a prompt add to its TTFT, and what mixing saves."""
    table = compared.table
    alone = dataclasses.replace(table, ours=dataclasses.replace(table.ours, mixed=False))
    found = replay(alone, "ours", range(compared.seeds), compared.depth).median("base")
    mixed = compared.median("ours", "base")
    yield (
        f"    ours with prompts in batches of their own: TTFT median {_ms(found.ttft_p50_ms)}, "
        f"E2E mean {_ms(found.e2e_mean_ms)}; in one with decodes: {_ms(mixed.ttft_p50_ms)}, "
        f"{_ms(mixed.e2e_mean_ms)}"
    )


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.1f}" if value < 20 else f"{value:,.0f}"
