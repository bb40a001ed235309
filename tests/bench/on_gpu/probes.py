"""What each process of the smoke run looks at; see `smoke.py`."""

import faulthandler
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch

from lora_kernels import fused, lora
from lora_kernels.host_reads import fetch
from replica.adapters.host_pool import locked_pool
from replica.adapters.streams import CopyStream
from replica.engine.runner import Runner
from replica.model import graphs
from replica.model.launch import Row
from replica.model.paged_batch import HostBuffers
from replica.model.paged_executor import PagedExecutor
from tests.bench.on_gpu import check, decode
from tests.bench.on_gpu.cases import relative
from tests.bench.on_gpu.figures import median
from tests.bench.on_gpu.models import layout
from tests.bench.on_gpu.profiles import intervals, kernel_seconds, profiled
from tests.bench.on_gpu.setting import Setting
from tests.bench.on_gpu.smoke import append
from tests.bench.on_gpu.timing import host_s

SECTION = "smoke"
GiB = 2**30
# Of a runner's logits, captured and not: grids differ, and with them the order of sums.
_ALIKE = 1e-2
_SIZES = decode.Sizes(
    rows=(1, 64),
    lora_rows=64,
    context=64,
    adapters={decode.GOAL_LORA: (16,) * 8},
    prefills=((1, 512),),
    chunk=128,
    rounds=1,
    steps=10,
)
_TINY_SIZES = decode.TINY
_TRACE_LINES = 12


def run(name: str, setting: Setting, heading: Sequence[str]) -> None:
    faulthandler.enable()
    start_s = time.monotonic()
    report, found = setting.report, [*heading] if name == "versions" else []
    assert report.out is not None
    if setting.device.type != "cuda" and name in _ON_CUDA:
        found.append("skipped: needs CUDA")
    else:
        setting.attempt(SECTION, name, partial(_PROBES[name], setting))
    shown = [finding for finding in report.findings if finding.short or finding.holds is False]
    found += [" ".join(filter(None, finding.cells()[1:])) for finding in shown]
    # What fails everywhere for one reason is told once.
    traces = [trace.strip().splitlines() for trace in report.traces]
    ends = list({lines[-1]: "\n".join(lines[-_TRACE_LINES:]) for lines in traces}.values())
    found += [f"FAILED {what}" for _, what in report.failures if ": not measured" not in what]
    line = {
        "name": name,
        "ok": not report.traces and all(finding.holds is not False for finding in shown),
        "seconds": round(time.monotonic() - start_s, 1),
        "found": found + [what for _, what in report.failures if ": not measured" in what],
    }
    append(report.out / "smoke.jsonl", line | ({"error": "\n".join(ends)} if ends else {}))


def _versions(setting: Setting) -> None:
    def tell(what: str, value: float, unit: str = "", beside: object = "") -> None:
        setting.report.add(SECTION, what, value, unit, beside=str(beside))

    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    tell("CPUs", os.cpu_count() or 0, beside=f"Python {sys.version.split()[0]}")
    tell("memory", memory / GiB, " GiB", f"/dev/shm {free / GiB:.0f} GiB, may lock {locked}")
    if setting.device.type != "cuda":
        return
    card = torch.cuda.get_device_properties(setting.device)
    tell("card's memory", card.total_memory / GiB, " GiB", card)
    query = "name,driver_version,clocks.sm,clocks.mem,power.limit,memory.used"
    asked = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout
    tell("nvidia-smi", 1, beside=told.strip())


def _kernels(setting: Setting, *families: str) -> None:
    setting.kernels = families
    setting.dtypes = ("float16",) if setting.tiny else ("bfloat16",)
    check.run(setting)


def _fetch(setting: Setting) -> None:
    device = setting.device
    for count in (1, 1000, 2**14):
        source = torch.randint(0, 2**31 - 1, (count,), dtype=torch.int32)
        source = source.pin_memory() if device.type == "cuda" else source
        target = torch.zeros(count, dtype=torch.int32, device=device)
        fetch(target, source)
        assert torch.equal(target.cpu(), source), f"{count} numbers were not all fetched"
        took_s = median([host_s(lambda t=target, s=source: fetch(t, s)) for _ in range(10)])
        setting.report.add(SECTION, f"{count} numbers fetched", took_s * 1e6, " µs")
    buffers = HostBuffers(device)
    targets = [torch.zeros(size, dtype=torch.int32, device=device) for size in (3, 40, 3, 2000)]
    for number, target in enumerate(targets):
        buffers.next(len(target)).fill_(number)
        buffers.bring(target)
    wrong = [n for n, target in enumerate(targets) if not (target == n).all()]
    setting.report.add(SECTION, "wrong steps of four in turn", len(wrong), most=0)


def _lock(setting: Setting) -> None:
    for size in (GiB, 24 * GiB):
        setting.attempt(SECTION, f"{size // GiB} GiB", partial(_lock_size, setting, size))


def _lock_size(setting: Setting, size: int) -> None:
    start_s = time.monotonic()
    pool = locked_pool(size, setting.device)
    took_s = time.monotonic() - start_s
    given = 0 if pool is None else pool.size
    what = f"of {size // GiB} GiB page-locked"
    setting.report.add(SECTION, what, given / GiB, " GiB", beside=f"in {took_s:.1f} s")
    piece = None if pool is None else pool.take(GiB // 2)
    assert piece is not None, "nothing was locked"
    target = torch.empty_like(piece.memory, device=setting.device)
    copy_s = _synchronized_s(lambda: target.copy_(piece.memory, non_blocking=True))
    setting.report.add(SECTION, f"copied in from {what}", len(target) / copy_s / 1e9, " GB/s")


def _synchronized_s(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start_s


def _model(setting: Setting) -> tuple[PagedExecutor, dict[str, list[Row]]]:
    """A few layers, not captured; and what it is to compute: rows × base and LoRA."""
    sizes = _TINY_SIZES if setting.tiny else _SIZES
    _, elements = layout(setting.shape, sum(map(sum, sizes.adapters.values())))
    config = setting.config(
        adapter_memory=elements * setting.itemsize + 2**16,
        kv_memory=2**21 if setting.tiny else GiB // 2,
        host_memory=0,
        directory_slots=16,
        batch_rows_max=max(sizes.rows),
        step_tokens_max=sizes.tokens,
        context_tokens_max=sizes.tokens + 64,
        cuda_graphs=False,
    )
    # Compiles more than there is time for, and what is computed here compiles what it needs.
    PagedExecutor.warm = lambda self: None  # type: ignore[method-assign]
    runner = Runner(config, setting.shape)
    slots = decode.place_adapters(runner, setting, sizes)[decode.GOAL_LORA]
    batches = {
        f"{count} {name}": decode.decoding(setting, sizes, count, own)
        for count, (name, own) in product(sizes.rows, (("base", [0]), ("LoRA", slots)))
    }
    executor = runner._executor
    assert isinstance(executor, PagedExecutor)
    # Every page holds something, as if contexts had been computed.
    executor.cache.normal_(0, 0.5)
    for name, own in (("base", [0]), ("LoRA", slots)):
        page = len(executor.cache) - 1 - -(-sizes.chunk // 16)
        prompt = decode.prompts_of(setting, 1, sizes.chunk, own, page)
        batches[f"prompt {name}"] = prompt
        batches[f"mixed {name}"] = [*batches[f"{sizes.rows[0]} {name}"], *prompt]
    return executor, batches


@torch.inference_mode()
def _logits(executor: PagedExecutor, rows: Sequence[Row]) -> torch.Tensor:
    found = executor.logits(rows).float().cpu()
    assert bool(found.isfinite().all()), "not all logits are finite"
    return found


def _compare(
    setting: Setting,
    what: str,
    executor: PagedExecutor,
    rows: Sequence[Row],
    wanted: dict[str, torch.Tensor],
    key: str,
) -> None:
    """With what was found first under the key."""
    start_s = time.perf_counter()
    found = _logits(executor, rows)
    took_s = time.perf_counter() - start_s
    error = relative(found, wanted.setdefault(key, found))
    if setting.device.type == "cuda":  # the first one had kernels to compile
        took_s = median([host_s(partial(_logits, executor, rows)) for _ in range(3)])
    setting.report.add(SECTION, what, error, most=_ALIKE, beside=f"{took_s * 1e3:.2f} ms")


def _eager(setting: Setting) -> None:
    executor, batches = _model(setting)
    lora.HOST_BOUND_ROWS = 0  # few as the rows are, shrinks are to be beside
    wanted: dict[str, torch.Tensor] = {}
    for overlap, (name, rows) in product((False, True), batches.items()):
        executor._lora.overlap = overlap
        what = f"{name}, shrink {'beside' if overlap else 'in line'}"
        compare = partial(_compare, setting, what, executor, rows, wanted, name)
        setting.attempt(SECTION, what, compare)


def _captured(setting: Setting, overlap: bool) -> None:
    executor, batches = _model(setting)
    sizes = _TINY_SIZES if setting.tiny else _SIZES
    executor._lora.overlap = overlap
    # What has a prompt is never captured.
    batches = {name: rows for name, rows in batches.items() if name[0].isdigit()}
    wanted: dict[str, torch.Tensor] = {}
    for name, rows in batches.items():
        compare = partial(_compare, setting, f"{name}, eager", executor, rows, wanted, name)
        setting.attempt(SECTION, f"{name}, eager", compare)

    def capture() -> bool:
        on_gpu = setting.device.type == "cuda"
        executor.capture(graphs.CudaCapture(setting.device) if on_gpu else graphs.keep)
        return True

    with decode.only(sizes.rows):
        if setting.attempt(SECTION, "capture", capture):
            for name, rows in batches.items():
                what = f"{name}, captured"
                compare = partial(_compare, setting, what, executor, rows, wanted, name)
                setting.attempt(SECTION, what, compare)
        if overlap:
            setting.attempt(SECTION, "as an engine starts", partial(_start, setting, executor))


def _start(setting: Setting, executor: PagedExecutor) -> None:
    with torch.inference_mode():
        fallback = graphs.capture_what_can_be(executor, setting.device)
    setting.report.add(SECTION, "captures that failed", fallback, most=0)


def _copies(setting: Setting) -> None:
    """Whether a copy runs under matmuls, from memory that is locked and that is not."""
    device = setting.device
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)

    def compute() -> None:
        for _ in range(200):
            torch.mm(a, b, out=out)

    compute()
    alone_s = _synchronized_s(compute)
    copies = CopyStream.on(device)
    source = torch.randint(0, 127, (GiB,), dtype=torch.int8)
    for locked in (False, True):
        source = source.pin_memory() if locked else source
        target = torch.zeros(GiB, dtype=torch.int8, device=device)
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        compute()
        copies.copy(target, source, [], locked).synchronize()
        copied_s = time.perf_counter() - start_s
        torch.cuda.synchronize()
        both_s = time.perf_counter() - start_s
        assert torch.equal(target.cpu(), source), "not all bytes have come"
        setting.report.add(
            SECTION,
            f"1 GiB copied under matmuls, {'' if locked else 'not '}page-locked",
            GiB / copied_s / 1e9,
            " GB/s",
            beside=f"both {both_s * 1e3:.0f} ms, matmuls alone {alone_s * 1e3:.0f}",
        )


def _profiler(setting: Setting) -> None:
    assert setting.report.out is not None
    x = torch.randn(64, 4096, dtype=setting.dtype, device=setting.device)
    weight = torch.randn(4096, dtype=setting.dtype, device=setting.device)

    def work() -> None:
        fused.rms_norm(x, weight, 1e-5)

    replay = graphs.CudaCapture(setting.device)(work)
    for name, run in (("launched", work), ("replayed", replay)):
        path = setting.report.out / f"smoke-{name}.json.gz"
        trace = profiled(lambda run=run: [run() for _ in range(5)] + [x.cpu()], path)
        kernels = sum(count for _, _, count in kernel_seconds(trace))
        copied = len(intervals(trace, "gpu_memcpy"))
        path.unlink()
        what = f"of 5 kernels {name}, not seen by the profiler"
        setting.report.add(SECTION, what, max(5 - kernels, 0), most=0, beside=f"{copied} copies")


_PROBES: Mapping[str, Callable[[Setting], None]] = {
    "versions": _versions,
    # Prefill's P operand in registers (triton #9433).
    "integers": lambda setting: _kernels(setting, "integers"),
    "prefill": lambda setting: _kernels(setting, "prefill"),
    "decode": lambda setting: _kernels(setting, "decode"),
    "lora": lambda setting: _kernels(setting, "lora-integers", "lora", "lora-replayed"),
    "fused": lambda setting: _kernels(setting, "norms", "rotary", "gated"),
    "sampling": lambda setting: _kernels(setting, "sampling"),
    "fetch": _fetch,
    "lock": _lock,
    "eager": _eager,
    "captured": lambda setting: _captured(setting, overlap=True),
    "captured-in-line": lambda setting: _captured(setting, overlap=False),
    "copies": _copies,
    "profiler": _profiler,
}
_ON_CUDA = frozenset({"lock", "copies", "profiler"})
