"""The boundary of the core: pure files stay pure, and imports point one way."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.until import WORK_S

ROOT = Path(__file__).parents[2]
ROOMS = ("cluster", "replica", "router", "kernels/lora_kernels")

SHELLS = frozenset(
    {
        # Files that may do I/O, start threads, read a clock, or import what does.
        "lorafleet",
        "cluster.catalog",
        "cluster.publisher",
        "cluster.redis_client",
        "cluster.redis_server",
        "cluster.registry",
        "cluster.store",
        "replica.actor",
        "replica.adapter_files",
        "replica.alone",
        "replica.arena",
        "replica.asgi",
        "replica.bench",
        "replica.call",
        "replica.completion",
        "replica.decoder",
        "replica.engine",
        "replica.engine_process",
        "replica.follower",
        "replica.front",
        "replica.gather_executor",
        "replica.graphs",
        "replica.host_pool",
        "replica.image",
        "replica.largest_step",
        "replica.link",
        "replica.loader",
        "replica.membership",
        "replica.node",
        "replica.openai_protocol",
        "replica.orders",
        "replica.page_memory",
        "replica.paged_batch",
        "replica.paged_decoder",
        "replica.paged_executor",
        "replica.ranks",
        "replica.replay",
        "replica.runner",
        "replica.safetensors_header",
        "replica.sampling",
        "replica.server",
        "replica.settings",
        "replica.settling",
        "replica.standalone",
        "replica.streams",
        "replica.tensor_parallel",
        "replica.text",
        "replica.toys",
        "replica.validation",
        "replica.weights",
        "replica.wire",
        "router.affinity",
        "router.app",
        "router.environment",
        "router.ingress",
        "router.local",
        "lora_kernels.attention",
        "lora_kernels.attention_kernels",
        "lora_kernels.delta_kernels",
        "lora_kernels.device_tables",
        "lora_kernels.host_reads",
        "lora_kernels.fused",
        "lora_kernels.launching",
        "lora_kernels.lora",
        "lora_kernels.matmuls",
        "lora_kernels.ops",
        "lora_kernels.reference",
        "lora_kernels.tiles",
    }
)
IMPURE = frozenset({"asyncio", "ray", "redis", "socket", "threading", "time", "torch", "triton"})
BELOW = {
    "lora_kernels": {"lora_kernels"},
    "cluster": {"cluster"},
    "replica": {"replica", "cluster", "lora_kernels"},
    "router": {"router", "replica", "cluster", "lora_kernels"},
}
ENGINE_SIDE = """
    cluster.values cluster.errors cluster.config replica.request replica.scheduler
    replica.residency replica.pages replica.engine replica.engine_process replica.link
    replica.shape replica.weights replica.decoder replica.gather_executor
    replica.paged_executor replica.runner replica.sampling replica.image
    replica.arena replica.follower replica.adapter_files lora_kernels.reference lora_kernels.ops
""".split()  # noqa: SIM905


def modules() -> dict[str, Path]:
    found = {"lorafleet": ROOT / "lorafleet.py"}
    for room in ROOMS:
        for path in sorted((ROOT / room).glob("*.py")):
            if path.stem != "__init__":
                found[f"{Path(room).name}.{path.stem}"] = path
    return found


MODULES = modules()
CORE = sorted(MODULES.keys() - SHELLS)


def imports(path: Path) -> Iterator[str]:
    """Top-level packages, wherever in the file they are imported, also only for types."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module.partition(".")[0]


def loaded_by(names: list[str], suspects: set[str]) -> set[str]:
    """Which of `suspects` a fresh interpreter has in sys.modules after importing `names`."""
    code = f"import sys\nfor name in {names}: __import__(name)\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=WORK_S
    )
    assert done.returncode == 0, done.stderr
    return suspects & set(done.stdout.split())


def test_the_list_of_shells_is_not_stale() -> None:
    """A core file must not hide among the shells, nor a shell that is gone stay listed."""
    later = {"cluster.store", "lora_kernels.fused"}
    assert SHELLS - MODULES.keys() <= later


@pytest.mark.parametrize("name", CORE)
def test_a_core_file_imports_nothing_impure(name: str) -> None:
    assert not IMPURE & set(imports(MODULES[name]))


def test_the_core_as_a_whole_loads_nothing_impure() -> None:
    # The standard library itself loads time and threading; what counts is what is heavy or acts.
    assert not loaded_by(CORE, set(IMPURE - {"time", "threading"}))


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"lorafleet"}))
def test_imports_point_one_way(name: str) -> None:
    ours = {"lorafleet", "tests", *BELOW} & set(imports(MODULES[name]))
    assert ours <= BELOW[name.partition(".")[0]]


def test_the_engine_runs_without_the_servers_libraries() -> None:
    refused = {"ray", "redis", "pydantic", "fastapi", "starlette"}
    assert not loaded_by([name for name in ENGINE_SIDE if name in MODULES], refused)


def test_package_inits_are_empty() -> None:
    for room in ROOMS:
        assert not (ROOT / room / "__init__.py").read_text().strip()
    assert not (ROOT / "kernels" / "__init__.py").exists()
