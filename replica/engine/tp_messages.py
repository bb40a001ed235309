"""What rank 0 of a tensor-parallel engine tells the other ranks, and what they answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from replica.adapters.arena import ArenaMessage
from replica.model.launch import Row
from replica.scheduling.adapter import Load, PageMove
from replica.scheduling.request import Sampling

# Only rank 0 draws: to the others it is enough to know that logits are wanted.
_WANTED = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """A `Row` without what only a draw needs. pages: those after the first `kept` that `key` had in
    the last step.
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
    """Begin a load; from_host: host memory has the image, else keep: it is to keep it."""

    load: Load
    from_host: bool
    keep: bool


@dataclass(frozen=True, slots=True)
class Drop:
    """Host memory need not keep the image any more."""

    digest: str


@dataclass(frozen=True, slots=True)
class MovePages:
    moves: tuple[PageMove, ...]


Command = Step | LoadAdapter | Drop | ArenaMessage | MovePages


@dataclass(frozen=True, slots=True)
class Hello:
    """The process runs; the others may count on it to join them."""


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
    """The last word of a process that cannot go on."""

    reason: str


Answer = Hello | Ready | AdapterLoaded | WorkerFailed


class PageTables:
    """The pages of the last step's rows, as both ends know them: a step adds few to them.

    A row is known by its seed, which only says where to look: what is found must be the same.
    """

    def __init__(self) -> None:
        self._tables: dict[int, list[int]] = {}

    def pack(self, rows: Sequence[Row]) -> Step:
        packed, tables = [], {}
        for row in rows:
            pages = self._tables.get(row.seed, [])
            kept = len(pages)
            # Mostly they are the same, and to compare is much faster than to copy.
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
