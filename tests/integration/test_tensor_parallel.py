"""An engine on two ranks, each a process, gives the results of an engine on one."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.adapter_paths import TENSORS_FILE
from cluster.config import EngineConfig
from cluster.errors import ConfigError, EngineFailed, StartupError
from cluster.values import Tier, Version
from replica.adapters.adapter_files import inspect
from replica.engine import tensor_parallel
from replica.engine.engine import Engine
from replica.engine.link import EngineLink
from replica.engine.tensor_parallel import _Process
from replica.engine.tp_messages import Command, Drop
from replica.model.launch import Row
from replica.model.shape import read_shape
from replica.scheduling.adapter import Load
from replica.scheduling.request import Delta, NewRequest, Sampling
from tests.kernels.pipelined import assert_told_alike
from tests.models import edit_tensors, make_adapter, make_model
from tests.until import TIMEOUT_S, WORK_S, until, until_now

# Tolerance of log-probabilities. Ranks sum in another order, which changes sums of 64 and 96
# products by about 1e-6 of their size; three layers make it ten times that. An adapter changes
# log-probabilities by 0.1 or more.
TOLERANCE = 1e-4
VOCAB = 320
PROMPTS = [tuple(range(5 + i, 25 + 3 * i)) for i in range(4)]
LOGGED = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=VOCAB)
LONG = Sampling(max_tokens=400, temperature=0.0, ignore_eos=True)
# More tokens than a request can generate before its test ends it.
ENDLESS = Sampling(max_tokens=8000, temperature=0.0, ignore_eos=True)
ADAPTERS = (
    {"rank": 4, "targets": ("q_proj", "o_proj", "up_proj")},
    {"rank": 16},
    {"rank": 8, "targets": ("k_proj", "v_proj", "down_proj"), "layers_to_transform": [0, 2]},
    {"rank": 16, "rank_pattern": {"gate_proj": 5}, "use_rslora": True},
)


def versions_of(model: str, root: Path) -> list[Version]:
    found = []
    for i, settings in enumerate(ADAPTERS):
        path = make_adapter(root / str(i), model, seed=i, strength=0.1, **settings)  # type: ignore[arg-type]
        info = inspect(path, read_shape(model), rank_max=64)
        found.append(Version(f"a{i}", info.digest, path, info.rank, info.parameters))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    base = tmp_path_factory.mktemp("parallel") / "base"
    return make_model(base, max_position_embeddings=8192)


@pytest.fixture(scope="module")
def versions(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[Version]:
    return versions_of(model, tmp_path_factory.mktemp("adapters"))


def engine(model: str, ranks: int, versions: list[Version], **settings: object) -> Engine:
    config = EngineConfig(
        model,
        device="cpu",
        threads=1,
        seed=0,
        tensor_parallel=ranks,
        **settings,  # type: ignore[arg-type]
    )
    made = Engine(config)
    for version in versions:
        made.register(version, version.uri)
    return made


@pytest.fixture(scope="module")
def parallel(model: str, versions: list[Version]) -> Iterator[Engine]:
    """Memory for fewer than all four adapters."""
    largest = max(v.parameters for v in versions) * 4
    made = engine(
        model, 2, versions, adapter_memory=largest * 5 // 4, batch_rows_max=6, kv_memory=2**20
    )
    yield made
    made.close()


def drive(engine: Engine) -> dict[str, list[Delta]]:
    """Steps until all work has ended. Checks the invariants after each step."""
    got: dict[str, list[Delta]] = {}
    deadline = time.monotonic() + WORK_S
    while engine.has_work:
        assert time.monotonic() < deadline, engine.report()
        for delta in engine.step():
            got.setdefault(delta.request_id, []).append(delta)
        engine.scheduler.check()
    return got


def logprobs(deltas: list[Delta]) -> torch.Tensor:
    """Log-probabilities [tokens, vocab], and the generated tokens before them."""
    rows = []
    for delta in deltas:
        assert delta.error is None, delta.error
        for token, found in zip(delta.tokens, delta.logprobs, strict=True):
            row = torch.empty(VOCAB + 1)
            row[0] = token
            for other, value in found.top:
                row[other + 1] = value
            rows.append(row)
    return torch.stack(rows)


def answers(engine: Engine, digests: list[str | None]) -> dict[str, torch.Tensor]:
    """One request for each, all at once."""
    for n, digest in enumerate(digests):
        engine.add(NewRequest(f"r{n}", PROMPTS[n % 4], LOGGED, digest))
    return {name: logprobs(deltas) for name, deltas in drive(engine).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        assert torch.equal(found[name][:, 0], rows[:, 0]), f"{name}: other tokens"
        assert (found[name] - rows).abs().max() <= TOLERANCE, name


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_biases_and_head_norms_of_other_architectures(architecture: str, tmp_path: Path) -> None:
    """Runs before the other tests: they share one engine, and a process can have only one."""
    model = make_model(tmp_path / "base", architecture)
    versions = versions_of(model, tmp_path)
    digests = [None, *(v.digest for v in versions)]
    with closing(engine(model, 1, versions)) as alone:
        wanted = answers(alone, digests)
    with closing(engine(model, 2, versions, overlap=False)) as parallel:
        assert_same(answers(parallel, digests), wanted)
        assert parallel._workers is not None
        pids = parallel._workers.pids
        assert all(map(runs, pids))
    assert not any(map(runs, pids))


def test_logprobs_are_those_of_one_rank_while_adapters_come_and_go(
    model: str, versions: list[Version], parallel: Engine
) -> None:
    digests = [None, *(v.digest for v in versions)] * 3
    alone = engine(model, 1, versions)
    wanted = answers(alone, digests)
    alone.close()
    before = parallel.report().evictions
    assert_same(answers(parallel, digests), wanted)
    assert parallel.report().evictions > before, "they all fit"
    first = {name: rows[:, 1:] for name, rows in wanted.items()}
    assert (first["r1"] - first["r6"]).abs().max() > 0.1, "the adapters hardly do anything"


def test_prompts_tell_what_they_tell_one_rank(
    model: str, versions: list[Version], parallel: Engine
) -> None:
    alone = engine(model, 1, versions)
    sampling = Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=2, embeds=True)
    told = []
    for each in (alone, parallel):
        for n, digest in enumerate([None, *(v.digest for v in versions)]):
            each.add(NewRequest(f"r{n}", PROMPTS[n % 4], sampling, digest))
        told.append({name: delta.prompt for name, (delta,) in drive(each).items()})
    alone.close()
    for name, wanted in told[0].items():
        assert wanted is not None and told[1][name] is not None
        assert_told_alike(told[1][name], wanted)


def test_drawn_tokens_are_those_of_one_rank(
    model: str, versions: list[Version], parallel: Engine
) -> None:
    """Only rank 0 samples. The other ranks continue from its tokens."""
    sampling = Sampling(max_tokens=12, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)
    alone = engine(model, 1, versions)
    texts = []
    for made in (alone, parallel):
        for n, version in enumerate(versions[:2]):
            made.add(NewRequest(f"r{n}", PROMPTS[n], sampling, version.digest))
        texts.append(
            {name: [d.tokens for d in deltas] for name, deltas in sorted(drive(made).items())}
        )
    assert texts[0] == texts[1]
    alone.close()


def test_an_image_takes_a_ranks_part_of_the_bytes(
    model: str, versions: list[Version], parallel: Engine
) -> None:
    whole = {v.digest: v.parameters * 4 for v in versions}
    held = {e.digest: e.bytes for e in parallel.adapter_states()}
    for digest, size in whole.items():
        assert size / 2 < held[digest] < size
    assert parallel.runner.shape.kv_heads == 1


def test_an_adapter_reloaded_and_a_name_pointed_elsewhere_while_others_run(
    model: str, versions: list[Version], parallel: Engine
) -> None:
    digests: list[str | None] = [v.digest for v in versions[:2]]
    alone = engine(model, 1, versions)
    wanted = answers(alone, [*digests, versions[2].digest, digests[0]])
    alone.close()
    parallel.add(NewRequest("beside", (5, 6), LONG))
    for n, digest in enumerate(digests):
        parallel.add(NewRequest(f"r{n}", PROMPTS[n], LOGGED, digest))
    got: dict[str, list[Delta]] = {}

    def go_on(until_ended: str) -> None:
        deadline = time.monotonic() + WORK_S
        while until_ended not in got or not got[until_ended][-1].last:
            assert time.monotonic() < deadline
            for delta in parallel.step():
                got.setdefault(delta.request_id, []).append(delta)
            parallel.scheduler.check()

    for delta in parallel.step():
        got.setdefault(delta.request_id, []).append(delta)
    # The name points at the third version. The first leaves when its requests have ended.
    assert digests[0] is not None
    parallel.forget(digests[0])
    parallel.add(NewRequest("r2", PROMPTS[2], LOGGED, versions[2].digest))
    go_on("r0")
    go_on("r2")
    parallel.register(versions[0], versions[0].uri)
    parallel.add(NewRequest("r3", PROMPTS[3], LOGGED, digests[0]))
    go_on("r3")
    go_on("r1")
    parallel.cancel("beside")
    drive(parallel)
    assert_same({name: logprobs(got[name]) for name in wanted}, wanted)


def test_an_adapter_that_one_rank_cannot_use_fails_on_all(
    model: str, versions: list[Version], parallel: Engine, tmp_path: Path
) -> None:
    """The value that is not finite is in rank 1's part."""
    path = make_adapter(tmp_path / "broken", model, rank=4, seed=9)
    name = "layers.2.self_attn.q_proj.lora_B.weight"
    (stored,) = [t for n, t in load_file(f"{path}/{TENSORS_FILE}").items() if n.endswith(name)]
    info = inspect(path, read_shape(model), rank_max=64)
    stored[-1, 0] = float("nan")  # after the check that would refuse it
    edit_tensors(path, TENSORS_FILE, **{name: stored})
    parallel.register(Version("broken", info.digest, path, 4, info.parameters), path)
    parallel.add(NewRequest("bad", PROMPTS[0], LOGGED, info.digest))
    parallel.add(NewRequest("ok", PROMPTS[0], LOGGED, versions[1].digest))
    got = drive(parallel)
    assert got["ok"][-1].error is None
    error = got["bad"][-1].error
    assert error is not None and error.status == 503
    assert "rank 1: " in error.message and "not finite" in error.message
    assert {e.tier for e in parallel.adapter_states() if e.digest == info.digest} == {Tier.FAILED}
    parallel.forget(info.digest)
    free = parallel.report().free_bytes
    held = sum(e.bytes for e in parallel.adapter_states() if e.tier is Tier.DEVICE)
    assert free == parallel.report().capacity_bytes - held, "its bytes are free again"


def test_an_image_in_host_memory_comes_back_without_its_files(
    model: str,
    versions: list[Version],
    parallel: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers, commands = parallel._workers, list[Command]()
    assert workers is not None
    tell = workers.tell
    monkeypatch.setattr(workers, "tell", lambda command: (commands.append(command), tell(command)))
    moved = Path(shutil.copytree(versions[1].uri, tmp_path / "moved"))
    digest = versions[1].digest
    for version in versions:
        parallel.forget(version.digest)
    drive(parallel)
    for version in (versions[0], versions[2], versions[3]):
        parallel.register(version, version.uri)
    parallel.register(versions[1], str(moved))
    first = answers(parallel, [digest])
    dropped = {command.digest for command in commands if isinstance(command, Drop)}
    assert dropped == {v.digest for v in versions}, "what was forgotten is kept nowhere"
    shutil.rmtree(moved)
    answers(parallel, [versions[2].digest, versions[3].digest])
    assert {e.tier for e in parallel.adapter_states() if e.digest == digest} == {Tier.HOST}
    assert_same(answers(parallel, [digest]), first)
    parallel.register(versions[1], versions[1].uri)


def test_no_token_of_a_wrong_adapter_under_churn(
    model: str, versions: list[Version], parallel: Engine
) -> None:
    rng = random.Random(3)
    alone = engine(model, 1, versions)
    digests: list[str | None] = [None, *(v.digest for v in versions)]
    expected = {}
    for digest in digests:
        for i, prompt in enumerate(PROMPTS):
            alone.add(NewRequest("r", prompt, LOGGED, digest))
            expected[digest, i] = logprobs(drive(alone)["r"])
    alone.close()
    asked, got = {}, {}
    for n in range(40):
        asked[f"r{n}"] = rng.choice(digests), rng.randrange(4)
        digest, i = asked[f"r{n}"]
        parallel.add(NewRequest(f"r{n}", PROMPTS[i], LOGGED, digest))
        if rng.random() < 0.15:
            victim = rng.choice(sorted(asked))
            parallel.cancel(victim)
        for _ in range(rng.randrange(3)):
            for delta in parallel.step():
                got.setdefault(delta.request_id, []).append(delta)
            parallel.scheduler.check()
    for name, deltas in drive(parallel).items():
        got.setdefault(name, []).extend(deltas)
    assert len(got) > 30
    for name, deltas in got.items():
        rows = logprobs(deltas)
        assert (rows - expected[asked[name]][: len(rows)]).abs().max() <= TOLERANCE, name


def test_an_image_that_slid_is_used_where_it_lies_now(
    model: str, versions: list[Version], parallel: Engine
) -> None:
    """Runs after the other tests, because it changes the device without the scheduler."""
    for version in versions:
        parallel.forget(version.digest)
    parallel.step()
    with closing(engine(model, 1, versions)) as alone:
        wanted = answers(alone, [versions[1].digest])["r0"][0]
    arena = parallel.runner.arena

    def bring(version: Version, slot: int, offset: int) -> int:
        parallel.register(version, version.uri)
        (size,) = [e.bytes for e in parallel.adapter_states() if e.digest == version.digest]
        load = Load(version.digest, version.uri, slot, offset, size, Tier.DISK)
        ended = parallel._loader.run(load, None, False)
        assert ended.layout is not None, ended.error
        arena.place(slot, offset, ended.layout)
        return size

    before = bring(versions[0], 1, 0)
    size = bring(versions[1], 2, before)
    arena.clear(1)
    arena.slide(2, before, 0, size)
    bring(versions[2], 1, size)  # where a part of it lay
    (sampled,) = parallel.runner.run([Row(PROMPTS[0], 0, range(2), 2, LOGGED, 0, 0)])
    assert sampled is not None and sampled.logprobs is not None
    found = torch.tensor([value for _, value in sorted(sampled.logprobs.top)])
    assert (found - wanted[1:]).abs().max() <= TOLERANCE
    arena.clear(1)
    arena.clear(2)


def test_a_model_that_ranks_cannot_share_is_refused_before_anything_starts(model: str) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel: 3 ranks"):
        engine(model, 3, [])


async def test_a_model_that_cannot_be_loaded_ends_the_start(model: str, tmp_path: Path) -> None:
    """Whichever rank fails first, no rank waits without end."""
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    (broken / "model.safetensors").unlink()
    link = EngineLink(EngineConfig(str(broken), device="cpu", threads=1, tensor_parallel=2))
    with pytest.raises(StartupError, match=r"no model\.safetensors"):
        await link.start()
    await link.stop()


def runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


async def test_a_killed_rank_fails_what_the_engine_runs_and_all_ranks_start_again(
    model: str,
) -> None:
    settings = {"device": "cpu", "threads": 1, "kv_memory": 2**24}
    link = EngineLink(EngineConfig(model, tensor_parallel=2, **settings))  # type: ignore[arg-type]
    await link.start()
    pid = link.pid
    assert pid is not None
    (worker,) = children(pid)
    stream = link.generate(NewRequest("r", (5, 6), ENDLESS))
    assert (await anext(stream)).tokens
    os.kill(worker, signal.SIGKILL)
    last = [delta async for delta in stream][-1]
    assert isinstance(last.error, EngineFailed)
    assert "rank 1 of 2 ended by signal 9" in last.error.message
    assert not runs(pid)
    await until(lambda: link.report().stalled == 0, WORK_S)
    os.kill(children(link.pid or 0)[0], signal.SIGKILL)  # of an idle engine
    await until(lambda: link.report().stalled == 1)
    await link.stop()


async def test_a_stopped_rank_is_a_hang_and_none_of_the_ranks_outlives_it(model: str) -> None:
    settings = {"device": "cpu", "threads": 1, "kv_memory": 2**24, "hang_s": 2.0}
    link = EngineLink(EngineConfig(model, tensor_parallel=2, **settings))  # type: ignore[arg-type]
    await link.start()
    pid = link.pid
    assert pid is not None
    processes = [pid, *children(pid)]
    stream = link.generate(NewRequest("r", (5, 6), ENDLESS))
    while link.report().steps < 5:  # so that what a step takes is known
        assert (await anext(stream)).tokens
    os.kill(processes[1], signal.SIGSTOP)
    last = [delta async for delta in stream][-1]
    assert last.error is not None and "has not moved" in last.error.message
    await until(lambda: not any(map(runs, processes)))
    await link.stop()


def test_ranks_die_with_the_process_that_started_the_engine(model: str) -> None:
    script = f"""
import asyncio, sys
from cluster.config import EngineConfig
from replica.engine.link import EngineLink
link = EngineLink(EngineConfig({model!r}, device="cpu", threads=1, tensor_parallel=2))
asyncio.run(link.start())
print(link.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        processes = [pid, *children(pid)]
        assert len(processes) == 2 and all(map(runs, processes))
        parent.kill()
    until_now(lambda: not any(map(runs, processes)))


def test_a_rank_dies_with_rank_0_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lifeline's socket ends the worker. Here the worker waits for its first command."""
    monkeypatch.setattr(tensor_parallel, "_STOP_S", TIMEOUT_S)  # it may still be importing torch
    process = _Process(1)
    assert runs(process.pid)
    process.end()
    assert not runs(process.pid)
    assert process._popen.returncode == 0, "it had to be killed"


def test_an_engine_that_waits_for_a_lost_rank_for_ever_ends(model: str) -> None:
    """A kernel of a collective operation cannot be interrupted, so the process must end."""
    script = f"""
import os, signal, time
from cluster.config import EngineConfig
from replica.engine import tensor_parallel
from replica.model.shape import read_shape
tensor_parallel._STUCK_S = 0.1
config = EngineConfig({model!r}, device="cpu", threads=1, tensor_parallel=2)
runner, workers = tensor_parallel.start_ranks(config, read_shape(config.model), lambda: None)
with workers.together():
    os.kill(workers.pids[0], signal.SIGKILL)
    time.sleep(3600)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=WORK_S
    )
    assert done.returncode == 1
    assert "rank 1 of 2 ended by signal 9" in done.stderr.splitlines()[-1]
