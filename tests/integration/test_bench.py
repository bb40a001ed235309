"""`tests.bench.upstream` with a few requests of a table."""

import dataclasses
import io

import pytest

from replica.simulation.upstream import TABLES
from tests.bench import upstream as bench

STREAMS = tuple(
    dataclasses.replace(s, requests=5, rate=40.0, output_tokens_max=64)
    for s in TABLES["14795"].streams
)
FEW = dataclasses.replace(TABLES["14795"], streams=STREAMS, places=2)


def test_all_policies_give_the_same_tokens_and_figures_for_each_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TABLES, "14795", FEW)
    told = io.StringIO()
    (result,) = bench.upstream(["14795"], 1, 1, lambda line: print(line, file=told))
    assert result.same_tokens
    assert list(result.outcomes) == ["before", "after", "ours", bench.FAST]
    for outcome in result.outcomes.values():
        assert outcome.figures.keys() == outcome.simulated.keys() == {"base", "lora"}
        assert outcome.loads > 0
    printed = list(bench.lines(result))
    assert printed[-1] == "  tokens of all policies: the same"
    assert sum(line.startswith(("  base:", "  lora:")) for line in printed) >= 2
    assert told.getvalue().count("\n") == 4


def test_other_tokens_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ours` runs requests for other adapters than the other policies do."""
    monkeypatch.setitem(TABLES, "14795", FEW)
    run = bench._Server.run

    def other(server: bench._Server, seed: int) -> tuple[bench.Streams, list[list[int]]]:
        streams, tokens = run(server, seed)
        if server._config.park:
            tokens[-1] = [*tokens[-1][:-1], tokens[-1][-1] + 1]
        return streams, tokens

    monkeypatch.setattr(bench._Server, "run", other)
    (result,) = bench.upstream(["14795"], 1, 1, lambda line: None)
    assert not result.same_tokens
    assert list(bench.lines(result))[-1] == "  tokens of all policies: DIFFERENT"


def test_base_beside_adapters_is_measured_at_both_paces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLES, "14795", FEW)
    paced, unpaced = bench.beside(1, 1, lambda line: None)
    assert paced.paced and not unpaced.paced
    for result in (paced, unpaced):
        assert list(result.outcomes) == ["ours", bench.ALL_BASE]
        assert result.outcomes[bench.ALL_BASE].loads == 0 < result.outcomes["ours"].loads
        assert "base TTFT beside adapters" in list(bench.lines(result))[-1]
