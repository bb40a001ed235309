"""KV pages are held by one request at a time and none is lost."""

import pytest

from replica.pages import Pages


def test_pages_are_rounded_up() -> None:
    pages = Pages(8, page_tokens=16)
    assert [pages.needed(n) for n in (1, 16, 17, 32)] == [1, 1, 2, 2]


def test_taking_too_many_changes_nothing() -> None:
    pages = Pages(4, 16)
    held = pages.take(3)
    assert held is not None
    assert pages.take(2) is None
    assert pages.free == 1
    pages.check([held])


def test_pages_given_back_can_be_taken_again() -> None:
    pages = Pages(2, 16)
    first = pages.take(2)
    assert first is not None and sorted(first) == [0, 1]
    pages.give_back(first)
    assert sorted(pages.take(2) or []) == [0, 1]


@pytest.mark.parametrize("wrong", [[2], [0, 0]])
def test_giving_back_what_is_not_held_raises_and_changes_nothing(wrong: list[int]) -> None:
    pages = Pages(3, 16)
    held = pages.take(2)
    assert held == [0, 1]
    with pytest.raises(AssertionError):
        pages.give_back(wrong)
    pages.check([held])


def test_check_finds_a_leak_and_a_second_holder() -> None:
    pages = Pages(4, 16)
    a, b = pages.take(1), pages.take(1)
    assert a and b
    pages.check([a, b])
    with pytest.raises(AssertionError):
        pages.check([a])
    with pytest.raises(AssertionError):
        pages.check([a, b, b])
