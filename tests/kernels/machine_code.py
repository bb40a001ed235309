"""What the assembler made of a kernel for Hopper: whether products read what they were given.

A matmul of a warp group runs beside what follows it until a wait, and may have its left operand in
registers. Before CUDA 13.3 the assembler may give those to others meanwhile (triton issue 9433 and
pull request 11781), and sums are wrong.
"""

import re
import subprocess
import tempfile

from triton import knobs

# These write no registers of a thread, or are no instructions that stand for a result.
_WITHOUT_RESULT = ("ST", "RED", "BAR", "WARP", "LDGSTS", "LDGDEP", "DEPBAR", "BSYNC", "BSSY", "NOP")
_WITHOUT_RESULT += ("HGMMA", "ISETP", "FSETP", "PLOP", "R2P", "R2UR", "U")


def overwritten(cubin: bytes) -> tuple[int, list[str]]:
    """How many products have their left operand in registers, and for each of those that are
    overwritten before it is awaited: product and instruction.
    """
    code, labels = _code(cubin)
    found, products = [], 0
    for at, instruction in enumerate(code):
        match = re.search(r"HGMMA\S*\s+R\w+,\s*R(\d+)", instruction)
        if match:
            products += 1
            operand = set(range(int(match[1]), int(match[1]) + 4))
            found += [f"{instruction}: {own}" for own in _running(code, labels, at, operand)]
    return products, found


def _running(code: list[str], labels: dict[str, int], begin: int, operand: set[int]) -> list[str]:
    """What overwrites the operand on any way from `begin` to a wait."""
    found, seen, ways = [], set(), [begin + 1]
    while ways:
        at = ways.pop()
        while at < len(code) and at not in seen:
            seen.add(at)
            instruction = code[at]
            if instruction.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x0") or instruction == "EXIT":
                break
            jump = re.search(r"BRA.*?(\.L_x_\d+)", instruction)
            if jump:
                ways.append(labels[jump[1]])
                if not instruction.startswith("@"):
                    break
            elif _written(instruction) & operand:
                found.append(instruction)
                break
            at += 1
    return found


def _written(instruction: str) -> set[int]:
    name, _, rest = re.sub(r"^@!?U?P\w+\s+", "", instruction).partition(" ")
    target = re.match(r"(?:P\w+,\s*)?R(\d+)\b", rest.strip())
    if target is None or name.startswith(_WITHOUT_RESULT):
        return set()
    width = 4 if name.endswith(".128") or name.startswith("LDSM") else 1
    if name.endswith(".64") or ".WIDE" in name:
        width = 2
    return set(range(int(target[1]), int(target[1]) + width))


def _code(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    """The instructions, and before which of them each label stands."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    return code, labels
