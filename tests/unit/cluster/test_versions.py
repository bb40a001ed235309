"""The book of names: what it accepts and refuses, and that a refusal changes nothing."""

import random

import pytest

from cluster.errors import BadRequest, ModelNotFound
from cluster.values import Version
from cluster.versions import NAME_LENGTH_MAX, Book


def version(name: str, digest: str = "d1", **fields: object) -> Version:
    return Version(
        **{"name": name, "digest": digest, "uri": "/a", "rank": 8, "parameters": 10} | fields
    )  # type: ignore[arg-type]


def test_a_name_points_at_the_version_it_was_added_with() -> None:
    book = Book("base")
    assert book.add(version("a")) is True
    assert book.get("a") == version("a")
    assert book.sequence == 1


@pytest.mark.parametrize(
    "name",
    [
        "",
        " a",
        "a ",
        "a\nb",
        "a\x00b",
        "a\x7f",
        "a\u202eb",
        "a\u2028b",
        "base",
        "Base",
        "\uff42\uff41\uff53\uff45",
        "b\u0430se",
        "\U0001d41b\U0001d41a\U0001d42c\U0001d41e",
        "b\u034fase",
        "base\ufe0f",
        "b\u3164ase",
        "p\u043eet",
        "\u03bcodel-a",
        "x" * (NAME_LENGTH_MAX + 1),
    ],
)
def test_a_bad_name_is_refused_naming_the_field_and_nothing_changes(name: str) -> None:
    book = Book("base", [version("a")], sequence=1)
    with pytest.raises(BadRequest) as caught:
        book.add(version(name))
    assert caught.value.field == "lora_name"
    assert caught.value.status == 400
    assert (book.by_name(), book.sequence) == ([version("a")], 1)


@pytest.mark.parametrize(
    "name", ["org/model", "a.b-c_d:1", "模型", "модель-2", "bases", "naïve", "x" * NAME_LENGTH_MAX]
)
def test_names_as_they_occur_are_taken(name: str) -> None:
    book = Book("base")
    assert book.add(version(name))


def test_a_taken_name_is_refused_unless_it_is_loaded_in_place() -> None:
    book = Book("base", [version("a", "d1")], sequence=1)
    with pytest.raises(BadRequest, match="'a' is already loaded") as caught:
        book.add(version("a", "d2"))
    assert caught.value.field == "lora_name"
    assert (book.get("a"), book.sequence) == (version("a", "d1"), 1)
    assert book.add(version("a", "d2"), load_inplace=True)
    assert (book.get("a"), book.sequence) == (version("a", "d2"), 2)


def test_adding_what_is_there_again_is_no_error() -> None:
    book = Book("base", [version("a")], sequence=1)
    assert book.add(version("a")) is False
    assert book.add(version("a", uri="/copy")) is True  # the same files, in another directory
    for other in (version("a", pinned=True), version("a", weight=2.0)):
        with pytest.raises(BadRequest, match="'a' is already loaded"):
            book.add(other)
    assert (book.by_name(), book.sequence) == ([version("a", uri="/copy")], 2)


def test_re_pointing_to_what_is_there_is_no_change() -> None:
    book = Book("base", [version("a")], sequence=1)
    assert book.add(version("a"), load_inplace=True) is False
    assert book.sequence == 1


def test_pinning_is_a_change() -> None:
    book = Book("base", [version("a")], sequence=1)
    assert book.add(version("a", pinned=True), load_inplace=True) is True


def test_removing_gives_the_version_back() -> None:
    book = Book("base", [version("a")], sequence=1)
    assert book.remove("a") == version("a")
    assert (book.get("a"), book.by_name(), book.sequence) == (None, [], 2)


def test_removing_an_unknown_name_changes_nothing() -> None:
    book = Book("base", [version("a")], sequence=1)
    with pytest.raises(ModelNotFound, match="'b'"):
        book.remove("b")
    assert (book.by_name(), book.sequence) == ([version("a")], 1)


def test_names_of_a_digest_share_its_pin_and_the_largest_weight() -> None:
    book = Book("base", [version("b", pinned=True), version("a", weight=2.0), version("c", "d2")])
    assert book.of_digest("d1") == version("a", weight=2.0, pinned=True)
    assert book.of_digest("d2") == version("c", "d2")
    book.remove("b")
    assert book.of_digest("d1") == version("a", weight=2.0)
    book.add(version("a", "d2"), load_inplace=True)
    assert book.of_digest("d1") is None
    assert book.of_digest("d2") == version("a", "d2")


def test_a_change_names_the_digests_that_the_engine_must_look_at() -> None:
    book = Book("base", [version("a"), version("b", "d2"), version("c", "d3")], sequence=1)
    assert book.change({"a": version("a", "d4"), "b": None}, 2) == {"d1", "d2", "d4"}
    assert book.change({"a": version("a", "d4"), "unknown": None}, 3) == set()
    assert (book.by_name(), book.sequence) == ([version("a", "d4"), version("c", "d3")], 3)


def test_the_base_models_name_never_hides_the_base_model() -> None:
    book = Book("base")
    book.change({"base": version("base"), "a": version("a")}, 3)
    assert book.by_name() == [version("a")]


def test_a_reader_keeps_what_it_read_while_the_book_changes() -> None:
    book = Book("base", [version("a")])
    versions = book.by_name()
    book.add(version("b"))
    assert versions == [version("a")]


def test_following_any_series_of_changes_gives_the_same_book(seed: int) -> None:
    draw = random.Random(seed)
    book, copy = Book("base"), Book("base")
    for _ in range(300):
        name = draw.choice("abcdef")
        if book.get(name) is not None and draw.random() < 0.4:
            book.remove(name)
        else:
            book.add(version(name, draw.choice(["d1", "d2", "d3"])), load_inplace=True)
        copy.change({name: book.get(name)}, book.sequence)
        assert (copy.by_name(), copy.sequence) == (book.by_name(), book.sequence)
