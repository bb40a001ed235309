"""The pure parts of `tests/bench/gpu.py`: floors, figures, what is measured, what is printed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from replica.adapters.adapter_files import inspect
from replica.adapters.image import read_image
from replica.model.shape import ModelShape
from replica.simulation.cards import KV_TOKEN_BYTES, RANK_BYTES, WEIGHT_BYTES
from replica.simulation.upstream import TABLES
from tests.bench.on_gpu import floors, smoke, upstream
from tests.bench.on_gpu.cases import Case
from tests.bench.on_gpu.check_model import divergence
from tests.bench.on_gpu.figures import (
    covered_share,
    gaps,
    idle_share,
    medians,
    over,
)
from tests.bench.on_gpu.floors import Cost, Rates
from tests.bench.on_gpu.models import LLAMA_8B, TINY, Adapters, layout, write_model
from tests.bench.on_gpu.profiles import intervals, kernel_seconds
from tests.bench.on_gpu.report import Report
from tests.bench.on_gpu.setting import Setting
from tests.until import WORK_S

ROOT = Path(__file__).parents[3]
ON_GPU = sorted(path.stem for path in (ROOT / "tests/bench/on_gpu").glob("*.py"))
# They need Triton, which a CPU install may not have.
KERNELS = {"check", "check_attention", "check_fused", "check_lora", "decode", "probes"}
KERNELS |= {"small_copies", "times"}
REFUSED = [
    "ray",
    "redis",
    "pydantic",
    "fastapi",
    "starlette",
    "uvicorn",
    "httpx",
    "orjson",
    "typer",
]
REFUSED += ["prometheus_client", "llguidance", "yaml", "pytest", "peft"]
BF16 = 2


@pytest.fixture
def llama(tmp_path: Path) -> ModelShape:
    return write_model(tmp_path / "llama", LLAMA_8B)


def test_floors_of_llama_8b_are_those_of_the_hardware_arithmetic(llama: ModelShape) -> None:
    assert floors.streamed_parameters(llama) * BF16 == pytest.approx(WEIGHT_BYTES, rel=0.01)
    assert floors.kv_token_bytes(llama, BF16) == KV_TOKEN_BYTES
    assert floors.image_bytes(llama, 16, BF16) == pytest.approx(16 * RANK_BYTES, rel=0.01)


@pytest.mark.parametrize(("ranks", "percent"), [([16] * 8, 2.8), ([64] * 8, 11.4)])
def test_what_adapters_add_to_a_decode_step(
    llama: ModelShape, ranks: list[int], percent: float
) -> None:
    share = floors.lora_share(llama, BF16, [1024] * 64, ranks)
    assert share * 100 == pytest.approx(percent, abs=0.1)


def test_a_prefill_computes_two_operations_a_parameter_and_token(llama: ModelShape) -> None:
    cost = floors.matmul_cost(llama, BF16, 2048, 1)
    assert cost.flop == pytest.approx(2 * 2048 * 6.98e9, rel=0.01)


def test_decode_attention_reads_each_key_once_and_prefill_sees_half(llama: ModelShape) -> None:
    layer = floors.kv_token_bytes(llama, BF16) // llama.layers
    decode = floors.attention_cost(llama, BF16, [(1, 1024)] * 64)
    queries = 64 * 2 * llama.heads * llama.head_dim * BF16
    assert decode.bytes == 64 * 1024 * layer + queries
    assert decode.flop == 64 * 4 * 1024 * llama.heads * llama.head_dim
    whole = floors.attention_cost(llama, BF16, [(2048, 2048)], causal=False)
    half = floors.attention_cost(llama, BF16, [(2048, 2048)])
    assert half.flop / whole.flop == pytest.approx(0.5, rel=1e-3)


def test_lora_reads_each_adapter_once_and_y_twice() -> None:
    group = [(64, 32), (64, 16)]
    cost = floors.lora_cost(group, [(8, 3), (4, 1)], BF16)
    weights = (8 + 4) * (64 + 32 + 64 + 16)
    assert cost.bytes == BF16 * (weights + (3 + 1) * (64 + 2 * 48))
    assert cost.flop == 2 * (3 * 8 + 1 * 4) * (64 + 32 + 64 + 16)


def test_the_larger_of_two_times_is_the_floor() -> None:
    rates = Rates(
        bytes_per_s=100.0, read_bytes_per_s=120.0, flop_per_s=1000.0, copy_in_bytes_per_s=1.0
    )
    assert Cost(50, 100).floor_s(rates) == 0.5
    assert Cost(50, 100).bound_by(rates) == "bytes"
    assert Cost(50, 2000).floor_s(rates) == 2.0
    assert Cost(50, 2000).bound_by(rates) == "flop"


def test_idle_is_what_no_batch_covers() -> None:
    busy = [(0.0, 1.0), (0.1, 0.2), (0.5, 2.0), (3.0, 4.0), (9.0, 20.0)]
    assert idle_share(busy, 0.0, 10.0) == pytest.approx(0.6)
    assert idle_share([], 0.0, 1.0) == 1.0
    assert gaps(busy) == [1.0, 5.0]


def test_what_ran_under_what_is_read_from_a_profile() -> None:
    def event(
        category: str, ts: float, dur: float, name: str = "", **args: int
    ) -> dict[str, object]:
        return {"cat": category, "ts": ts * 1e6, "dur": dur * 1e6, "name": name, "args": args}

    trace = {
        "traceEvents": [
            event("kernel", 0, 2, name="_shrink"),
            event("kernel", 1, 2, name="_expand"),
            event("kernel", 9, 1, name="_shrink"),
            event("gpu_memcpy", 1, 4, bytes=2**30),
            event("gpu_memcpy", 7, 1, bytes=64),
            {"name": "a mark without a time"},
        ]
    }
    copies = intervals(trace, "gpu_memcpy", bytes_min=2**20)
    assert copies == [(1.0, 5.0)]
    assert covered_share(copies, intervals(trace, "kernel")) == pytest.approx(0.5)
    assert kernel_seconds(trace) == [("_shrink", 3.0, 2), ("_expand", 2.0, 1)]


def test_ratios_are_taken_round_by_round() -> None:
    rounds = [{"base": 1.0, "lora": 1.1}, {"base": 2.0, "lora": 2.2}, {"base": 3.0, "lora": 9.0}]
    assert over(rounds, "lora", "base") == pytest.approx(0.1)
    assert medians(rounds) == {"base": 2.0, "lora": 2.2}


def test_tokens_after_the_first_that_differs_are_not_compared() -> None:
    assert divergence([[1, 2, 3], [4, 5, 6]], [[1, 9, 9], [4, 5, 6]]) == (5, 1)


def test_adapters_of_a_rank_share_their_tensors_and_not_their_digests(tmp_path: Path) -> None:
    shape = write_model(tmp_path / "model", TINY)
    adapters = Adapters(tmp_path, shape, torch.float32, torch.device("cpu"))
    versions = adapters.versions({"a": 2, "b": 2, "c": 4})
    assert len({version.digest for version in versions.values()}) == 3
    a, b = (Path(versions[name].uri) / "adapter_model.safetensors" for name in "ab")
    assert os.path.samefile(a, b)
    assert inspect(versions["b"].uri, shape, 2).digest == versions["b"].digest
    sizes = {n: v.parameters * 4 for n, v in versions.items()}
    assert sizes == {n: floors.image_bytes(shape, r, 4) for n, r in (("a", 2), ("b", 2), ("c", 4))}


def test_a_made_up_layout_is_that_of_an_image(tmp_path: Path) -> None:
    shape = write_model(tmp_path / "model", {**TINY, "num_hidden_layers": 2})
    adapters = Adapters(tmp_path, shape, torch.float32, torch.device("cpu"))
    image = read_image(adapters.versions({"a": 2})["a"].uri, shape, torch.float32)
    made, elements = layout(shape, 2)
    assert elements == len(image.flat)
    for name in ("a_offset", "b_offset", "rank", "scale"):
        found, wanted = getattr(made, name), getattr(image.layout, name)
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", upstream.NAMES)
def test_the_workloads_are_replayed_as_published(name: str) -> None:
    table = TABLES[name]
    assert upstream.FULL.table(table) == table
    assert set(upstream.GOALS.get(name, {})) <= {stream.name for stream in table.streams}
    small = upstream.TINY.table(table)
    assert len(small.ranks) > small.places >= 1
    assert {a for stream in small.streams for a in stream.adapters} == set(small.ranks)


def test_a_report_is_written_as_it_comes_and_ends_in_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    report = Report(tmp_path, told.append)
    report.add("decode", "step", 1.2, " ×", most=1.35, beside="5 ms", rounds=[1, 2])
    report.add("decode", "other", float("nan"), "%", most=5)
    report.add("decode", "detail", 1e-5, short=False)
    try:
        raise ValueError("broken")
    except ValueError as error:
        report.failed("time", "attention", error)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line.get("holds") for line in lines] == [True, False, None, None]
    assert "ValueError: broken" in lines[3]["error"]
    report.finish(["a card"])
    printed = capsys.readouterr().out
    assert "ok ≤ 1.35 ×" in printed and "MISSED ≤ 5%" in printed
    assert "1 of 2 goals held" in printed and "FAILED or left out: time attention" in printed
    assert "detail" not in printed and "detail" in (tmp_path / "table.md").read_text()


def test_what_fails_is_said_and_the_rest_has_its_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = Setting(torch.device("cpu"), True, tmp_path, Report(None))

    def fails() -> int:
        raise RuntimeError("illegal memory access")

    assert setting.attempt("decode", "LoRA", fails) is None
    assert setting.attempt("decode", "prefill", lambda: 7) == 7
    setting.until_s = 0.0
    assert setting.attempt("decode", "profile", lambda: 7) is None
    assert setting.report.failures == [
        ("decode", "LoRA: RuntimeError: illegal memory access"),
        ("decode", "profile: not measured, the section's time was used up"),
    ]
    assert "Traceback" in capsys.readouterr().out


def test_a_check_that_raises_leaves_what_came_before_it(tmp_path: Path) -> None:
    check = pytest.importorskip("tests.bench.on_gpu.check", reason="Triton is not installed")
    right = Case("right", lambda: torch.ones(2), lambda: torch.ones(2))
    wrong = Case("wrong", lambda: torch.ones(2), lambda: torch.zeros(3))
    report = Report(None, lambda text: None)
    setting = Setting(torch.device("cpu"), True, tmp_path, report)
    setting.attempt("check", "kernel", lambda: check._check(setting, "kernel", [right, wrong], 0.1))
    assert [f.what for f in report.findings] == [
        "kernel, right",
        "kernel, worst relative error",
    ]
    assert len(report.failures) == 1


PROBE = """
import json, os, sys, time
name, out = sys.argv[sys.argv.index("--probe") + 1], sys.argv[sys.argv.index("--out") + 1]
print(f"[   0.1 s] smoke {name} has begun", flush=True)
if name == "prefill":
    time.sleep(600)
if name == "fetch":
    os._exit(3)
if name == "lock":
    os.abort()
with open(out + "/smoke.jsonl", "a") as file:
    file.write(json.dumps({"name": name, "ok": True, "seconds": 0.1, "found": ["all"]}) + "\\n")
"""


def test_a_probe_that_hangs_or_dies_leaves_a_line_and_the_others_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hangs(probe: Any, seconds: float) -> bool:
        return probe.name == "prefill" and "has begun" in probe.log.read_text()

    monkeypatch.setattr(smoke, "_late", hangs)
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    smoke.run([sys.executable, str(script)], tmp_path / "out", 3.0, at_once=4)
    written = (tmp_path / "out" / "smoke.jsonl").read_text().splitlines()
    lines = {line["name"]: line for line in map(json.loads, written)}
    assert set(lines) == set(smoke.PROBES) and len(written) == len(lines)
    failed = {name: line["error"] for name, line in lines.items() if "error" in line}
    assert {name: error.splitlines()[0] for name, error in failed.items()} == {
        "prefill": "killed after 3 s",
        "fetch": "ended with status 3",
        "lock": "ended with status -6",
    }
    assert lines["prefill"]["found"] == ["[   0.1 s] smoke prefill has begun"]
    printed = capsys.readouterr().out
    assert "FAILED prefill" in printed and "smoke: 11 of 14 without a fault" in printed


def test_every_probe_is_one_that_a_process_knows() -> None:
    probes = pytest.importorskip("tests.bench.on_gpu.probes", reason="Triton is not installed")
    assert set(probes._PROBES) == set(smoke.PROBES)
    assert set(smoke.PROBES) > probes._ON_CUDA


def test_the_parts_of_the_bench_end_within_ten_minutes_and_all_begins_with_what_is_worth_most() -> (
    None
):
    script = (ROOT / "tests/bench/gpu.sh").read_text()
    parts = dict(re.findall(r'^(\S+)\) names="(.*)" ;;$', script, re.MULTILINE))
    limits = {
        name: int(seconds)
        for name, seconds in re.findall(r"^ +(\S+)\) echo (\d+) ;;$", script, re.MULTILINE)
    }
    everything = parts.pop("all").split()
    assert everything[:3] == ["smoke", "decode", "17913"]
    assert sorted(everything) == sorted(name for name in limits if name != "*")
    assert set(parts) == {"kernels", "steps", "upstream-1", "upstream-2"}
    # Those that are killed have 15 s more.
    for names in parts.values():
        assert sum(limits[name] + 15 for name in names.split()) <= 570
    assert {*upstream.NAMES, "decode", "trace", "time", "check"} < set(limits)
    checked = " ".join(re.findall(r'families="(.*)"', script)).replace("$families ", "").split()
    check = pytest.importorskip("tests.bench.on_gpu.check", reason="Triton is not installed")
    assert sorted(checked) == sorted([*check.FAMILIES, check.ENGINE])


def test_the_bench_imports_nothing_of_the_servers() -> None:
    """What is not on the GPU machine, or not under the name that we know."""
    triton = importlib.util.find_spec("triton") is not None
    names = [name for name in ON_GPU if triton or name not in KERNELS]
    modules = [f"tests.bench.on_gpu.{name}" for name in names]
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {REFUSED}:
            raise ImportError(f"{{name}} is not on the GPU machine")
sys.meta_path.insert(0, Refuse())
for name in {modules}: __import__(name)
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        timeout=WORK_S,
    )
    assert done.returncode == 0, done.stderr
