"""Reads PEFT adapter files and checks that this model can serve them, without torch.

Accepted is LoRA on the seven projections of a decoder layer. The tensors decide which projections
it targets; the configuration decides their scale. Any other setting that changes the forward pass
is refused by name, because serving an adapter in part gives wrong answers.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import AdapterRefused
from replica.adapters.safetensors_header import HeaderInvalid, TensorSpan, open_regular, read_header
from replica.model.shape import ModelShape

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
CONFIG_BYTES_MAX = 2**20
PATTERN_CHARACTERS_MAX = 512
PATTERNS_MAX = 4096
DTYPES = ("F32", "F16", "BF16")

# fmt: off
# Settings that change the forward pass and are supported.
_HONOURED = frozenset((
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "init_lora_weights",
))
# Settings that only describe, or that affect only training or initialization.
_WITHOUT_EFFECT = frozenset((
    "auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type",
    "inference_mode", "lora_dropout", "layers_pattern", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size",
    "runtime_config", "ensure_weight_tying",
))
# fmt: on
# Initializations that change the base weights.
_BASE_CHANGING = ("pissa", "corda", "olora", "loftq", "lora_ga")

_TENSOR_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>0|[1-9]\d{0,5})\."
    r"(?P<block>self_attn|mlp)\.(?P<projection>\w+)\.lora_(?P<side>[AB])\.weight"
)
_BLOCKS = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn"}
_BLOCKS |= {"o_proj": "self_attn", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """digest: SHA-256 (hex). rank: the largest. parameters: elements of its image."""

    digest: str
    rank: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Pair:
    """The delta of one projection, scale · B · A. a: [rank, in]. b: [out, rank]."""

    a: TensorSpan
    b: TensorSpan
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A checked adapter. pairs: (layer, projection) → matrices, in the order of the image."""

    tensors_path: str
    canonical_config: bytes
    pairs: Mapping[tuple[int, str], Pair]

    @property
    def rank(self) -> int:
        return max(pair.rank for pair in self.pairs.values())

    @property
    def parameters(self) -> int:
        return sum(pair.a.elements + pair.b.elements for pair in self.pairs.values())

    def parameters_of(self, shape: ModelShape) -> int:
        """Elements of one rank's image. shape: of one rank."""
        widths = {name: sum(sizes) for name, sizes in shape.projections.items()}
        return sum(pair.rank * widths[name] for (_, name), pair in self.pairs.items())

    def hash(self) -> "hashlib._Hash":
        """SHA-256 of the configuration. Update it with the tensors file to get the digest."""
        return hashlib.sha256(b"%d:%b" % (len(self.canonical_config), self.canonical_config))


def inspect(path: str, shape: ModelShape, rank_max: int) -> AdapterInfo:
    """Raises AdapterRefused with file and reason. Reads the whole tensors file for the digest."""
    files = read_adapter(path, shape)
    check_ranks(files, rank_max)
    try:
        digest = _digest(files)
    except OSError as error:
        raise _refused(files.tensors_path, str(error)) from error
    return AdapterInfo(digest, files.rank, files.parameters)


def check_ranks(files: AdapterFiles, rank_max: int) -> None:
    """Raises AdapterRefused."""
    for (layer, projection), pair in files.pairs.items():
        if pair.rank > rank_max:
            raise _refused(
                files.tensors_path,
                f"layer {layer} {projection} has rank {pair.rank}, the maximum is {rank_max}",
            )


def read_adapter(path: str, shape: ModelShape) -> AdapterFiles:
    """Raises AdapterRefused. Reads only the configuration and the tensors file's header."""
    directory = Path(path)
    config_path, tensors_path = str(directory / CONFIG_FILE), str(directory / TENSORS_FILE)
    try:
        present = directory.is_dir()
        config = _read_config(config_path) if present else {}
        if present and not (directory / TENSORS_FILE).exists():
            pickle = (directory / "adapter_model.bin").exists()
            raise _refused(
                path,
                "adapter_model.bin is a pickle, only safetensors are read"
                if pickle
                else f"no {TENSORS_FILE}",
            )
        if not present:
            raise _refused(path, "no such directory")
        _check_config(config, config_path)
        spans = read_header(tensors_path)
    except (OSError, ValueError) as error:
        # ValueError: the path contains a NUL character.
        raise _refused(path, str(error)) from error
    except HeaderInvalid as error:
        raise _refused(tensors_path, str(error)) from error
    return AdapterFiles(
        tensors_path,
        _canonical(config),
        _pairs(spans, config, shape, config_path, tensors_path),
    )


def _refused(where: str, what: str) -> AdapterRefused:
    return AdapterRefused(f"{where}: {what}", field="lora_path")


def _read_config(path: str) -> dict[str, Any]:
    with open_regular(path) as file:
        text = file.read(CONFIG_BYTES_MAX + 1)
    if len(text) > CONFIG_BYTES_MAX:
        raise _refused(path, f"larger than {CONFIG_BYTES_MAX} bytes")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"not JSON: {error}") from error
    if not isinstance(config, dict):
        raise _refused(path, "not a JSON object")
    return config


def _check_config(config: Mapping[str, Any], path: str) -> None:
    """Checks types and ranges, and refuses enabled features that are not supported."""
    if config.get("peft_type") != "LORA":
        raise _refused(path, f"peft_type {config.get('peft_type')!r} is not supported (only LORA)")
    for name, value in sorted(config.items()):
        if name in _HONOURED or name in _WITHOUT_EFFECT or (name, value) == ("bias", "none"):
            continue
        if value:
            raise _refused(path, f"{name} = {_short(value)} is not supported")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        raise _refused(
            path,
            f"init_lora_weights = {_short(start)} changes the base weights; save it with "
            "path_initial_model_for_weight_conversion to get a plain LoRA",
        )
    if not isinstance(config.get("use_rslora", False), bool):
        raise _refused(path, f"use_rslora = {_short(config['use_rslora'])} is not a boolean")
    _check_number(path, "r", config.get("r", 8), _is_rank)
    _check_number(path, "lora_alpha", config.get("lora_alpha", 8), _is_alpha)
    for name, right in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise _refused(path, f"{name} = {_short(patterns)} is not an object")
        if len(patterns) > PATTERNS_MAX:
            raise _refused(path, f"{name} has {len(patterns)} entries, at most {PATTERNS_MAX}")
        for pattern, value in patterns.items():
            _compile(pattern, path, name)
            _check_number(path, f"{name}[{pattern!r}]", value, right)
    _check_modules(config, path)


def _check_modules(config: Mapping[str, Any], path: str) -> None:
    for name in ("target_modules", "exclude_modules"):
        value = config.get(name)
        if isinstance(value, str):
            _compile(value, path, name)
        elif value is not None and not _is_list_of(value, str):
            raise _refused(
                path, f"{name} = {_short(value)} is neither a string nor a list of strings"
            )
    layers = config.get("layers_to_transform")
    if layers is not None and type(layers) is not int and not _is_list_of(layers, int):
        raise _refused(
            path, f"layers_to_transform = {_short(layers)} is neither an integer nor a list of them"
        )


def _check_number(path: str, name: str, value: Any, right: Callable[[Any], bool]) -> None:
    if not right(value):
        raise _refused(path, f"{name} = {_short(value)} is out of range")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**20


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 2**40 and math.isfinite(value)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _compile(pattern: str, path: str, name: str) -> re.Pattern[str]:
    """Refuses patterns that could take minutes to match: the file's author is not trusted."""
    repeats = len(re.findall(r"[*+{]", pattern))
    if len(pattern) > PATTERN_CHARACTERS_MAX or repeats > 4 or re.search(r"\)[*+?{]", pattern):
        raise _refused(path, f"{name}: the pattern {_short(pattern)} is too complex")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _refused(
            path, f"{name}: {_short(pattern)} is not a regular expression: {error}"
        ) from error


def _canonical(config: Mapping[str, Any]) -> bytes:
    """The fields that affect the output, normalized: saving a file again keeps the digest."""

    def modules(value: Any) -> Any:
        return sorted(value) if isinstance(value, list) else value

    # Patterns keep their order, because the first match counts.
    fields = {
        "r": config.get("r", 8),
        "lora_alpha": config.get("lora_alpha", 8),
        "use_rslora": config.get("use_rslora", False),
        "rank_pattern": list((config.get("rank_pattern") or {}).items()),
        "alpha_pattern": list((config.get("alpha_pattern") or {}).items()),
        "target_modules": modules(config.get("target_modules")),
        "exclude_modules": modules(config.get("exclude_modules")),
        "layers_to_transform": modules(config.get("layers_to_transform")),
    }
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def _digest(files: AdapterFiles) -> str:
    digest = files.hash()
    with open_regular(files.tensors_path) as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _pairs(
    spans: Mapping[str, TensorSpan],
    config: Mapping[str, Any],
    shape: ModelShape,
    config_path: str,
    tensors_path: str,
) -> dict[tuple[int, str], Pair]:
    sides: dict[tuple[int, str], dict[str, TensorSpan]] = {}
    for name, span in spans.items():
        layer, projection, side = _parsed_name(name, shape, tensors_path)
        if span.dtype not in DTYPES:
            raise _refused(
                tensors_path, f"{name} is {span.dtype}, only {', '.join(DTYPES)} are supported"
            )
        sides.setdefault((layer, projection), {})[side] = span
    if not sides:
        raise _refused(tensors_path, "no tensors")
    targeted = _Targets(config)
    scaling = _Scaling(config)
    pairs = {}
    # The order of layers and projections in the model is the order of the image.
    for layer in range(shape.layers):
        for projection, (inputs, outputs) in shape.projections.items():
            both = sides.get((layer, projection))
            if both is None:
                continue
            module = f"model.layers.{layer}.{_BLOCKS[projection]}.{projection}"
            where = f"{module} in {tensors_path}"
            if len(both) < 2:
                (side,) = both
                raise _refused(where, f"has lora_{side} but no lora_{'AB'.replace(side, '')}")
            if not targeted(module, layer):
                raise _refused(where, f"has tensors, but {config_path} does not target it")
            rank, scale = scaling(module)
            _check_shape(where, "lora_A", both["A"].shape, (rank, inputs))
            _check_shape(where, "lora_B", both["B"].shape, (outputs, rank))
            pairs[layer, projection] = Pair(both["A"], both["B"], rank, scale)
    return pairs


def _check_shape(where: str, side: str, found: tuple[int, ...], wanted: tuple[int, int]) -> None:
    if found != wanted:
        raise _refused(
            where, f"{side} has shape {list(found)}, the model and the config need {list(wanted)}"
        )


def _parsed_name(name: str, shape: ModelShape, path: str) -> tuple[int, str, str]:
    """(layer, projection, A or B). Refuses unknown tensors."""
    match = _TENSOR_NAME.fullmatch(name)
    if match is None or _BLOCKS.get(match["projection"]) != match["block"]:
        if "lora_magnitude_vector" in name:
            raise _refused(path, f"tensor {_short(name)}: DoRA is not supported")
        raise _refused(path, f"tensor {_short(name)} is not supported")
    layer = int(match["layer"])
    if layer >= shape.layers:
        raise _refused(path, f"tensor {name}: the model has only {shape.layers} layers")
    return layer, match["projection"], match["side"]


class _Targets:
    """Tells which modules PEFT would target, by the rules of `inject_adapter`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._targets = _module_test(config.get("target_modules"))
        self._excludes = _module_test(config.get("exclude_modules"))
        layers = config.get("layers_to_transform")
        self._layers = [layers] if isinstance(layers, int) else layers

    def __call__(self, module: str, layer: int) -> bool:
        return (
            self._targets(module)
            and not self._excludes(module)
            and (not self._layers or layer in self._layers)
        )


def _module_test(value: str | list[str] | None) -> Callable[[str], bool]:
    if value is None:
        return lambda module: False
    if isinstance(value, str):
        if value.lower() == "all-linear":
            return lambda module: True
        pattern = re.compile(value)
        return lambda module: pattern.fullmatch(module) is not None
    ends = tuple(f".{name}" for name in value)
    return lambda module: f".{module}".endswith(ends)


class _Scaling:
    """Rank and scale of a module, by the rules of `LoraModel._create_and_replace` (PEFT 0.21)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rank: int = config.get("r", 8)
        self._alpha: float = config.get("lora_alpha", 8)
        self._ranks = _compiled(config.get("rank_pattern"))
        self._alphas = _compiled(config.get("alpha_pattern"))
        self._stabilized: bool = config.get("use_rslora", False)

    def __call__(self, module: str) -> tuple[int, float]:
        rank = int(_first_match(self._ranks, module, self._rank))
        alpha = _first_match(self._alphas, module, self._alpha)
        return rank, alpha / (math.sqrt(rank) if self._stabilized else rank)


def _compiled(patterns: Mapping[str, float] | None) -> list[tuple[re.Pattern[str], float]]:
    return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in (patterns or {}).items()]


def _first_match(
    patterns: list[tuple[re.Pattern[str], float]], module: str, default: float
) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)
