"""What to keep of the catalog when Redis comes back with less than it had: the newest of each name.

Each change of a name leaves a record with a stamp, removals too. Of two records of a name the later
stamp wins, so books merge in any order, and a record lives as long as any replica that has it.

    stamp = (generation, sequence)    the sequence counts changes; a generation begins when Redis
                                      may have lost some, and its number is a time in ms

Redis may have lost changes if it restarted, if another server took over, or if what it holds is not
what its state says. Then nobody changes anything before each replica had one lease to write back
what it knows:

    Redis                                           a replica writes back what it has newer, and
    settled, and as new as the replica's copy       FOLLOW  goes on
    has lost changes, nobody has noticed            BEGIN   notes the time
    settling for less than a lease                  WAIT    waits
    settling for a lease                            SETTLE  begins a new generation
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cluster.values import VERSION_FIELDS, Version

Stamp = tuple[int, int]

# Removals that are remembered. An older state may undo a removal when this many came after it.
REMOVALS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Record:
    """What was last said of a name. version: None if it was removed.

    run: id of the last run of the fleet whose flags set it. text: the record as it is in Redis. It
    may have fields that only a newer process knows.
    """

    stamp: Stamp
    version: Version | None
    run: str
    text: str


@dataclass(frozen=True, slots=True)
class Head:
    """The catalog's state in Redis, and what Redis says of itself at that moment.

    generation: 0: none has begun. count: records that the catalog had after the last change; held:
    records that it has. settled_by, server: ids of the server that the generation began on, and of
    this one. settling: the server on which settling began, and when, as `SERVER:MS`.
    """

    generation: int
    sequence: int
    count: int
    settled_by: str
    settling: str
    server: str
    held: int
    now_ms: int

    @property
    def stamp(self) -> Stamp:
        return self.generation, self.sequence

    @property
    def settled(self) -> bool:
        """The caller may still know of later changes."""
        return (
            self.generation > 0
            and not self.settling
            and self.settled_by == self.server
            and self.count == self.held
        )


class Step(Enum):
    FOLLOW = "follow"
    BEGIN = "begin"
    WAIT = "wait"
    SETTLE = "settle"


def decide(head: Head, known: Stamp, lease_ms: int) -> tuple[Step, int]:
    """(what a replica does, ms until settling is due). known: the latest state that it has seen."""
    if head.settled and head.stamp >= known:
        return Step.FOLLOW, 0
    server, _, since_ms = head.settling.partition(":")
    passed_ms = head.now_ms - int(since_ms or 0)
    if server != head.server or passed_ms < 0:  # below 0 the clock was set back
        return Step.BEGIN, lease_ms
    left_ms = lease_ms - passed_ms
    return (Step.WAIT, left_ms) if left_ms > 0 else (Step.SETTLE, 0)


class Records:
    """The newest record of each name that this process has heard of."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._removed = 0

    def get(self, name: str) -> Record | None:
        return self._records.get(name)

    def runs(self) -> dict[str, str]:
        """Name → id of the last run whose flags set it."""
        return {name: record.run for name, record in self._records.items() if record.run}

    def take(self, records: Mapping[str, Record]) -> dict[str, Version | None]:
        """Keeps those that are newer. Returns what the names point at now."""
        changes: dict[str, Version | None] = {}
        for name, record in records.items():
            before = self._records.get(name)
            if before is None or before.stamp < record.stamp:
                self._records[name] = record
                self._removed += record.version is None
                self._removed -= before is not None and before.version is None
                changes[name] = record.version
        return changes

    def replace(self, records: Mapping[str, Record]) -> dict[str, Version | None]:
        """Keeps exactly these. Returns what the names point at now, of those that changed."""
        before, self._records = self._records, dict(records)
        self._removed = sum(record.version is None for record in records.values())
        changes: dict[str, Version | None] = dict.fromkeys(before.keys() - records.keys())
        for name, record in records.items():
            if name not in before or before[name].stamp != record.stamp:
                changes[name] = record.version
        return changes

    def newer_than(self, theirs: Mapping[str, Record]) -> dict[str, Record]:
        """Those that `theirs` lacks, or has an older record of."""
        return {
            name: record
            for name, record in self._records.items()
            if name not in theirs or theirs[name].stamp < record.stamp
        }

    def forget_removals(self, most: int = REMOVALS_MAX) -> dict[str, Record]:
        """Forgets the oldest removals if there are more than twice `most`. Returns those."""
        if self._removed <= 2 * most:
            return {}
        removed = {n: record for n, record in self._records.items() if record.version is None}
        oldest = sorted(removed, key=lambda name: (removed[name].stamp, name))[:-most]
        self._removed -= len(oldest)
        return {name: self._records.pop(name) for name in oldest}


def decode_record(text: str) -> Record:
    """Raises ValueError, KeyError, TypeError or AttributeError if it is no record."""
    data = json.loads(text)
    generation, sequence = data["stamp"]
    version = data["version"]
    return Record(
        (int(generation), int(sequence)),
        None if version is None else decode_version(version),
        str(data.get("run", "")),
        text,
    )


def decode_version(record: Mapping[str, Any]) -> Version:
    """Ignores unknown fields: a newer process may have written them."""
    fields = {key: value for key, value in record.items() if key in VERSION_FIELDS}
    return Version(**{**fields, "invocation": tuple(fields.get("invocation", ()))})


def encode_version(version: Version) -> str:
    fields = {name: getattr(version, name) for name in VERSION_FIELDS}
    return json.dumps(fields, separators=(",", ":"), sort_keys=True)
