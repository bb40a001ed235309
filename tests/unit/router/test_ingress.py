"""Finding the model's name in the prefix of a request's body that HAProxy forwards."""

import json
import time

import pytest

from router.ingress import find_model, prompt_tokens


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model": "fr", "prompt": "x"}', "fr"),
        (b'{"prompt":"x","model":"fr"}', "fr"),
        (b'\n {\t"model"\n:\r "fr" , "n": 1}', "fr"),
        (b'{"model": "org/fr-1.5"}', "org/fr-1.5"),
        (b'{"model": ""}', ""),
        ('{"model": "français"}'.encode(), "français"),
        (rb'{"model": "fran\u00e7ais \"q\" \\"}', 'français "q" \\'),
        (rb'{"mode\u006c": "fr"}', "fr"),
        # Other keys named `model`: in a message, a nested object, a list, a string.
        (b'{"messages": [{"role": "user", "content": "x", "model": "no"}]}', None),
        (b'{"messages": [{"model": "no"}], "model": "fr"}', "fr"),
        (b'{"options": {"model": "no"}, "model": "fr"}', "fr"),
        (rb'{"prompt": "say \"model\": \"no\"", "model": "fr"}', "fr"),
        (rb'{"prompt": "} ] \\", "model": "fr"}', "fr"),
        (rb'{"prompt": "\\\" , \"model\":\"no\" \\\\", "model": "fr"}', "fr"),
        (b'{"prompt": ["model", "no"], "model": "fr"}', "fr"),
        (b'{"stop": "model", "model": "fr"}', "fr"),
        (b'{"a": "model", "b": ": ", "model": "fr"}', "fr"),
        (b'["model", "no"]', None),
        (b'[{"model": "no"}]', None),
        # The last of several keys counts, as in the parser of the whole body.
        (b'{"model": "first", "model": "last"}', "last"),
        # Values that are no valid name.
        (b'{"model": 5}', None),
        (b'{"model": null}', None),
        (b'{"model": {"model": "no"}}', None),
        (b'{"model": ["no"]}', None),
        (rb'{"model": "\ud800"}', None),
        (b'{"model": "\xff"}', None),
        (rb'{"model": "\x"}', None),
        # Truncated, or not JSON.
        (b'{"model": "f', None),
        (b'{"model": "fr"', "fr"),
        (b'{"model"', None),
        (b'{"model":', None),
        (b'{"model": "fr", "prompt": "a { b [ c \\', "fr"),
        (b'{"prompt": "long { \\"model\\": \\"no', None),
        (b"", None),
        (b"{", None),
        (b'"', None),
        (b"model=fr", None),
        (b"\x00\xff\xfe}}}]]{{", None),
    ],
)
def test_only_the_top_level_model_is_found(body: bytes, model: str | None) -> None:
    assert find_model(body) == model


def test_every_prefix_gives_the_model_or_nothing() -> None:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": 'a "model": "no" \\ { ['}],
            "tools": {"model": "no"},
            "model": "fr",
            "stop": ["}", '"model": "no"'],
        }
    ).encode()
    found = [find_model(body[:length]) for length in range(len(body) + 1)]
    assert set(found) == {None, "fr"}
    assert found[-1] == "fr"


def test_a_model_behind_a_long_prompt_is_found_quickly() -> None:
    prompt = ("x" * 50 + '\\"model\\": \\"no\\" {') * 20_000
    body = b'{"prompt": "' + prompt.encode() + b'", "model": "fr"}'
    assert len(body) > 10**6
    # CPU time, so that other processes do not count. A quadratic scan would take hours.
    start_s = time.process_time()
    assert find_model(body) == "fr"
    assert find_model(body[:-40]) is None
    assert time.process_time() - start_s < 10


def test_a_model_behind_a_long_list_of_token_ids_is_found() -> None:
    body = json.dumps({"prompt": list(range(100_000)), "model": "fr"}).encode()
    assert find_model(body) == "fr"


@pytest.mark.parametrize(
    ("headers", "tokens"),
    [
        ([], 25),
        ([(b"x-body-truncated", b"100/4000")], 1000),
        ([(b"x-body-truncated", b"nonsense")], 25),
        ([(b"x-body-truncated", b"100/")], 25),
    ],
)
def test_a_truncated_body_counts_with_its_whole_size(
    headers: list[tuple[bytes, bytes]], tokens: int
) -> None:
    assert prompt_tokens({"headers": headers}, b"x" * 100) == tokens
