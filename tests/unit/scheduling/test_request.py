"""A request's life is a table: illegal transitions raise and change nothing."""

import pytest

from replica.scheduling.request import TRANSITIONS, Phase, Request, Sampling


def request(phase: Phase = Phase.WAITING, output: tuple[int, ...] = ()) -> Request:
    return Request("r", (1, 2, 3), Sampling(max_tokens=5), None, None, 0, 0.0, phase, list(output))


@pytest.mark.parametrize("old", Phase)
@pytest.mark.parametrize("new", Phase)
def test_only_transitions_of_the_table_are_legal(old: Phase, new: Phase) -> None:
    subject = request(old)
    if new in TRANSITIONS[old]:
        subject.become(new)
        assert subject.phase is new
    else:
        with pytest.raises(AssertionError):
            subject.become(new)
        assert subject.phase is old


def test_the_end_phases_are_final() -> None:
    ends = {phase for phase, following in TRANSITIONS.items() if not following}
    assert ends == {Phase.FINISHED, Phase.CANCELLED, Phase.FAILED}


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 2, [1, 2]), (0, 3, [1, 2, 3]), (3, 5, [7, 8]), (2, 4, [3, 7]), (1, 1, [])],
)
def test_a_slice_spans_prompt_and_output(start: int, end: int, expected: list[int]) -> None:
    assert list(request(output=(7, 8)).slice(start, end)) == expected


def test_tokens_and_remaining() -> None:
    subject = request(output=(7, 8))
    assert (subject.tokens, subject.remaining) == (5, 3)
