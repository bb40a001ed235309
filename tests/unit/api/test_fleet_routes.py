"""What one replica answers for all: timelines from wherever they are, one scrape of all."""

from collections.abc import Mapping
from dataclasses import replace

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cluster.errors import CatalogUnavailable
from replica.api.access import Rules
from replica.api.fleet_routes import merged
from replica.api.server import build_app
from tests.serving import BASE, CONFIG, Book, app_with, client_of, live, text
from tests.stub_engine import StubEngine

BODY = {"model": BASE, "prompt": [5], "max_tokens": 2}
RULES = Rules(api_keys=("sk-one", "sk-two"), admin_keys=("sk-admin",))
DEAD = "http://127.0.0.1:9"  # nobody listens on the port that discards


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_a_timeline_is_found_where_its_request_ran_for_whom_it_belongs_to() -> None:
    config = replace(CONFIG, replica_id="r-2", rules=RULES)
    async with live(await app_with(StubEngine(), config=config)) as url:
        calls = 0

        async def others() -> Mapping[str, str]:
            nonlocal calls
            calls += 1
            return {"r-2": url, "r-3": DEAD}

        app = build_app(StubEngine(), Book(), text(), replace(CONFIG, rules=RULES), None, others)
        async with httpx.AsyncClient(base_url=url) as there:
            ran = await there.post("/v1/completions", json=BODY, headers=bearer("sk-one"))
        path = f"/v1/requests/{ran.json()['id']}"
        async with client_of(app) as here:
            found = {
                key: await here.get(path, headers=bearer(key))
                for key in ("sk-one", "sk-two", "sk-admin")
            }
            asked = calls
            again = await here.get(path, headers=bearer("sk-one") | {"x-lorafleet-asked": "r-2"})
    assert {key: answer.status_code for key, answer in found.items()} == {
        "sk-one": 200,
        "sk-two": 404,
        "sk-admin": 200,
    }
    assert found["sk-one"].json()["replica"] == "r-2"
    assert found["sk-two"].json()["error"]["message"].endswith("; 1 did not answer")
    assert (again.status_code, calls) == (404, asked)  # who is asked asks nobody


async def test_one_scrape_shows_every_replica() -> None:
    async with live(await app_with(StubEngine(), config=replace(CONFIG, replica_id="r-2"))) as url:

        async def others() -> Mapping[str, str]:
            return {"r-2": url, "r-3": DEAD}

        app = build_app(StubEngine(), Book(), text(), CONFIG, None, others)
        async with httpx.AsyncClient(base_url=url) as there:
            await there.post("/v1/completions", json=BODY)
        async with client_of(app) as here:
            page = (await here.get("/metrics/fleet")).text
    families = {family.name: family.samples for family in text_string_to_metric_families(page)}
    assert page.count("# TYPE lorafleet_running ") == 1
    assert {s.labels["replica"]: s.value for s in families["lorafleet_up"]} == {
        "r-1": 1.0,
        "r-2": 1.0,
        "r-3": 0.0,
    }
    assert {s.labels["replica"] for s in families["lorafleet_running"]} == {"r-1", "r-2"}
    (generated,) = (s for s in families["vllm:generation_tokens"] if s.name.endswith("_total"))
    assert (generated.labels, generated.value) == ({"replica": "r-2", "model_name": BASE}, 2.0)


async def test_without_redis_a_replica_answers_for_itself() -> None:
    async def others() -> Mapping[str, str]:
        raise CatalogUnavailable("Redis is away")

    app = build_app(StubEngine(), Book(), text(), CONFIG, None, others)
    async with client_of(app) as client:
        assert (await client.get("/v1/requests/no")).status_code == 404
        assert 'lorafleet_up{replica="r-1"} 1' in (await client.get("/metrics/fleet")).text


async def test_keys_guard_the_scrape() -> None:
    config = replace(CONFIG, rules=RULES)
    async with client_of(build_app(StubEngine(), Book(), text(), config)) as client:
        for key, status in (("", 401), ("sk-one", 403), ("sk-admin", 200)):
            answer = await client.get("/metrics/fleet", headers=bearer(key))
            assert answer.status_code == status


def test_samples_of_a_family_stay_together() -> None:
    page = '# HELP a A.\n# TYPE a counter\na_total 1\na_created 2\n# TYPE b gauge\nb{x="y"} 3\n'
    assert merged({"s": page, "r": page}, {}).splitlines()[2:] == [
        "# HELP a A.",
        "# TYPE a counter",
        'a_total{replica="r"} 1',
        'a_created{replica="r"} 2',
        'a_total{replica="s"} 1',
        'a_created{replica="s"} 2',
        "# TYPE b gauge",
        'b{replica="r",x="y"} 3',
        'b{replica="s",x="y"} 3',
    ]
