"""Asks a running fleet, or a replica alone, over HTTP."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import httpx

from cluster.adapter_paths import HEAD_BYTES, VOCABULARY_FILE, files_of
from cluster.errors import FleetError
from cluster.file_copies import open_regular
from replica.serving.keys import operator_key

_TIMEOUT_S = 30.0
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# In one call, and calls at a time: each may go to another replica, which checks the files.
_ADDED_AT_ONCE = 250
_CALLS_MAX = 4


def call(
    url: str,
    api_key: str | None,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    files: Mapping[str, BinaryIO] = {},
) -> httpx.Response:
    """files: by name, sent with the fields of `body` as a form. Raises FleetError unless it
    succeeds, with what the server says.
    """
    try:
        address = httpx.URL(url.rstrip("/").removesuffix("/v1") + path)
        here = address.host in _LOOPBACK
        if api_key is None and here:
            api_key = operator_key(address.port or 80)
        response = httpx.request(
            method,
            address,
            json=None if files else body,
            data=body if files else None,
            files=[("files", named) for named in files.items()] or None,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=_TIMEOUT_S,
            trust_env=not here,  # a proxy would look for its own loopback
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


def upload_adapter(url: str, api_key: str | None, directory: str, fields: dict[str, Any]) -> str:
    """Sends an adapter's files. Returns what the server says. Raises FleetError."""
    with contextlib.ExitStack() as opened:
        files: dict[str, BinaryIO] = {
            name: opened.enter_context(open_regular(f"{directory}/{name}"))
            for name in files_of(directory)
        }
        if VOCABULARY_FILE in files:  # the server reads no more of it
            files[VOCABULARY_FILE] = io.BytesIO(files[VOCABULARY_FILE].read(HEAD_BYTES))
        return call(url, api_key, "POST", "/v1/load_lora_adapter", fields, files).text


def add_adapters(
    url: str, api_key: str | None, entries: list[dict[str, Any]], load_inplace: bool
) -> Iterator[str]:
    """What the server says of one adapter, or a line for each part of many.

    Raises FleetError: a part is added as a whole or not at all, and other parts may be added.
    """
    if len(entries) == 1:
        body = {**entries[0], "load_inplace": load_inplace}
        yield call(url, api_key, "POST", "/v1/load_lora_adapter", body).text
        return

    def add(part: list[dict[str, Any]]) -> dict[str, Any]:
        body = {"adapters": part, "load_inplace": load_inplace}
        page: dict[str, Any] = call(url, api_key, "POST", "/v1/load_lora_adapters", body).json()
        return page

    starts = range(0, len(entries), _ADDED_AT_ONCE)
    parts = [entries[start : start + _ADDED_AT_ONCE] for start in starts]
    added = 0
    with ThreadPoolExecutor(_CALLS_MAX) as threads:
        for part, page in zip(parts, threads.map(add, parts), strict=True):
            added += len(part)
            line = f"{added} of {len(entries)} adapters added."
            if page["pending"]:
                line += f" Not yet acknowledged by: {', '.join(page['pending'])}."
            yield line
            for each in page["data"]:
                yield from (f"{each['id']}: {remark}" for remark in each["remarks"])
                for replica_id, reason in each["failed"].items():
                    yield f"{each['id']}: could not be read by {replica_id}: {reason}"
