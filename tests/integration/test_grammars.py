"""Answers under a grammar, from a real engine: all of them valid, at both plan depths."""

import dataclasses
import json
import re
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher

from cluster.config import EngineConfig
from cluster.errors import BadRequest
from replica.api.structured import json_grammar
from replica.api.text import Text
from replica.engine.engine import Engine
from replica.scheduling.request import Delta, NewRequest, Sampling
from tests.bench.structured import answers
from tests.models import make_model
from tests.until import WORK_S

PROMPT = tuple(range(5, 30))
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("structured") / "base")


def drive(engine: Engine) -> dict[str, list[Delta]]:
    deltas: dict[str, list[Delta]] = {}
    while engine.has_work:
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
        engine.scheduler.check()
    return deltas


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("pages_short", [False, True])
def test_every_answer_follows_its_grammar_and_others_are_as_without(
    model: str, depth: int, pages_short: bool
) -> None:
    """Rows with and without a grammar in one batch. With few pages some rows lose theirs."""
    text = Text.read(model)
    made = Engine(
        EngineConfig(
            model,
            threads=1,
            seed=0,
            plan_depth=depth,
            batch_rows_max=6,
            kv_memory=2**18 if pages_short else 2**23,
            page_copies=False,
            growth_outputs=0.0,
        )
    )
    free = Sampling(max_tokens=40, temperature=1.0, ignore_eos=True)
    wanted = {}
    for n in range(6):
        made.add(NewRequest(f"free{n}", PROMPT, dataclasses.replace(free, seed=n)))
    for name, deltas in drive(made).items():
        wanted[name] = [token for delta in deltas for token in delta.tokens]
    schema = json_grammar(SCHEMA)
    regex = LLMatcher.grammar_from_regex("(ab|cd){2,5}!")
    strict = Sampling(max_tokens=200, temperature=1.0)
    for n in range(6):
        made.add(NewRequest(f"free{n}", PROMPT, dataclasses.replace(free, seed=n)))
        made.add(
            NewRequest(f"json{n}", PROMPT, dataclasses.replace(strict, seed=n, grammar=schema))
        )
        made.add(
            NewRequest(f"regex{n}", PROMPT, dataclasses.replace(strict, seed=n, grammar=regex))
        )
    answers = drive(made)
    assert (made.report().preemptions > 0) == pages_short
    made.close()
    for name, deltas in answers.items():
        assert deltas[-1].error is None, (name, deltas[-1].error)
        tokens = [token for delta in deltas for token in delta.tokens]
        if name.startswith("free"):
            assert tokens == wanted[name]
            continue
        answer = text.decode(tokens)
        if name.startswith("json"):
            jsonschema.validate(json.loads(answer), SCHEMA)
        else:
            assert re.fullmatch("(ab|cd){2,5}!", answer)


@pytest.mark.parametrize("depth", [1, 2])
def test_answers_to_random_schemas_are_valid(tmp_path: Path, depth: int, seed: int) -> None:
    valid, wrong = answers(tmp_path, 25, seed, depth)
    assert (valid, wrong) == (25, [])


def test_a_grammar_that_cannot_be_followed_fails_its_own_request_only(model: str) -> None:
    made = Engine(EngineConfig(model, threads=1, seed=0))
    made.add(NewRequest("bad", PROMPT, Sampling(grammar=LLMatcher.grammar_from_lark("start: x"))))
    made.add(NewRequest("good", PROMPT, Sampling(max_tokens=3, ignore_eos=True)))
    answers = drive(made)
    made.close()
    assert isinstance(answers["bad"][-1].error, BadRequest)
    assert len([t for d in answers["good"] for t in d.tokens]) == 3


def test_a_grammar_without_a_text_fails_its_own_request_only(model: str) -> None:
    made = Engine(EngineConfig(model, threads=1, seed=0))
    for name, schema in (("none", {"$ref": "#"}), ("good", {"type": "integer"})):
        made.add(NewRequest(name, PROMPT, Sampling(grammar=json_grammar(schema))))
    answers = drive(made)
    made.close()
    assert isinstance(answers["none"][-1].error, BadRequest)
    assert answers["good"][-1].error is None


@pytest.mark.parametrize("depth", [1, 2])
def test_nobody_waits_for_the_grammar_of_another(
    model: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One compiles until the test says; the other answers meanwhile."""
    made = Engine(EngineConfig(model, threads=1, seed=0, plan_depth=depth))
    go = threading.Event()

    def slow(*arguments: Any, **options: Any) -> LLMatcher:
        assert go.wait(WORK_S)
        return LLMatcher(*arguments, **options)

    monkeypatch.setattr("llguidance.LLMatcher", slow)
    for n in range(3):
        made.add(NewRequest(f"slow{n}", PROMPT, Sampling(grammar=json_grammar(SCHEMA), seed=n)))
    made.add(NewRequest("plain", PROMPT, Sampling(max_tokens=8, ignore_eos=True)))
    given = 0
    while given < 8:
        given += sum(len(d.tokens) for d in made.step() if d.request_id == "plain")
    for _ in range(3):
        assert not made.step()
    assert made.idle, "it sleeps until a mask is ready"
    go.set()
    assert {name for name, deltas in drive(made).items() if deltas[-1].finish} == {
        f"slow{n}" for n in range(3)
    }
    made.close()


def test_a_grammar_of_many_requests_is_compiled_once(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, compiled = Engine(EngineConfig(model, threads=1, seed=0)), []

    def counted(tokenizer: Any, grammar: str, **options: Any) -> LLMatcher:
        compiled.append(grammar)
        return LLMatcher(tokenizer, grammar, **options)

    monkeypatch.setattr("llguidance.LLMatcher", counted)
    grammar = LLMatcher.grammar_from_regex("(ab|cd){2,5}!")
    for n in range(8):
        made.add(NewRequest(f"r{n}", PROMPT, Sampling(max_tokens=50, seed=n, grammar=grammar)))
    texts = {tuple(t for d in deltas for t in d.tokens) for deltas in drive(made).values()}
    made.close()
    assert compiled == [grammar] and len(texts) > 1


def test_a_tokenizer_that_cannot_be_read_fails_requests_with_a_grammar_only(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any, **__: Any) -> None:
        raise BaseException("panic: decoder")  # as llguidance's panics are

    monkeypatch.setattr("llguidance.hf.from_tokenizer", unreadable)
    made = Engine(EngineConfig(model, threads=1, seed=0))
    made.add(NewRequest("bad", PROMPT, Sampling(grammar=LLMatcher.grammar_from_regex("a"))))
    made.add(NewRequest("good", PROMPT, Sampling(max_tokens=3, ignore_eos=True)))
    answers = drive(made)
    made.close()
    assert isinstance(answers["bad"][-1].error, BadRequest)
    assert len([t for d in answers["good"] for t in d.tokens]) == 3


def test_parameters_that_allow_no_token_are_the_requests_fault(model: str) -> None:
    made = Engine(EngineConfig(model, threads=1, seed=0))
    digits = LLMatcher.grammar_from_regex("[0-9]{4}")
    made.add(NewRequest("bad", PROMPT, Sampling(grammar=digits, allowed_tokens=(70,))))
    made.add(NewRequest("good", PROMPT, Sampling(max_tokens=3, ignore_eos=True)))
    answers = drive(made)
    made.close()
    error = answers["bad"][-1].error
    assert isinstance(error, BadRequest) and "no token" in error.message
    assert answers["good"][-1].finish is not None
