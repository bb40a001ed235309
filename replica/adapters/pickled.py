"""Rewrites a pickle of tensors as safetensors, in a process that is killed when it takes too long.

    python -m replica.adapters.pickled SOURCE TARGET

torch's `weights_only` runs no foreign code, but the file decides how much it computes and
allocates. The process prints why it cannot, for people, and exits with REFUSED.
"""

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

DEADLINE_S = 120.0
REFUSED = 3
# Beyond three times the file, which the tensors, a copy, and what is written may take.
_MEMORY_BYTES = 2**30


def rewrite(source: str, target: str) -> str | None:
    """Returns why the pickle cannot be rewritten, or None. Raises OSError."""
    command = [sys.executable, "-P", "-m", "replica.adapters.pickled", source, target]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S
        )
    except subprocess.TimeoutExpired:
        return f"reading it takes longer than {DEADLINE_S:g} s"
    if done.returncode == REFUSED:
        return done.stdout.strip()
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise OSError(f"{source}: the process that reads it ended: {lines[-1] if lines else ''}")
    return None


def _main(source: str, target: str) -> str | None:
    import torch
    from safetensors.torch import save_file

    size = Path(source).stat().st_size
    limit = _data_bytes() + 3 * size + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        found: Any = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # pickles raise whatever they like
        return f"weights_only does not read it: {str(error).splitlines()[0][:200]}"
    if not isinstance(found, dict) or not all(
        type(name) is str and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        return "it is not a state dict: tensors by name"
    dense = all(t.layout is torch.strided and t.device.type == "cpu" for t in found.values())
    # A view may be of any size, however small the file is.
    if not dense or sum(t.numel() * t.element_size() for t in found.values()) > size:
        return "it has tensors that are sparse, or larger than the file"
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, target)
    return None


def _data_bytes() -> int:
    """What this process has taken of RLIMIT_DATA."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    _refusal = _main(*sys.argv[1:])
    if _refusal is not None:
        print(_refusal)
        sys.exit(REFUSED)
