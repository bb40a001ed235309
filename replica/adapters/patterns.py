"""Regular expressions of adapter configurations, matched in linear time.

PEFT matches them with `re`, which may take minutes for an expression of 60 characters. RE2 takes
time in proportion to the text. What the two read differently is refused, so what is accepted means
the same to both.
"""

from collections.abc import Callable
from typing import Any

CHARACTERS_MAX = 4096
# Of the automaton; a larger one is refused.
_MEMORY_BYTES = 8 * 2**20
_ESCAPED_LETTERS = frozenset("dDsSwWbBA")
# Groups with names or flags, sets of POSIX, and a repetition that RE2 takes literally.
_READ_DIFFERENTLY = ("(?", "[:", "{,")


class PatternRefused(Exception):
    """Not a regular expression, or one that RE2 does not match as `re` does."""


def full_match(pattern: str) -> Callable[[str], bool]:
    """`re.fullmatch(pattern, name)`, for names in ASCII. Raises PatternRefused."""
    compiled = _compiled(pattern, pattern)
    return lambda name: compiled.fullmatch(name) is not None


def end_match(pattern: str) -> Callable[[str], bool]:
    r"""`re.match(rf"(.*\.)?({pattern})$", name)`, for names in ASCII. Raises PatternRefused."""
    compiled = _compiled(pattern, rf"(.*\.)?({pattern})$")
    return lambda name: compiled.match(name) is not None


def _compiled(pattern: str, whole: str) -> Any:
    import re2  # few adapters have patterns, and the benchmarks for a GPU run without it

    if len(pattern) > CHARACTERS_MAX:
        raise PatternRefused(f"it has {len(pattern)} characters, the maximum is {CHARACTERS_MAX}")
    _check_common(pattern)
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MEMORY_BYTES
    try:
        return re2.compile(whole, options)
    except re2.error as error:
        raise PatternRefused(error.args[0].decode(errors="replace")) from error
    except UnicodeEncodeError as error:
        raise PatternRefused(str(error)) from error


def _check_common(pattern: str) -> None:
    at = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            letter = pattern[at + 1 : at + 2]
            if letter.isalnum() and letter not in _ESCAPED_LETTERS:
                raise PatternRefused(f"\\{letter} is not supported")
            at += 2
            continue
        for item in _READ_DIFFERENTLY:
            if pattern.startswith(item, at) and not pattern.startswith("(?:", at):
                raise PatternRefused(f"{pattern[at : at + 3]} is not supported")
        at += 1
