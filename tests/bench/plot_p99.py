"""Draws `results/p99.svg`: P99 TTFT as published, as simulated and as measured on an H200.

    python lorafleet.py simulate upstream --json > tests/bench/results/simulate_upstream.json
    python -m tests.bench.plot_p99

Published figures come from `replica/simulation/published.py`, measured ones from
`results/upstream_h200.json`: the engine in real time, by `tests/bench/gpu.sh`. The axis is
logarithmic, so figures are dots: a bar would need a zero.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from replica.simulation.published import published

RESULTS = Path(__file__).parent / "results"
FIGURE = "ttft_p99_ms"
GROUPS = {
    "17913": "SGLang #17913: 6 adapters on 3 places (published and simulated: A100)",
    "15512-large": "SGLang #15512: 16 adapters of 1.3 GB on 8 places (H200)",
    "15512-small": "SGLang #15512: 16 adapters of 42 to 336 MB on 8 places (H200)",
}
TICKS_MS = {100: "0.1 s", 1_000: "1 s", 10_000: "10 s"}
LEAST_MS, MOST_MS = 30, 100_000

WIDTH, LEFT, RIGHT = 760, 262, 736
TOP, ROW, GAP = 56, 22, 34

STYLE = """
  .back { fill: #ffffff; stroke: #d0d7de }
  .line { stroke: #d0d7de }
  .axis { fill: #59636e; font-size: 12px }
  .group { font-weight: 600 }
  .published { fill: #818b98 }
  .simulated { fill: #ffffff; stroke: #0969da; stroke-width: 2 }
  .measured { fill: #0969da }
  text { fill: #1f2328; font: 13px system-ui, sans-serif }
  @media (prefers-color-scheme: dark) {
    .back { fill: #0d1117; stroke: #3d444d }
    .line { stroke: #3d444d }
    .axis { fill: #9198a1 }
    .simulated { fill: #0d1117; stroke: #4493f8 }
    .measured { fill: #4493f8 }
    text { fill: #f0f6fc }
  }
"""


def rows(
    table: str, simulated: Mapping[str, Any], measured: Mapping[str, Any]
) -> Iterator[tuple[str, str, float]]:
    """(label, kind of figure, milliseconds); what nobody measured is left out."""
    for policy in ("before", "after"):
        yield f"SGLang {policy}, published", "published", published(table, policy, "lora")[FIGURE]
    yield "lorafleet, simulated", "simulated", simulated[table]["ours"][FIGURE]
    yield "… with one memory, simulated", "simulated", simulated[table]["shared"][FIGURE]
    for policy, label in (("ours", "lorafleet"), ("shared", "… with one memory")):
        if policy in measured.get(table, {}):
            yield f"{label}, measured on an H200", "measured", measured[table][policy][FIGURE]


def draw(simulated: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """An SVG document that follows the reader's light or dark scheme."""
    body: list[str] = []
    y = TOP
    for table, title in GROUPS.items():
        body.append(f'<text class="group" x="24" y="{y}">{title}</text>')
        for label, kind, value in rows(table, simulated, measured):
            y += ROW
            x = _x(value)
            body.append(f'<text x="{LEFT - 14}" y="{y + 4}" text-anchor="end">{label}</text>')
            body.append(f'<line class="line" x1="{LEFT}" x2="{x:.1f}" y1="{y}" y2="{y}"/>')
            body.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y}" r="5"/>')
            body.append(f'<text x="{x + 11:.1f}" y="{y + 4}">{_seconds(value)}</text>')
        y += GAP
    bottom = y - GAP + ROW // 2 + 4
    grid = []
    for tick, label in TICKS_MS.items():
        x = _x(tick)
        grid.append(
            f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP + 8}" y2="{bottom}" '
            'stroke-dasharray="2 4"/>'
        )
        grid.append(
            f'<text class="axis" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>'
        )
    height = bottom + 34
    heading = "P99 time to first token when more adapters are asked for than fit (logarithmic)"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img">',
            f"<title>{heading}</title>",
            f"<style>{STYLE}</style>",
            '<rect class="back" x="0.5" y="0.5" rx="8" '
            f'width="{WIDTH - 1}" height="{height - 1}"/>',
            f'<text class="group" x="24" y="28">{heading}</text>',
            *grid,
            *body,
            "</svg>\n",
        ]
    )


def _seconds(value_ms: float) -> str:
    return f"{value_ms / 1e3:.{1 if value_ms >= 10_000 else 2}f} s"


def _x(value_ms: float) -> float:
    share = math.log(value_ms / LEAST_MS) / math.log(MOST_MS / LEAST_MS)
    return LEFT + share * (RIGHT - LEFT)


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def main() -> None:
    drawing = draw(read("simulate_upstream.json"), read("upstream_h200.json"))
    (RESULTS / "p99.svg").write_text(drawing)


if __name__ == "__main__":
    main()
