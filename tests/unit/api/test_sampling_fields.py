"""From a request's fields and the model's defaults to `Sampling`."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ModelUnsupported
from replica.api.openai_protocol import CompletionRequest, parsed
from replica.api.sampling import (
    OPENAI_DEFAULTS,
    SamplingDefaults,
    SamplingReader,
    read_defaults,
)
from replica.scheduling.request import Sampling
from tests.serving import CONFIG, app_with, client_of, text
from tests.stub_engine import StubEngine


async def read(defaults: SamplingDefaults = OPENAI_DEFAULTS, **fields: Any) -> Sampling:
    body = json.dumps({"model": "tiny", "prompt": "a", **fields}).encode()
    request = parsed(CompletionRequest, body)[0]
    return await SamplingReader(CONFIG.vocab, defaults).read(text(), request, 16, None)


async def test_each_field_arrives() -> None:
    sampling = await read(
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=2,
        logit_bias={"5": 1, "7": -1000},
        allowed_token_ids=[9, 5, 5],
        temperature=3,
    )
    assert sampling == Sampling(
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=2.0,
        logit_bias=((5, 1.0), (7, -100.0)),
        allowed_tokens=(5, 9),
        temperature=3.0,
    )


async def test_numbers_and_booleans_may_be_text() -> None:
    sampling = await read(temperature="0.5", top_k=40.0, ignore_eos="true", seed="7")
    assert sampling == Sampling(temperature=0.5, top_k=40, ignore_eos=True, seed=7)


async def test_a_temperature_near_zero_is_zero() -> None:
    assert (await read(temperature=9e-6)).temperature == 0
    assert (await read(SamplingDefaults(temperature=9e-6))).temperature == 0
    assert (await read(temperature=1e-5)).temperature == 1e-5


async def test_a_bad_word_is_barred_with_and_without_a_space() -> None:
    one = text().word_tokens("a")
    assert (await read(bad_words=["a"])).bad_words[0] == one
    # Of bytes, " a" has one more token, so the bare word bars both.
    assert (await read(bad_words=[" a"])).bad_words == (one,)


async def test_the_models_defaults_count_where_the_request_is_silent(tmp_path: Path) -> None:
    given = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    (tmp_path / "generation_config.json").write_text(json.dumps({**given, "max_new_tokens": 99}))
    defaults = read_defaults(str(tmp_path))
    assert await read(defaults) == Sampling(
        temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05
    )
    assert await read(defaults, temperature=0, top_k=-1, top_p=1, repetition_penalty=1) == Sampling(
        temperature=0.0
    )
    assert defaults.max_tokens == 99


def test_a_model_without_defaults_has_openais(tmp_path: Path) -> None:
    assert read_defaults(str(tmp_path)) == OPENAI_DEFAULTS


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", v) for v in ("hot", True, -1, 1e9)] + [("repetition_penalty", 0.001)],
)
def test_a_default_out_of_range_is_named(tmp_path: Path, field: str, value: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({field: value}))
    with pytest.raises(ModelUnsupported, match=field):
        read_defaults(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "kept"),
    [({"truncate_prompt_tokens": 3}, 3), ({"truncate_prompt_tokens": 500}, 200), ({}, None)],
)
async def test_a_prompt_is_truncated_from_the_left(given: dict[str, int], kept: int | None) -> None:
    engine = StubEngine()
    app = await app_with(engine, config=CONFIG)
    prompt = list(range(10, 110)) * 2
    async with client_of(app) as client:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 2, **given}
        answer = await client.post("/v1/completions", json=body)
    if kept == 3:
        assert answer.status_code == 200, answer.text
        assert engine.seen[0].prompt == tuple(prompt[-3:])
    else:
        assert answer.json()["error"]["code"] == "context_length_exceeded"


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x" * 1000}]}


@pytest.mark.parametrize(
    ("path", "fields", "left"),
    [
        ("completions", {"prompt": "x" * 1000, "max_tokens": 28}, 28),
        ("completions", {"prompt": [9] * 1000}, 16),
        ("completions", {"prompt": "x" * 1000}, 16),
        ("chat/completions", {**CHAT, "max_completion_tokens": 28, "max_tokens": 5}, 28),
        ("chat/completions", {**CHAT, "max_tokens": 28}, 28),
        ("chat/completions", CHAT, 1),
    ],
)
async def test_minus_one_keeps_what_fits_before_the_answer(
    path: str, fields: dict[str, Any], left: int
) -> None:
    engine = StubEngine()
    body = {"model": "tiny", "truncate_prompt_tokens": -1, **fields}
    async with client_of(await app_with(engine)) as client:
        answer = await client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    (seen,) = engine.seen
    assert len(seen.prompt) == CONFIG.context - left
    assert seen.sampling.max_tokens == left
