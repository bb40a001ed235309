"""Asks a running fleet, or a replica alone, over HTTP."""

from typing import Any

import httpx

from cluster.errors import FleetError

_TIMEOUT_S = 30.0


def call(
    url: str, api_key: str | None, method: str, path: str, body: dict[str, Any] | None = None
) -> httpx.Response:
    """Raises FleetError unless it succeeds, with what the server says."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.request(
            method,
            url.rstrip("/").removesuffix("/v1") + path,
            json=body,
            headers=headers,
            timeout=_TIMEOUT_S,
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise FleetError(f"--url {url}: {str(error) or type(error).__name__}") from error
    if response.is_success:
        return response
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text.strip() or response.reason_phrase
    raise FleetError(f"{response.status_code}: {message}")
