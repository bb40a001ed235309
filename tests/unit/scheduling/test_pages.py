"""KV pages: none is lost, and a cached prefix is matched only by prompts that begin with it."""

import pytest

from replica.scheduling.pages import Pages, Root

A, B = tuple(range(16)), tuple(range(16, 32))


def filled(pages: Pages, root: Root, *blocks: tuple[int, ...]) -> list[int]:
    """Take a page for each block of tokens and publish it."""
    taken = pages.take(len(blocks))
    assert taken is not None
    link: Root | int = root
    for page, tokens in zip(taken, blocks, strict=True):
        link = pages.publish(link, tokens, page)
    return taken


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


@pytest.mark.parametrize("wrong", [[0], [2, 2]])
def test_giving_back_what_is_not_held_raises_and_changes_nothing(wrong: list[int]) -> None:
    pages = Pages(3, 16)
    held = pages.take(2)
    assert held == [2, 1]
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


def test_a_prefix_is_found_while_it_is_held_and_after() -> None:
    pages = Pages(4, 16)
    held = filled(pages, None, A, B)
    found = pages.match(None, A + B)
    assert list(found.pages) == held and pages.free == 2
    pages.check([held, found.pages])
    pages.give_back(held)
    assert pages.free == 2, "the match still holds them"
    pages.give_back(found.pages)
    assert pages.free == 4
    assert list(pages.match(None, A + B).pages) == held
    pages.check([held])


def test_only_whole_pages_from_the_beginning_are_found() -> None:
    pages = Pages(4, 16)
    held = filled(pages, None, A, B)
    assert list(pages.match(None, (A + B)[:31]).pages) == held[:1]
    assert pages.match(None, A[:15]).pages == ()
    assert pages.match(None, B + A).pages == ()
    assert pages.match(None, (99, *A[1:])).pages == ()


def test_a_prefix_is_never_found_across_versions() -> None:
    pages = Pages(8, 16)
    filled(pages, "one", A, B)
    assert pages.match("two", A + B).pages == ()
    assert pages.match(None, A + B).pages == ()
    assert len(pages.match("one", A + B).pages) == 2


def test_the_same_tokens_behind_other_tokens_are_another_prefix() -> None:
    pages = Pages(8, 16)
    first = filled(pages, None, A, B)
    second = filled(pages, None, B, B)
    assert list(pages.match(None, A + B).pages) == first
    assert list(pages.match(None, B + B).pages) == second


def test_a_prefix_computed_twice_at_once_is_cached_once() -> None:
    pages = Pages(4, 16)
    first, second = filled(pages, None, A), filled(pages, None, A)
    (own,) = pages.take(1) or []
    link = pages.publish(pages.match(None, A).link, B, own)
    assert link is not None
    pages.give_back(first)  # held by `match` above
    assert list(pages.match(None, A + B).pages) == [*first, own]
    pages.give_back([*first, own])
    pages.check([first, second, [own]])
    pages.give_back(second)
    assert pages.free == 2


def test_the_least_recently_held_is_forgotten_first_and_the_end_before_the_beginning() -> None:
    pages = Pages(4, 16)
    old, young = filled(pages, "old", A, B), filled(pages, "young", A, B)
    pages.give_back(old)
    pages.give_back(young)
    held = [pages.take(1)]
    assert len(pages.match("young", A + B).pages) == 2
    pages.give_back(young)
    found = pages.match("old", A + B).pages
    assert list(found) == old[:1], "its end was forgotten first"
    pages.give_back(found)  # now it is the most recent
    held.append(pages.take(1))
    assert len(pages.match("old", A).pages) == 1
    assert len(pages.match("young", A + B).pages) == 1


def test_free_pages_are_taken_before_a_prefix_is_forgotten() -> None:
    pages = Pages(3, 16)
    held = filled(pages, None, A)
    pages.give_back(held)
    pages.take(2)
    assert list(pages.match(None, A).pages) == held


def test_a_reused_page_no_longer_matches_its_old_tokens() -> None:
    pages = Pages(1, 16)
    held = filled(pages, None, A)
    pages.give_back(held)
    again = filled(pages, None, B)
    assert again == held
    assert pages.match(None, A).pages == ()
    assert list(pages.match(None, B).pages) == held


def test_a_prefix_is_found_only_up_to_its_forgotten_end() -> None:
    pages = Pages(2, 16)
    first, second = filled(pages, None, A, B)
    pages.give_back([second])  # now only `first` is held
    pages.give_back([first])
    pages.take(1)  # forgets the end
    assert pages.match(None, A + B).pages == (first,)


def test_with_the_cache_off_nothing_is_found() -> None:
    pages = Pages(4, 16, cache=False)
    filled(pages, None, A)
    assert pages.match(None, A).pages == ()


def test_a_page_that_is_not_held_cannot_be_published() -> None:
    pages = Pages(4, 16)
    with pytest.raises(AssertionError):
        pages.publish(None, A, 0)
    (page,) = pages.take(1) or []
    with pytest.raises(AssertionError):
        pages.publish(None, A[:3], page)
    pages.check([[page]])


def test_an_earlier_match_is_the_longest_until_a_page_is_forgotten_or_the_next_is_published() -> (
    None
):
    pages = Pages(3, 16)
    filled(pages, None, A)
    prefix = pages.match(None, A + B)
    assert pages.still_longest(prefix, B)
    (page,) = pages.take(1) or []
    pages.publish(prefix.link, B, page)
    assert not pages.still_longest(prefix, B), "the next page is cached now"
    assert pages.still_longest(prefix, ()), "but may not be matched"
    pages = Pages(1, 16)
    pages.give_back(filled(pages, None, A))
    prefix = pages.match(None, A + B)
    pages.give_back(prefix.pages)
    assert pages.still_longest(prefix, B) and pages.unheld(prefix) == 1
    pages.give_back(filled(pages, None, A))
    assert not pages.still_longest(prefix, B), "the same tokens, in a page filled later"


def test_touched_pages_are_forgotten_last() -> None:
    pages = Pages(2, 16)
    for tokens in (A, B):
        pages.give_back(filled(pages, None, tokens))
    first = pages.match(None, A)
    pages.give_back(first.pages)
    second = pages.match(None, B)
    pages.give_back(second.pages)
    pages.touch(first)
    pages.take(1)
    assert pages.may_match(None, A) and not pages.may_match(None, B)
