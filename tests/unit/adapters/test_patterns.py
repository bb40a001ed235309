"""Patterns mean what they mean to `re`, which PEFT uses, or are refused."""

import random
import re
import warnings

import pytest

from replica.adapters.patterns import PatternRefused, end_match, full_match

NAMES = ["a", "b", "ab", "a.b", "b.a", "a.b.b", "aab", "b.1.a", "a{,3}", ":", "model.a"]
ITEMS = [
    *("a", "b", ".", r"\.", r"\d", r"\w", r"\b", r"\B", "^", "$", "|", "(", ")", "(?:", "[", "]"),
    *("*", "+", "?", "{2}", "{1,}", "{,2}", "{,}", "{", "}", "[ab]", "[^a]", "[a-b]", "[]a]"),
    *("-", "&&", "[[:alpha:]]", "[:", "(?i)", "(?P<n>", "(?=", r"\A", r"\Z", r"\z", r"\1", r"\x61"),
    *("\\", r"\pL", r"\Qa", r"\C", "é", "++", "*?", "#", " ", r"\-"),
]


@pytest.mark.parametrize("number", range(4))
def test_random_patterns_match_as_re_does(number: int, seed: int) -> None:
    draw = random.Random(f"{seed} {number}")
    compared = 0
    for _ in range(3000):
        pattern = "".join(draw.choices(ITEMS, k=draw.randint(1, 6)))
        try:
            full, end = full_match(pattern), end_match(pattern)
        except PatternRefused:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a set that looks like a nested one
            try:
                theirs, ending = re.compile(pattern), re.compile(rf"(.*\.)?({pattern})$")
            except re.error:
                continue  # PEFT does not load it
        for name in NAMES:
            compared += 1
            assert full(name) == (theirs.fullmatch(name) is not None), (pattern, name)
            assert end(name) == (ending.match(name) is not None), (pattern, name)
    assert compared > 1000


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "a{,3}",
        "[[:alpha:]]",
        "(?=a)",
        r"(a)\1",
        r"\Z",
        r"\pL",
        "a++",
        "(?i)a",
        "\ud800",
        "a\\",
    ],
)
def test_what_is_read_differently_is_refused(pattern: str) -> None:
    with pytest.raises(PatternRefused):
        full_match(pattern)


def test_a_pattern_that_re_takes_minutes_for() -> None:
    assert not full_match("(.?)" * 60 + "Z")("model.layers.0.self_attn.q_proj")
    assert not full_match("((a*)*)*Z")("a" * 100)
