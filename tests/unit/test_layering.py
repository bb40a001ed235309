"""The boundary of the core: pure rooms stay pure, and imports point one way, without a circle."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.until import WORK_S

ROOT = Path(__file__).parents[2]
PACKAGES = {"cluster": "cluster", "replica": "replica", "router": "router"}
PACKAGES |= {"lora_kernels": "kernels/lora_kernels"}

# Room → what it may import of ours besides itself.
MAY_IMPORT = {
    "lora_kernels": set[str](),
    "cluster": set[str](),
    "replica.scheduling": {"cluster"},
    "replica.model": {"cluster", "lora_kernels", "replica.scheduling"},
    "replica.adapters": {"cluster", "lora_kernels", "replica.scheduling", "replica.model"},
    "replica.engine": {
        "cluster",
        "lora_kernels",
        "replica.scheduling",
        "replica.model",
        "replica.adapters",
    },
    "replica.api": {
        "cluster",
        "replica.scheduling",
        "replica.model.shape",
        "replica.model.tokenizer",
    },
    "replica.simulation": {"cluster", "replica.scheduling", "replica.model.shape"},
    "replica.serving": {"cluster", "lora_kernels", "replica"},
    "router": {"cluster", "lora_kernels", "replica"},
    "lorafleet": {"cluster", "replica", "router"},
}
PURE_ROOMS = {"replica.scheduling", "replica.simulation"}
# Elsewhere, the files that decide and do nothing.
PURE_FILES = {
    "cluster.config",
    "cluster.config_loader",
    "cluster.costs",
    "cluster.errors",
    "cluster.catalog_scripts",
    "cluster.recovery",
    "cluster.redis_address",
    "cluster.values",
    "cluster.versions",
    "lora_kernels.segments",
    "lora_kernels.tilings",
    "replica.engine.messages",
    "replica.engine.sizing",
    "replica.model.config_fields",
    "replica.model.families",
    "replica.model.launch",
    "replica.model.memory",
    "replica.model.quantization",
    "replica.model.shape",
    "router.policy",
    "router.view",
}
IMPURE = frozenset({"asyncio", "ray", "redis", "socket", "threading", "time", "torch", "triton"})
ENGINE_ROOMS = ("replica.scheduling", "replica.model", "replica.adapters", "replica.engine")


def modules() -> dict[str, Path]:
    found = {"lorafleet": ROOT / "lorafleet.py"}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.stem != "__init__":
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                found[".".join((package, *parts))] = path
    return found


MODULES = modules()


def room(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("replica.") else name.split(".")[0]


PURE = sorted(n for n in MODULES if room(n) in PURE_ROOMS or n in PURE_FILES)


def imports(path: Path) -> Iterator[str]:
    """Modules, wherever in the file they are imported, also only for types."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                of = f"{node.module}.{alias.name}"
                yield of if of in MODULES else node.module


def ours(name: str) -> set[str]:
    return {found for found in imports(MODULES[name]) if found in MODULES and found != name}


def loaded_by(names: list[str], suspects: set[str]) -> set[str]:
    """Which of `suspects` a fresh interpreter has in sys.modules after importing `names`."""
    code = f"import sys\nfor name in {names}: __import__(name)\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=WORK_S
    )
    assert done.returncode == 0, done.stderr
    return suspects & set(done.stdout.split())


def test_every_file_lies_in_a_room() -> None:
    assert {room(name) for name in MODULES} == MAY_IMPORT.keys()
    assert set(PURE) >= PURE_FILES, "a file is gone"


@pytest.mark.parametrize("name", PURE)
def test_a_pure_file_imports_nothing_impure(name: str) -> None:
    assert not IMPURE & {module.partition(".")[0] for module in imports(MODULES[name])}


def test_the_pure_files_as_a_whole_load_nothing_impure() -> None:
    # The standard library itself loads time and threading; what counts is what is heavy or acts.
    assert not loaded_by(PURE, set(IMPURE - {"time", "threading"}))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name: str) -> None:
    allowed = MAY_IMPORT[room(name)] | {room(name)}
    wrong = {
        found
        for found in ours(name)
        if not any(found == may or found.startswith(f"{may}.") for may in allowed)
    }
    assert not wrong
    assert not any(found.partition(".")[0] == "tests" for found in imports(MODULES[name]))


def test_no_imports_go_round_in_a_circle() -> None:
    TopologicalSorter({name: ours(name) for name in MODULES}).prepare()
    rooms: dict[str, set[str]] = {}
    for name in MODULES:
        # Others may import the shape of a model without the model.
        found = {room(n) for n in ours(name) if n != "replica.model.shape"}
        rooms.setdefault(room(name), set()).update(found - {room(name)})
    TopologicalSorter(rooms).prepare()


def test_the_engine_runs_without_the_servers_libraries() -> None:
    refused = {"ray", "redis", "pydantic", "fastapi", "starlette"}
    assert not loaded_by([name for name in MODULES if room(name) in ENGINE_ROOMS], refused)


def test_package_inits_are_empty() -> None:
    for folder in PACKAGES.values():
        for path in (ROOT / folder).rglob("__init__.py"):
            assert not path.read_text().strip()
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} is no package"
    assert not (ROOT / "kernels" / "__init__.py").exists()
