"""Recorded arrivals: two formats told apart by their columns, and errors that name the line."""

import json
import re
import time
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from replica.simulation.traces import Recorded, read_trace

TRACES = Path(__file__).parents[2] / "traces"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def azure(*rows: str, header: str = HEADER) -> list[Recorded]:
    return read_trace([f"{line}\n" for line in (header, *rows)], "t.csv")


def mooncake(*rows: object) -> list[Recorded]:
    return read_trace([json.dumps(row) + "\n" for row in rows], "t.jsonl")


def request(timestamp: object = 0, **other: object) -> dict[str, object]:
    return {"timestamp": timestamp, "input_length": 600, "output_length": 20, **other}


def test_azures_traces_are_recognized_by_their_columns() -> None:
    first, second = azure(
        "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109"
    )
    assert (first.prompt_tokens, first.output_tokens, first.blocks) == (374, 44, ())
    assert (second.prompt_tokens, second.output_tokens) == (396, 109)
    assert second.at_s - first.at_s == pytest.approx(4.314579, abs=1e-6)


def test_columns_are_found_by_name_not_by_order() -> None:
    header = "GeneratedTokens,Model,TIMESTAMP,ContextTokens"
    (found,) = azure("44,x,2023-11-16 18:15:46,374", header=header)
    assert (found.prompt_tokens, found.output_tokens) == (374, 44)


def test_times_may_have_a_zone() -> None:
    first, second = azure("2024-05-10 00:00:00.5+00:00,1,1", "2024-05-10 02:00:01+02:00,1,1")
    assert second.at_s - first.at_s == pytest.approx(0.5)


def test_the_time_zone_of_the_machine_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Berlin put its clocks back at three that night."""
    rows = ("2023-10-29 01:59:00,1,1", "2023-10-29 03:01:00,1,1")
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        first, second = azure(*rows)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert second.at_s - first.at_s == 3720.0


def test_mooncakes_traces_are_recognized_by_their_columns() -> None:
    first, second = mooncake(
        request(1500), request(3000, input_length=1200, output_length=7, hash_ids=[0, 46, 47])
    )
    assert first == Recorded(1.5, 600, 20)
    assert second == Recorded(3.0, 1200, 7, (0, 46, 47))


def test_requests_come_in_order_of_time() -> None:
    assert [r.at_s for r in mooncake(request(3000), request(1000), request(2000))] == [1, 2, 3]


def test_requests_without_prompt_or_output_are_left_out() -> None:
    rows = ("2023-11-16 18:15:46,374,0", "2023-11-16 18:15:47,0,5", "2023-11-16 18:15:48,10,1")
    assert [(r.prompt_tokens, r.output_tokens) for r in azure(*rows)] == [(10, 1)]
    assert mooncake(request(output_length=0), request(5)) == [Recorded(0.005, 600, 20)]


def test_empty_lines_are_skipped_but_counted() -> None:
    assert len(read_trace(["\n", HEADER, "", "2023-11-16 18:15:46,374,44\r\n"], "t.csv")) == 1
    with pytest.raises(ConfigError, match="line 4"):
        read_trace(["\n", HEADER, "", "2023-11-16 18:15:46,many,44"], "t.csv")


@pytest.mark.parametrize("name", ["azure_conv.csv", "azure_code.csv"])
def test_the_slices_in_this_repository_are_whole(name: str) -> None:
    found = read_trace((TRACES / name).read_text().splitlines(), name)
    assert len(found) == 100
    assert all(r.prompt_tokens > 0 and r.output_tokens > 0 for r in found)
    assert 5 < found[-1].at_s - found[0].at_s < 60


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "t: no requests"),
        (["", "\n"], "t: no requests"),
        ([HEADER], "t: no requests"),
        (["a,b,c", "1,2,3"], "t, line 1: no column TIMESTAMP in 'a,b,c'"),
        (["TIMESTAMP,ContextTokens"], "t, line 1: no column GeneratedTokens"),
        (["[", "{}"], "t, line 1: no column TIMESTAMP in '['"),
        ([HEADER, "2023-11-16 18:15:46,3"], "t, line 2: 2 columns, but the first line has 3"),
        ([HEADER, "2023-11-16 18:15:46,3,4,5"], "t, line 2: 4 columns"),
        (
            [HEADER, "2023-11-16 18:15:46,3,4", "noon,3,4"],
            "t, line 3: TIMESTAMP: 'noon' is not a date and time",
        ),
        ([HEADER, "2023-11-16 18:15:46,,4"], "t, line 2: ContextTokens: ''"),
        (
            [HEADER, "2023-11-16 18:15:46,3,4.5"],
            "t, line 2: GeneratedTokens: '4.5' is not a whole number",
        ),
        (['{"timestamp": 1'], "t, line 1: not JSON: "),
        ([json.dumps(request()), "12"], "t, line 2: '12' is not a JSON object"),
        (['{"timestamp": 1}'], "t, line 1: no column input_length"),
        ([json.dumps(request("now"))], "t, line 1: timestamp: 'now'"),
        ([json.dumps(request(float("nan")))], "t, line 1: timestamp: nan"),
        ([json.dumps(request(input_length=None))], "t, line 1: input_length: None"),
        ([json.dumps(request(output_length=2.5))], "t, line 1: output_length: 2.5"),
        ([json.dumps(request(hash_ids=7))], "t, line 1: hash_ids: 7 is not a list of whole"),
        ([json.dumps(request(hash_ids=["a"]))], "t, line 1: hash_ids: ['a']"),
    ],
)
def test_an_error_names_its_file_and_line(lines: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(words)) as raised:
        read_trace(lines, "t")
    assert raised.value.field == "arrivals.trace"
