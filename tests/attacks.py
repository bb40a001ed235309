"""Attacks on a server's port. Tests run a few of each; as a program, as many as are asked for:

    python -m tests.attacks http://127.0.0.1:8000 --key KEY --held 20000 --mutations 10000 \
        --disconnects 10000

prints what each found, and what a keyed request took meanwhile. Loopback only.
"""

import argparse
import asyncio
import contextlib
import json
import random
import resource
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

ANSWER_S = 60.0
# Connections opened at once. The kernel's queue of those not accepted yet is finite.
_OPENING = 200
_PATIENCE_S = 2.0


@dataclass(slots=True)
class Held:
    """Connections that send nothing more, or far too little. refused: closed before they could."""

    open: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)
    refused: int = 0

    def closed(self) -> int:
        """How many the server has ended meanwhile, with or without a reset."""
        return sum(reader.at_eof() or reader.exception() is not None for reader, _ in self.open)


# What each kind sends at once, and then byte after byte.
HELD = {
    "idle": (b"", b""),
    "slow headers": (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", b"a"),
    "slow body": (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n{",
        b" ",
    ),
}


@contextlib.asynccontextmanager
async def held(port: int, kind: str, count: int, source: str) -> AsyncIterator[Held]:
    """Holds `count` connections from the loopback address `source` open during the block."""
    found = Held()
    first, more = HELD[kind]
    opening = asyncio.Semaphore(_OPENING)

    async def open_one() -> None:
        async with opening:
            try:
                reader, writer = await asyncio.wait_for(
                    asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0)), ANSWER_S
                )
                writer.write(first)
                found.open.append((reader, writer))
            except (OSError, TimeoutError):
                found.refused += 1

    async def drip() -> None:
        while True:
            for reader, writer in found.open:
                if not reader.at_eof() and not writer.is_closing():
                    writer.write(more)
            await asyncio.sleep(1)

    async def notice(reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(4096):
                pass

    await asyncio.gather(*(open_one() for _ in range(count)))
    tasks = [asyncio.create_task(notice(reader)) for reader, _ in found.open]
    if more:
        tasks.append(asyncio.create_task(drip()))
    try:
        yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, writer in found.open:
            writer.transport.abort()


def _head(path: str, key: str | None, length: int, extra: bytes = b"") -> bytes:
    bearer = f"Authorization: Bearer {key}\r\n" if key else ""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{bearer}Content-Type: application/json\r\n"
    return head.encode() + extra + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % length


_FIELDS = (
    *("model", "prompt", "messages", "n", "stream", "stop", "temperature", "top_p", "top_k"),
    *("seed", "max_tokens", "min_tokens", "priority", "stop_token_ids", "echo", "logprobs"),
    *("user", "ignore_eos", "stream_options", "lora_name", "lora_path", "adapters"),
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("tiny"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
_PATHS = st.sampled_from(
    ["/v1/completions", "/v1/chat/completions", "/v1/unload_lora_adapter", "/v1/load_lora_adapter"]
)
_SAMPLE = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 2}).encode()


@st.composite
def _broken(draw: st.DrawFn, valid: bytes) -> bytes:
    """`valid` with a few bytes changed, put in, taken out or cut off."""
    found = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(found)))
        found[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(found)


def _with_length(path: str, key: str | None, body: bytes, extra: bytes = b"") -> bytes:
    return _head(path, key, len(body), extra) + body


def requests(key: str | None) -> st.SearchStrategy[bytes]:
    """Requests that are wrong in their JSON, in its bytes, in a header or in HTTP itself."""
    bodies = st.dictionaries(st.sampled_from(_FIELDS), _VALUES, max_size=6).map(
        lambda body: json.dumps({"model": "tiny", "max_tokens": 2, **body}).encode()
    )
    values = st.binary(max_size=40).map(lambda value: value.replace(b"\n", b"").replace(b"\r", b""))
    names = st.sampled_from(
        [b"x-request-id", b"x-request-deadline-ms", b"x-lorafleet-model", b"accept", b"cookie"]
    )
    headers = st.tuples(names, values).map(lambda header: b": ".join(header) + b"\r\n")
    return st.one_of(
        st.builds(_with_length, _PATHS, st.just(key), bodies),
        st.builds(_with_length, _PATHS, st.just(key), _broken(_SAMPLE)),
        st.builds(_with_length, _PATHS, st.just(key), st.just(_SAMPLE), headers),
        _broken(_with_length("/v1/completions", key, _SAMPLE)),
    )


async def _status(port: int, request: bytes) -> int | None:
    """Of the answer; None if the connection was closed without one."""
    async with asyncio.timeout(ANSWER_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            answer = asyncio.create_task(reader.readline())
            await asyncio.wait([answer], timeout=_PATIENCE_S)
            if not answer.done():  # it waits for the rest, so there is none
                writer.write_eof()
            line = await answer
            return int(line.split()[1]) if line.startswith(b"HTTP/") else None
        except OSError:
            return None
        finally:
            writer.transport.abort()


def mutations(port: int, key: str | None, count: int) -> Counter[int | None]:
    """How often each status was answered. Raises AssertionError, with the smallest request that
    shows it, for a 500, 502 or 503.
    """
    found: Counter[int | None] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests(key))
    def attack(request: bytes) -> None:
        status = asyncio.run(_status(port, request))
        found[status] += 1
        assert status not in (500, 502, 503), request

    attack()
    return found


async def disconnects(port: int, key: str | None, count: int, seed: int) -> None:
    """Streams whose client goes after a random number of bytes."""
    chance = random.Random(seed)
    body = json.dumps(
        {"model": "tiny", "prompt": "x", "max_tokens": 64, "stream": True, "ignore_eos": True}
    ).encode()
    request = _with_length("/v1/completions", key, body)
    running = asyncio.Semaphore(32)

    async def one(sent: int, read: int) -> None:
        async with running, asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                writer.write(request[:sent])
                if sent == len(request):
                    await reader.readexactly(read)
            writer.transport.abort()

    await asyncio.gather(
        *(
            one(
                len(request) if chance.random() < 0.9 else chance.randrange(len(request)),
                chance.randrange(8000),
            )
            for _ in range(count)
        )
    )


async def first_token_s(port: int, key: str | None) -> float:
    """From the request to the first event of its stream, on a connection of its own."""
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 4, "stream": True}).encode()
    started_s = time.monotonic()
    async with asyncio.timeout(ANSWER_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(_with_length("/v1/completions", key, body))
            status = await reader.readline()
            assert b" 200 " in status, status
            await reader.readuntil(b"data: ")
            return time.monotonic() - started_s
        finally:
            writer.transport.abort()


async def _typical_s(port: int, key: str | None, times: int = 15) -> float:
    return statistics.median([await first_token_s(port, key) for _ in range(times)])


async def _hold_all(port: int, key: str | None, count: int) -> None:
    usual_s = await _typical_s(port, key)
    print(f"TTFT: {usual_s * 1e3:.1f} ms, nothing else")
    for i, kind in enumerate(HELD):
        async with held(port, kind, count, f"127.0.0.{2 + i}") as connections:
            print(
                f"{kind}: {len(connections.open)} open, {connections.refused} refused; "
                f"TTFT {await _typical_s(port, key) * 1e3:.1f} ms, "
                f"{connections.closed()} closed by now",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("url")
    parser.add_argument("--key")
    parser.add_argument("--held", type=int, default=0, help="connections of each kind")
    parser.add_argument("--mutations", type=int, default=0)
    parser.add_argument("--disconnects", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args()
    port = urlsplit(given_.url).port or 80
    with contextlib.suppress(OSError, ValueError):  # root may have more files than its limit says
        resource.setrlimit(resource.RLIMIT_NOFILE, (3 * given_.held + 1000,) * 2)
    if given_.held:
        asyncio.run(_hold_all(port, given_.key, given_.held))
    if given_.mutations:
        print("mutations:", dict(mutations(port, given_.key, given_.mutations)), flush=True)
    if given_.disconnects:
        asyncio.run(disconnects(port, given_.key, given_.disconnects, given_.seed))
        print(f"disconnects: {given_.disconnects}")


if __name__ == "__main__":
    main()
