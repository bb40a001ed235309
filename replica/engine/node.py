"""This machine's memory, and whether its CPU computes bfloat16 natively."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Flags in /proc/cpuinfo (x86, Arm) for instructions that multiply bfloat16. Other flags, such as
# avx_ne_convert, stand for conversion only.
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# Values of oneDNN's and torch's ISA variables that exclude these instructions.
_ONEDNN_WITHOUT = frozenset({"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2"})
_ONEDNN_WITHOUT |= frozenset({"avx512_core", "avx512_core_vnni"})
_ATEN_WITHOUT = frozenset({"default", "avx2"})


@dataclass(frozen=True, slots=True)
class Node:
    """memory: bytes that processes may use here: the lowest cgroup limit, or all memory. free:
    bytes of them that are free now. bf16: the CPU computes bfloat16 natively.
    """

    memory: int
    free: int
    bf16: bool


def read_node(root: str = "/", environment: Mapping[str, str] = os.environ) -> Node:
    """root: directory that has /proc and /sys."""
    found = dict(_meminfo(Path(root, "proc/meminfo")))
    memory = min([found["MemTotal"], *_cgroup_limits(Path(root))])
    free = min(memory, found.get("MemAvailable", memory))
    return Node(memory, free, _computes_bf16(Path(root, "proc/cpuinfo"), environment))


def _meminfo(path: Path) -> Iterator[tuple[str, int]]:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            yield name, int(value.removesuffix(" kB")) * 1024


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Limits of this process's cgroup and its parents, in cgroup v1 or v2. In a container the path
    is often the host's; folders that are missing here are skipped.
    """
    try:
        groups = Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            mount, name = Path(root, "sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = Path(root, "sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        own = Path(path.strip("/"))
        for folder in (own, *own.parents):
            yield from _limit(mount / folder / name)


def _limit(path: Path) -> Iterator[int]:
    try:
        text = path.read_text().strip()
    except OSError:
        return
    if text.isdigit():  # "max" means no limit
        yield int(text)


def _computes_bf16(cpuinfo: Path, environment: Mapping[str, str]) -> bool:
    """Reads the CPU's flags. oneDNN cannot tell: it also accepts bfloat16 where it emulates it."""
    onednn = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA", "")
    if onednn.lower() in _ONEDNN_WITHOUT:
        return False
    if environment.get("ATEN_CPU_CAPABILITY", "").lower() in _ATEN_WITHOUT:
        return False
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not _BF16_FLAGS.isdisjoint(flags.partition(":")[2].split())
