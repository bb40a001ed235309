"""What a scrape says of requests, against what was sent and when."""

import dataclasses
import types
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.values import LoadReport
from replica.api.completion import Call, Piece
from replica.api.metrics import Metrics, Snapshot
from replica.scheduling.request import Finish, Sampling
from tests.serving import ADAPTER, app_with, client_of, text
from tests.stub_engine import StubEngine

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def families(text: str) -> Samples:
    """(name of a sample, its labels) → value. The parser refuses what Prometheus would."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: Any) -> float:
    return found[name, frozenset(labels.items())]


def metrics() -> Metrics:
    return Metrics("base", lambda: Snapshot(LoadReport(), [], 0))


def call(model: str, prompt: int = 7, n: int = 1) -> Call:
    return Call("c", model, None, (tuple(range(prompt)),), Sampling(), text(), n=n)


async def nothing() -> None:
    pass


def test_a_request_is_timed_from_its_bodys_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = types.SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(
        "replica.api.metrics.time", types.SimpleNamespace(monotonic=lambda: clock.now_s)
    )
    shown = metrics()
    watch = shown.watch(call("a"), received_s=10.0)
    for at_s, tokens, finish in ((10.5, 1, None), (10.6, 1, None), (10.9, 2, Finish.LENGTH)):
        clock.now_s = at_s
        first = {"cached_tokens": 3, "queued_s": 0.25} if at_s == 10.5 else {}
        watch.piece(Piece(0, "x", (5,) * tokens, finish=finish, **first))
    found = families(shown.render().decode())
    for name, count, total in (
        ("vllm:time_to_first_token_seconds", 1, 0.5),
        ("vllm:inter_token_latency_seconds", 2, 0.4),
        ("vllm:request_time_per_output_token_seconds", 1, 0.4 / 3),
        ("vllm:e2e_request_latency_seconds", 1, 0.9),
        ("vllm:request_queue_time_seconds", 1, 0.25),
        ("vllm:request_prefill_time_seconds", 1, 0.25),
        ("vllm:request_decode_time_seconds", 1, 0.4),
        ("vllm:request_prompt_tokens", 1, 7),
        ("vllm:request_generation_tokens", 1, 4),
        ("vllm:request_max_num_generation_tokens", 1, 4),
    ):
        assert value(found, f"{name}_count", model_name="a") == count, name
        assert value(found, f"{name}_sum", model_name="a") == pytest.approx(total), name
    assert value(found, "vllm:prompt_tokens_total", model_name="a") == 7
    assert value(found, "vllm:generation_tokens_total", model_name="a") == 4
    assert value(found, "vllm:prefix_cache_queries_total", model_name="a") == 7
    assert value(found, "vllm:prefix_cache_hits_total", model_name="a") == 3
    assert value(found, "vllm:request_success_total", model_name="a", finished_reason="length") == 1


async def test_choices_that_do_not_end_are_counted_as_aborted() -> None:
    shown = metrics()
    watch = shown.watch(call("a", n=3), received_s=0.0)
    watch.piece(Piece(1, "x", (5,), finish=Finish.STOP))
    await watch.until_end(nothing())
    found = families(shown.render().decode())
    success = "vllm:request_success_total"
    assert value(found, success, model_name="a", finished_reason="stop") == 1
    assert value(found, success, model_name="a", finished_reason="abort") == 2


def test_thousands_of_adapters_share_a_bounded_number_of_labels() -> None:
    shown = metrics()
    for n in range(1000):
        shown.watch(call(f"a{n}"), 0.0).piece(Piece(0, "x", (5,), finish=Finish.STOP))
    found = families(shown.render().decode())
    names = {dict(labels).get("model_name") for _, labels in found} - {None}
    assert len(names) == 33
    assert (
        sum(v for (name, _), v in found.items() if name == "vllm:generation_tokens_total") == 1000
    )


def test_every_field_of_a_report_is_shown_and_explained() -> None:
    text = metrics().render().decode()
    for field in dataclasses.fields(LoadReport):
        assert f"# HELP lorafleet_{field.name}" in text


async def test_answers_streamed_and_whole_are_counted() -> None:
    engine = StubEngine()
    async with client_of(await app_with(engine)) as client:
        for stream in (False, True):
            for model in ("tiny", ADAPTER.name):
                body = {"model": model, "prompt": [5, 6], "max_tokens": 3, "stream": stream}
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
        found = families((await client.get("/metrics")).text)
    for model in ("tiny", ADAPTER.name):
        assert value(found, "vllm:generation_tokens_total", model_name=model) == 6
        assert value(found, "vllm:time_to_first_token_seconds_count", model_name=model) == 2
        assert value(found, "vllm:inter_token_latency_seconds_count", model_name=model) == 4
