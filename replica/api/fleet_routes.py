"""What any replica answers for all: a timeline wherever its request ran, one scrape of all."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import quote

import httpx
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import CatalogUnavailable
from replica.api import asgi
from replica.api.access import Access
from replica.api.interfaces import Engine
from replica.api.metrics import CONTENT_TYPE, Metrics

# Marks what one replica asks another, so that this one asks nobody else.
ASKED_HEADER = "x-lorafleet-asked"
_ANSWER_S = 5.0

Others = Callable[[], Awaitable[Mapping[str, str]]]
"""Replica id → its URL, of all other live ones. Raises CatalogUnavailable."""


async def no_others() -> Mapping[str, str]:
    return {}


class FleetRoutes:
    def __init__(
        self, engine: Engine, metrics: Metrics, access: Access, replica_id: str, others: Others
    ) -> None:
        self._engine, self._metrics, self._access = engine, metrics, access
        self._replica_id, self._others = replica_id, others

    async def timeline(self, http: Request) -> Response:
        """Why did this wait? The timeline of each choice of a response, by the response's id."""
        response_id = http.path_params["response_id"]
        owns = self._access.owns(http.scope["caller"], response_id)
        choices: list[list[dict[str, object]]] = []
        while owns and (timeline := await self._engine.timeline(f"{response_id}-{len(choices)}")):
            began_s = timeline[0].at_s
            choices.append(
                [
                    {"at_s": round(h.at_s - began_s, 6), "event": h.event, "detail": h.detail}
                    for h in timeline
                ]
            )
        if choices:
            body = {"id": response_id, "object": "request.timeline", "replica": self._replica_id}
            return asgi.JsonResponse({**body, "choices": choices})
        answers = await self._ask(http, f"/v1/requests/{quote(response_id, safe='')}")
        for answer in answers.values():
            if answer is not None and answer.status_code == 200:
                return Response(answer.content, media_type="application/json")
        silent = sum(answer is None for answer in answers.values())
        raise asgi.NoSuchRoute(
            f"no replica remembers a request {response_id!r}"
            + (f"; {silent} did not answer" if silent else "")
        )

    async def scrape(self, http: Request) -> Response:
        """All replicas' metrics, each with its replica's label."""
        self._access.check_metrics(http.headers)
        answers = await self._ask(http, "/metrics")
        pages = {
            replica_id: answer.text
            for replica_id, answer in answers.items()
            if answer is not None and answer.status_code == 200
        }
        pages[self._replica_id] = self._metrics.render().decode()
        up = {replica_id: replica_id in pages for replica_id in (*answers, self._replica_id)}
        text = await asyncio.to_thread(merged, pages, up)
        return Response(text, media_type=CONTENT_TYPE)

    async def _ask(self, http: Request, path: str) -> dict[str, httpx.Response | None]:
        """Each other replica's answer to who asked; None: it gave none."""
        if ASKED_HEADER in http.headers:
            return {}
        try:
            others = await self._others()
        except CatalogUnavailable:
            return {}
        headers = [(ASKED_HEADER.encode(), self._replica_id.encode())]
        headers += [(name, value) for name, value in http.headers.raw if name == b"authorization"]
        # Replicas' URLs are plain HTTP, so that no certificates are read for it.
        async with httpx.AsyncClient(
            headers=headers, timeout=_ANSWER_S, verify=False, trust_env=False
        ) as client:

            async def answer(url: str) -> httpx.Response | None:
                try:
                    return await client.get(url + path)
                except httpx.HTTPError:
                    return None

            found = await asyncio.gather(*map(answer, others.values()))
        return dict(zip(others, found, strict=True))


def merged(pages: Mapping[str, str], up: Mapping[str, bool]) -> str:
    """One scrape from those of replicas: each sample gets its replica's label. up: who answered."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica_id, page in sorted(pages.items()):
        family = ""
        for line in page.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                if line not in (head := heads.setdefault(family, [])):
                    head.append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, replica_id))
    lines = ["# HELP lorafleet_up 1 if the replica has answered.", "# TYPE lorafleet_up gauge"]
    lines += [f'lorafleet_up{{replica="{name}"}} {int(good)}' for name, good in sorted(up.items())]
    for family, head in heads.items():
        lines += head + samples.get(family, [])
    return "\n".join(lines) + "\n"


def _labelled(sample: str, replica_id: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace:
        return f'{name}{{replica="{replica_id}",{rest}'
    name, _, value = sample.partition(" ")
    return f'{name}{{replica="{replica_id}"}} {value}'
