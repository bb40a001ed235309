"""The shape of any model's checkpoint, for processes that do without torch."""

import functools
import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

from cluster.errors import FleetError, ModelUnsupported
from replica.model.families import ARCHITECTURES
from replica.model.shape import Shape, is_covered, read_json, read_shape


def is_native(model_dir: str) -> bool:
    """True if our own decoder runs it, or if its `config.json` is missing or names no model."""
    path = Path(model_dir) / "config.json"
    config = read_json(path) if path.is_file() else {}
    architecture = config.get("model_type")
    return architecture is None or (architecture in ARCHITECTURES and is_covered(config))


def shape_of(model_dir: str) -> Shape:
    """Raises ModelUnsupported naming the file and what is missing or not supported."""
    return read_shape(model_dir) if is_native(model_dir) else _walked(model_dir)


def read_shape_here(model_dir: str) -> Shape:
    """As `shape_of`, for a process that will import torch and transformers anyway."""
    if is_native(model_dir):
        return read_shape(model_dir)
    # It imports transformers, which takes seconds.
    from replica.model.module_walk import walk

    return walk(model_dir)


def identity(model_dir: str) -> str:
    """Hex digits that differ between base models which cannot have each other's adapters: by
    family, layers, linear modules and vocabulary. Raises ModelUnsupported.
    """
    family = read_json(Path(model_dir) / "config.json").get("model_type")
    shape = shape_of(model_dir)
    told = family, shape.layers, sorted(shape.projections.items()), shape.vocab
    return hashlib.blake2b(repr(told).encode(), digest_size=4).hexdigest()


@functools.cache
def _walked(model_dir: str) -> Shape:
    """transformers and torch are imported in another process, which takes seconds."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "replica.model.module_walk", model_dir], capture_output=True
    )
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()[-500:]
        raise ModelUnsupported(f"{model_dir}: {reason}", field="model")
    shape: Shape | FleetError = pickle.loads(done.stdout)
    if isinstance(shape, FleetError):
        raise shape
    return shape
