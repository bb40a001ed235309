"""Reading a machine's memory limit, and whether its CPU computes bfloat16."""

from pathlib import Path

import pytest

from replica.engine.node import read_node

GIB = 2**30
UNLIMITED_V1 = 9223372036854771712


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 64 GiB, 40 of them free, no cgroup and an old CPU."""
    write(tmp_path, "proc/meminfo", f"MemTotal: {64 * 2**20} kB\nMemAvailable: {40 * 2**20} kB\n")
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu avx2 avx512f\n")
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def gib(root: Path) -> tuple[float, float]:
    node = read_node(str(root), {})
    return node.memory / GIB, node.free / GIB


def test_without_a_cgroup_it_is_the_machines_memory(root: Path) -> None:
    assert gib(root) == (64, 40)


def test_what_is_free_is_at_most_the_limit(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/fs/cgroup/memory.max", f"{48 * GIB}\n")
    assert gib(root) == (48, 40)
    write(root, "sys/fs/cgroup/memory.max", f"{4 * GIB}\n")
    assert gib(root) == (4, 4)


@pytest.mark.parametrize("text", ["max\n", "\n", f"{UNLIMITED_V1}\n"])
def test_a_group_without_a_limit_is_none(root: Path, text: str) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/fs/cgroup/memory.max", text)
    assert gib(root) == (64, 40)


@pytest.mark.parametrize("folder", ["", "kubepods", "kubepods/pod1", "kubepods/pod1/main"])
def test_every_group_around_this_process_holds(root: Path, folder: str) -> None:
    write(root, "proc/self/cgroup", "0::/kubepods/pod1/main\n")
    for other in ("", "kubepods", "kubepods/pod1", "kubepods/pod1/main"):
        write(root, f"sys/fs/cgroup/{other}/memory.max", "max\n")
    write(root, f"sys/fs/cgroup/{folder}/memory.max", f"{2 * GIB}\n")
    write(root, "sys/fs/cgroup/kubepods/pod2/memory.max", f"{GIB}\n")
    assert gib(root) == (2, 2)


def test_version_1_has_its_own_files(root: Path) -> None:
    write(root, "proc/self/cgroup", "9:cpu,cpuacct:/a\n4:hugetlb,memory:/a/b\n0::/\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{UNLIMITED_V1}\n")
    write(root, "sys/fs/cgroup/memory/a/memory.limit_in_bytes", f"{6 * GIB}\n")
    write(root, "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", f"{UNLIMITED_V1}\n")
    assert gib(root) == (6, 6)


def test_in_a_container_the_path_may_be_the_hosts(root: Path) -> None:
    write(root, "proc/self/cgroup", "4:memory:/docker/0123\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{3 * GIB}\n")
    assert gib(root) == (3, 3)


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd svebf16 bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw avx_vnni avx_ne_convert\n", False),
        ("Features\t: fp asimd\n", False),
        ("model name\t: one with avx512_bf16\nflags\t: fpu\n", False),
        ("", False),
    ],
)
def test_bf16_is_what_the_processor_has_instructions_for(
    root: Path, cpuinfo: str, native: bool
) -> None:
    write(root, "proc/cpuinfo", cpuinfo)
    assert read_node(str(root), {}).bf16 is native


@pytest.mark.parametrize(
    ("environment", "native"),
    [
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, False),
        ({"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, False),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, False),
        ({"ATEN_CPU_CAPABILITY": "default"}, False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        ({"ONEDNN_MAX_CPU_ISA": "DEFAULT", "ATEN_CPU_CAPABILITY": "avx512"}, True),
    ],
)
def test_what_the_libraries_are_held_to_counts(
    root: Path, environment: dict[str, str], native: bool
) -> None:
    write(root, "proc/cpuinfo", "flags\t\t: avx2 avx512f avx512_bf16 amx_bf16\n")
    assert read_node(str(root), environment).bf16 is native


def test_this_machine_can_be_read() -> None:
    node = read_node()
    assert 2**27 < node.free <= node.memory
