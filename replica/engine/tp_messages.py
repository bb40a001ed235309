"""Commands from rank 0 of a tensor-parallel engine to its workers, and their answers."""

from collections.abc import Sequence
from dataclasses import dataclass

from replica.adapters.arena import ArenaMessage
from replica.model.launch import Row
from replica.scheduling.adapter import Load, PageMove
from replica.scheduling.request import Sampling

# Only rank 0 samples. Workers only need to know that a row's logits are computed.
_WANTED = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """A `Row` without what only sampling needs. wanted: the row samples. key: its seed. pages: the
    ones after the first `kept` pages that the row with this key had in the last step.
    """

    tokens: Sequence[int]
    position: int
    slot: int
    carry: int | None
    wanted: bool
    key: int
    kept: int
    pages: list[int]


@dataclass(frozen=True, slots=True)
class Step:
    rows: tuple[PackedRow, ...]


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Starts a load. from_host: copy the image from host memory. keep: keep the image there after
    the load.
    """

    load: Load
    from_host: bool
    keep: bool


@dataclass(frozen=True, slots=True)
class Drop:
    """Drops the image from host memory."""

    digest: str


@dataclass(frozen=True, slots=True)
class MovePages:
    moves: tuple[PageMove, ...]


Command = Step | LoadAdapter | Drop | ArenaMessage | MovePages


@dataclass(frozen=True, slots=True)
class Hello:
    """The worker's process runs and will join the process group."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded."""


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    """A load has ended."""

    digest: str
    error: str | None


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """The last message of a worker that cannot continue."""

    reason: str


Answer = Hello | Ready | AdapterLoaded | WorkerFailed


class PageTables:
    """The pages of the last step's rows. Both ends keep them, so that a step sends only new pages.

    Rows are matched by seed. Seeds may collide: `pack` compares pages before it omits any.
    """

    def __init__(self) -> None:
        self._tables: dict[int, list[int]] = {}

    def pack(self, rows: Sequence[Row]) -> Step:
        packed, tables = [], {}
        for row in rows:
            pages = self._tables.get(row.seed, [])
            kept = len(pages)
            # Most rows have the same pages as before, and comparing is much faster than copying.
            if row.pages != pages:
                if row.pages[:kept] != pages:
                    kept = 0
                pages = list(row.pages)
            packed.append(
                PackedRow(
                    row.tokens,
                    row.position,
                    row.slot,
                    row.carry,
                    row.sampling is not None,
                    row.seed,
                    kept,
                    pages[kept:],
                )
            )
            tables[row.seed] = pages
        self._tables = tables
        return Step(tuple(packed))

    def unpack(self, step: Step) -> list[Row]:
        rows, tables = [], {}
        for row in step.rows:
            pages = self._tables.get(row.key, [])
            if row.pages:
                pages = pages[: row.kept] + row.pages
            rows.append(
                Row(
                    tokens=row.tokens,
                    position=row.position,
                    pages=pages,
                    slot=row.slot,
                    sampling=_WANTED if row.wanted else None,
                    seed=0,
                    generated=0,
                    carry=row.carry,
                )
            )
            tables[row.key] = pages
        self._tables = tables
        return rows
