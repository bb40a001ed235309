"""What the metrics say against what clients measured, and whether a scrape under load reads well.

    python -m tests.bench.scrape [--clients N] [--seconds N]

A fleet of two replicas streams to clients that ask again at once, for the base model and four
adapters. Each scrape of `/metrics/fleet` is parsed; in the last one, the sums of the histograms are
compared with what the clients measured. They measure from the request to the event, over HTTP and
through HAProxy; the replicas from the arrival of the body. Goal: within 5%.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.bench.decode import MODEL
from tests.fleet import fleet
from tests.models import make_adapter, make_model

Sums = defaultdict[str, float]
NAMES = ("m", "a", "b", "c", "d")
TOKENS = 40
GOAL = 0.05
HISTOGRAMS = {
    "TTFT": "vllm:time_to_first_token_seconds",
    "E2E": "vllm:e2e_request_latency_seconds",
    "prompt tokens": "vllm:request_prompt_tokens",
    "output tokens": "vllm:request_generation_tokens",
}


async def ask(client: httpx.AsyncClient, name: str, prompt: list[int], found: Sums) -> None:
    body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True}
    body |= {"stream": True, "temperature": 0, "stream_options": {"include_usage": True}}
    began_s = time.monotonic()
    first_s = last_s = 0.0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["choices"]:
                last_s = time.monotonic()
                first_s = first_s or last_s
            elif event.get("usage"):
                found["prompt tokens"] += event["usage"]["prompt_tokens"]
                found["output tokens"] += event["usage"]["completion_tokens"]
    found["requests"] += 1
    found["TTFT"] += first_s - began_s
    found["E2E"] += last_s - began_s


async def scrape(client: httpx.AsyncClient) -> tuple[Sums, int]:
    """Sums and counts by histogram, of all replicas, and how many samples the page has."""
    page = await client.get("/metrics/fleet")
    assert page.status_code == 200, page.text
    found: Sums = defaultdict(float)
    samples = 0
    for family in text_string_to_metric_families(page.text):
        for sample in family.samples:
            samples += 1
            found[sample.name] += sample.value
    return found, samples


async def load(url: str, clients: int, seconds: float) -> tuple[Sums, int, float]:
    found: Sums = defaultdict(float)
    rng = random.Random(0)
    end_s = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def repeat() -> None:
            while time.monotonic() < end_s:
                prompt = [rng.randrange(10, 300) for _ in range(rng.randint(5, 200))]
                await ask(client, rng.choice(NAMES), prompt, found)

        tasks = [asyncio.create_task(repeat()) for _ in range(clients)]
        scrapes, slowest_s = 0, 0.0
        while not all(task.done() for task in tasks):
            began_s = time.monotonic()
            await scrape(client)
            scrapes, slowest_s = scrapes + 1, max(slowest_s, time.monotonic() - began_s)
            await asyncio.wait(tasks, timeout=1.0)
        await asyncio.gather(*tasks)
    return found, scrapes, slowest_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = make_model(root / "m", **MODEL)
        adapters = [f"{n}={make_adapter(root / n, model, seed=i)}" for i, n in enumerate(NAMES[1:])]
        flags = [flag for adapter in adapters for flag in ("--adapter", adapter)]
        (root / "run").mkdir()
        arguments = ["--model", model, "--device", "cpu", "--replicas", "2", *flags]
        with fleet(arguments, root / "run") as running:
            url = running.url

            async def measured() -> tuple[Sums, Sums, int, float, int]:
                own, scrapes, slowest_s = await load(url, args.clients, args.seconds)
                async with httpx.AsyncClient(base_url=url, timeout=120) as client:
                    page, samples = await scrape(client)
                return own, page, scrapes, slowest_s, samples

            own, page, scrapes, slowest_s, samples = asyncio.run(measured())
    print(
        f"{own['requests']:.0f} requests; {scrapes} scrapes parsed under load, the slowest after "
        f"{slowest_s * 1e3:.0f} ms, the last with {samples:,} samples\n"
    )
    print("| sum of all requests | clients | metrics | metrics / clients |")
    print("|---|---:|---:|---:|")
    worst = 0.0
    for what, name in HISTOGRAMS.items():
        assert page[f"{name}_count"] == own["requests"], name
        ratio = page[f"{name}_sum"] / own[what]
        worst = max(worst, abs(ratio - 1))
        print(f"| {what} | {own[what]:,.1f} | {page[f'{name}_sum']:,.1f} | {ratio:.3f} |")
    print(
        f"\n{'met' if worst <= GOAL else 'MISSED'}: {worst:.1%} apart at the most, goal {GOAL:.0%}"
    )


if __name__ == "__main__":
    main()
