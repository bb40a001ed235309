"""SGLang's native endpoints, as its benchmark and its clients use them."""

import json
from typing import Any

import pytest

from replica.scheduling.request import Sampling
from tests.serving import ADAPTER, BASE, app_with, client_of, text
from tests.stub_engine import StubEngine

PROMPT = "hello"
SCRIPT = (70, 71, 72)


async def post(engine: StubEngine, **fields: Any) -> Any:
    async with client_of(await app_with(engine)) as client:
        answer = await client.post("/generate", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def refused(**fields: Any) -> dict[str, str]:
    engine = StubEngine()
    async with client_of(await app_with(engine)) as client:
        answer = await client.post("/generate", json=fields)
    assert answer.status_code == 400, answer.text
    assert engine.seen == []
    error: dict[str, str] = answer.json()["error"]
    assert error["message"].startswith(f"{error['param']}")
    return error


async def test_an_answer_is_one_object_with_its_meta_info() -> None:
    sampling = {"max_new_tokens": 3, "temperature": 0}
    found = await post(StubEngine(script=SCRIPT), text=PROMPT, sampling_params=sampling, rid="mine")
    assert found["text"] == text().decode(SCRIPT) and found["output_ids"] == [*SCRIPT]
    meta = found["meta_info"]
    assert meta.pop("e2e_latency") >= 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 3},
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 3,
        "cached_tokens": 0,
    }


@pytest.mark.parametrize(
    ("given", "matched"),
    [
        ({"stop": text().decode([71])}, text().decode([71])),
        ({"stop_token_ids": [71]}, 71),
        ({}, 72),  # the model's own end
    ],
)
async def test_what_ended_an_answer_is_told(given: dict[str, Any], matched: str | int) -> None:
    engine = StubEngine(script=SCRIPT, eos=frozenset({72}))
    found = await post(engine, text=PROMPT, sampling_params=given)
    assert found["meta_info"]["finish_reason"] == {"type": "stop", "matched": matched}
    assert engine.seen[0].sampling.max_tokens == 128 - len(PROMPT)  # what the context leaves


async def test_sampling_parameters_arrive() -> None:
    engine = StubEngine()
    given = {
        "max_new_tokens": 9,
        "min_new_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "frequency_penalty": 1,
        "presence_penalty": -1,
        "repetition_penalty": 1.5,
        "ignore_eos": True,
        "sampling_seed": 7,
        "stop_token_ids": [9],
        "logit_bias": {"5": 2},
    }
    await post(engine, input_ids=[5, 6], sampling_params=given, lora_path="poet")
    assert engine.seen[0].prompt == (5, 6) and engine.seen[0].digest == ADAPTER.digest
    assert engine.seen[0].sampling == Sampling(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        frequency_penalty=1.0,
        presence_penalty=-1.0,
        repetition_penalty=1.5,
        ignore_eos=True,
        seed=7,
        stop_tokens=frozenset({9}),
        logit_bias=((5, 2.0),),
    )


@pytest.mark.parametrize(
    "given",
    [
        {"json_schema": json.dumps({"type": "object"})},
        {"json_schema": {"type": "object"}},
        {"regex": "a+"},
        {"ebnf": 'root ::= "a" | "b"'},
    ],
    ids=str,
)
async def test_structured_output_becomes_a_grammar(given: dict[str, Any]) -> None:
    engine = StubEngine()
    await post(engine, text="a", sampling_params={**given, "max_new_tokens": 1})
    assert engine.seen[0].sampling.grammar


async def test_a_batch_and_several_choices_are_a_list_in_order() -> None:
    engine = StubEngine(script=SCRIPT)
    sampling = {"max_new_tokens": 1, "n": 2}
    found = await post(engine, input_ids=[[5], [6, 7]], sampling_params=sampling)
    assert [(r["index"], r["meta_info"]["prompt_tokens"]) for r in found] == [
        (0, 1),
        (1, 1),
        (2, 2),
        (3, 2),
    ]
    (one,) = await post(StubEngine(), text=["a"], sampling_params={"max_new_tokens": 1})
    assert one["meta_info"]["prompt_tokens"] == 1


async def test_a_stream_repeats_the_whole_text_so_far() -> None:
    """As the benchmark reads it, which sends `lora_path` and `image_data` in any case."""
    sent = {
        "text": PROMPT,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 3, "ignore_eos": True},
        "stream": True,
        "lora_path": "",
        "return_logprob": False,
        "logprob_start_len": -1,
        "image_data": None,
    }
    async with client_of(await app_with(StubEngine(script=SCRIPT))) as client:
        answer = await client.post("/generate", json=sent)
    *events, done = [e.removeprefix("data: ") for e in answer.text.strip().split("\n\n")]
    assert done == "[DONE]"
    parts = [json.loads(event) for event in events]
    assert [part["text"] for part in parts] == [text().decode(SCRIPT[:n]) for n in (1, 2, 3)]
    assert [part["meta_info"]["completion_tokens"] for part in parts] == [1, 2, 3]
    reasons = [part["meta_info"]["finish_reason"] for part in parts]
    assert reasons == [None, None, {"type": "length", "length": 3}]


@pytest.mark.parametrize(("start", "told"), [(None, 1), (-1, 1), (0, 5), (3, 2)])
async def test_logprobs_of_input_and_output(start: int | None, told: int) -> None:
    engine, tokens = StubEngine(script=SCRIPT), text().word_tokens(PROMPT)
    found = await post(
        engine,
        text=PROMPT,
        sampling_params={"max_new_tokens": 2},
        return_logprob=True,
        logprob_start_len=start,
        top_logprobs_num=2,
        return_text_in_logprobs=True,
    )
    meta = found["meta_info"]
    names = [text().decode([token]) for token in tokens]
    pairs = list(zip(tokens, names, strict=True))[-told:]
    assert meta["input_token_logprobs"] == [
        [-0.5 if i else None, *pair] for i, pair in enumerate(pairs)
    ]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == [*SCRIPT[:2]]
    assert meta["input_top_logprobs"][0] is None
    assert len(meta["input_top_logprobs"]) == told and len(meta["output_top_logprobs"]) == 2
    assert [token for _, token, _ in meta["output_top_logprobs"][0]] == [70, 71]
    scored = engine.seen[0].sampling.prompt_logprobs
    assert scored == (2 if told > 1 else None), "what is not asked for is not computed"


async def test_a_prompt_may_be_scored_without_an_answer() -> None:
    fields = {"text": PROMPT, "sampling_params": {"max_new_tokens": 0}}
    found = await post(StubEngine(), **fields, return_logprob=True, logprob_start_len=0)
    assert found["text"] == "" and found["meta_info"]["completion_tokens"] == 0
    assert found["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert len(found["meta_info"]["input_token_logprobs"]) == len(PROMPT)


@pytest.mark.parametrize(
    ("fields", "field", "word"),
    [
        ({}, "text", "input_ids"),
        ({"text": "a", "input_ids": [5]}, "text", "input_ids"),
        ({"text": ""}, "text", "empty"),
        ({"input_ids": [5, 320]}, "input_ids", "320"),
        (
            {"text": "a", "sampling_params": {"temperature": -1}},
            "sampling_params.temperature",
            "-1",
        ),
        ({"text": "a", "sampling_params": {"stop_regex": "a"}}, "sampling_params.stop_regex", "a"),
        (
            {"text": "a", "sampling_params": {"min_new_tokens": 9, "max_new_tokens": 8}},
            "sampling_params.min_new_tokens",
            "9",
        ),
        ({"text": "a", "sampling_params": {"regex": "("}}, "sampling_params.regex", "("),
        ({"text": "a", "image_data": ["x"]}, "image_data", "x"),
        ({"text": "a", "top_logprobs_num": 21}, "top_logprobs_num", "21"),
        (
            {"text": PROMPT, "return_logprob": True, "logprob_start_len": 5},
            "logprob_start_len",
            "5",
        ),
        ({"text": "x" * 125, "sampling_params": {"max_new_tokens": 9}}, "text", "125"),
    ],
    ids=str,
)
async def test_bad_input_is_named_as_it_was_sent(
    fields: dict[str, Any], field: str, word: str
) -> None:
    error = await refused(**fields)
    assert error["param"] == field and word in error["message"]


async def test_what_clients_ask_about_the_server() -> None:
    async with client_of(await app_with(StubEngine())) as client:
        for prefix in ("", "get_"):
            model = (await client.get(f"/{prefix}model_info")).json()
            assert model["model_path"] == BASE and model["is_generation"]
            server = (await client.get(f"/{prefix}server_info")).json()
            assert (server["context_length"], server["tp_size"]) == (128, 1)
            assert server["internal_states"] == []
        assert (await client.get("/health_generate")).status_code == 200
