"""What this machine has for a replica: how much memory, and whether it computes in bfloat16."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Of /proc/cpuinfo, on x86 and on Arm: instructions that multiply bfloat16. Others, such as
# avx_ne_convert, only convert it.
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# What these variables may hold oneDNN and torch to that is older than such instructions.
_ONEDNN_WITHOUT = frozenset({"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2"})
_ONEDNN_WITHOUT |= frozenset({"avx512_core", "avx512_core_vnni"})
_ATEN_WITHOUT = frozenset({"default", "avx2"})


@dataclass(frozen=True, slots=True)
class Node:
    """memory: bytes that processes here may use: the least that a cgroup around this one allows,
    else all there is. free: of these, what is free now. bf16: whether it is computed natively.
    """

    memory: int
    free: int
    bf16: bool


def read_node(root: str = "/", environment: Mapping[str, str] = os.environ) -> Node:
    """root: where /proc and /sys are."""
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
    """Of the group of this process and of those around it, in either version. In a container the
    path is often the host's: what of it cannot be found here is passed over.
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
    if text.isdigit():  # else "max": none
        yield int(text)


def _computes_bf16(cpuinfo: Path, environment: Mapping[str, str]) -> bool:
    """oneDNN takes bfloat16 also where it emulates it, so it is not asked."""
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
