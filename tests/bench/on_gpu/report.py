"""Findings as they come: a line each on the screen and in a file, the short table at the end."""

import json
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Columns are padded up to it: the whole table is to stay within what a terminal's log keeps.
_WIDTH = 56
_COLUMNS = ("", "what", "found", "beside", "goal")


@dataclass(frozen=True, slots=True)
class Finding:
    """most: the goal, in the value's unit; None: nothing is claimed. beside: what to hold it up
    against. short: it goes into the table that is printed last.
    """

    section: str
    what: str
    value: float
    unit: str = ""
    most: float | None = None
    beside: str = ""
    short: bool = True
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        # NaN holds nothing.
        return None if self.most is None else self.value <= self.most

    def cells(self) -> tuple[str, ...]:
        goal = ""
        if self.most is not None:
            goal = f"{'ok' if self.holds else 'MISSED'} ≤ {number(self.most)}{self.unit}"
        return self.section, self.what, f"{number(self.value)}{self.unit}", self.beside, goal


class Report:
    """out: a directory for `results.jsonl` and `table.md`; None writes neither. claims: sections
    whose goals count. keep: write what is found.
    """

    def __init__(
        self,
        out: Path | None,
        tell: Callable[[str], None] = print,
        claims: Collection[str] | None = None,
        keep: bool = True,
    ) -> None:
        self.findings: list[Finding] = []
        self.failures: list[tuple[str, str]] = []
        self.traces: list[str] = []
        self.out = out
        self._keep = keep and out is not None
        self._tell = tell
        self._claims = claims
        self._start_s = time.monotonic()
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        if self._keep and out is not None:
            (out / "results.jsonl").write_text("")

    def add(
        self,
        section: str,
        what: str,
        value: float,
        unit: str = "",
        *,
        most: float | None = None,
        beside: str = "",
        short: bool = True,
        **data: Any,
    ) -> Finding:
        """data: goes into the file alone."""
        if self._claims is not None and section not in self._claims:
            most = None
        finding = Finding(section, what, float(value), unit, most, beside, short, data)
        self.findings.append(finding)
        self._line(
            section=section,
            what=what,
            value=finding.value,
            unit=unit,
            most=most,
            holds=finding.holds,
            beside=beside,
            data=data,
        )
        self.tell("  ".join(cell for cell in finding.cells() if cell))
        return finding

    def failed(self, section: str, what: str, error: BaseException) -> None:
        """With its traceback, on the screen and in the file."""
        trace = "".join(traceback.format_exception(error))
        first = (str(error).strip().splitlines() or [""])[0]
        self.failures.append((section, f"{what}: {type(error).__name__}: {first[:160]}"))
        self.traces.append(trace)
        self._line(section=section, what=what, error=trace)
        self.tell(f"{section} {what} FAILED\n{trace}")

    def skipped(self, section: str, what: str, why: str = "the section's time was used up") -> None:
        self.failures.append((section, f"{what}: not measured, {why}"))
        self._line(section=section, what=what, error=f"not measured, {why}")

    def tell(self, text: str) -> None:
        self._tell(f"[{time.monotonic() - self._start_s:6.1f} s] {text}")

    def finish(self, heading: Sequence[str]) -> None:
        """Prints the short table, and writes the whole one."""
        if self.out is not None:
            whole = [*heading, "", *self._table(self.findings)]
            (self.out / "table.md").write_text("\n".join(whole) + "\n")
        print()
        print("\n".join([*heading, "", *self._table([f for f in self.findings if f.short])]))

    def _table(self, findings: Sequence[Finding]) -> Iterator[str]:
        rows = [_COLUMNS, *(finding.cells() for finding in findings)]
        widths = [min(max(map(len, column)), _WIDTH) for column in zip(*rows, strict=True)]
        for index, row in enumerate(rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            yield f"| {' | '.join(cells)} |"
            if index == 0:
                yield f"|{'|'.join('-' * (width + 2) for width in widths)}|"
        missed = sum(finding.holds is False for finding in findings)
        claimed = sum(finding.holds is not None for finding in findings)
        yield ""
        yield f"{claimed - missed} of {claimed} goals held"
        for section, what in self.failures:
            yield f"FAILED or left out: {section} {what}"

    def _line(self, **fields: Any) -> None:
        if self._keep and self.out is not None:
            with (self.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(fields) + "\n")


def number(value: float) -> str:
    """Three digits that count, without an exponent where one can do without it."""
    if value != value:
        return "nan"
    if value == 0 or 0.01 <= abs(value) < 10:
        return f"{value:.3g}" if value != int(value) else str(int(value))
    if abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"
