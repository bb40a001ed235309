"""Commands from rank 0 of a tensor-parallel engine to its workers, and their answers."""

from collections.abc import Sequence
from dataclasses import dataclass

from replica.adapters.arena import ArenaMessage
from replica.model.launch import Asked, Row
from replica.scheduling.adapter import Load, PageMove
from replica.scheduling.pages import PageCopy
from replica.scheduling.request import Sampling

# Only rank 0 samples. Workers only need to know that a row's logits are computed.
_WANTED = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """A `Row` without what only sampling needs. wanted: the row samples. key: its seed. pages: the
    ones after the first `kept` pages that the row with this key had in the last step. following:
    how many logits of its prompt are computed, which all ranks do together.
    """

    tokens: Sequence[int]
    position: int
    slot: int
    base_until: int
    carry: int | None
    wanted: bool
    key: int
    kept: int
    pages: list[int]
    following: int = 0


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


@dataclass(frozen=True, slots=True)
class CopyPages:
    """Begins to copy KV pages to host memory or back."""

    copy: PageCopy


@dataclass(frozen=True, slots=True)
class FinishPageCopy:
    """The copy of this number has ended on rank 0. Later steps use its pages."""

    number: int


Command = Step | LoadAdapter | Drop | ArenaMessage | MovePages | CopyPages | FinishPageCopy


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
                    row.base_until,
                    row.carry,
                    row.sampling is not None,
                    row.seed,
                    kept,
                    pages[kept:],
                    0 if row.asked is None else len(row.asked.following),
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
                    base_until=row.base_until,
                    asked=Asked([0] * row.following) if row.following else None,
                )
            )
            tables[row.key] = pages
        self._tables = tables
        return rows
