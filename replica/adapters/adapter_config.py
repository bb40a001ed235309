"""What an adapter's configuration says: which modules it targets, with which rank and scale.

Any setting that changes the forward pass and is not supported is refused by name, because serving
an adapter in part gives wrong answers.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from cluster.errors import AdapterRefused
from cluster.file_copies import open_regular
from replica.adapters.patterns import PatternRefused, end_match, full_match
from replica.adapters.safetensors_header import GIT_LFS_POINTER

CONFIG_BYTES_MAX = 2**20
PATTERNS_MAX = 4096
_INVOCATION_MAX = 1024

# fmt: off
# Settings that change the forward pass and are supported.
_HONOURED = frozenset((
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "modules_to_save", "ensure_weight_tying", "use_dora",
    "alora_invocation_tokens",
))
# Settings that only describe, or that affect only training or initialization. PEFT ignores
# fan_in_fan_out for the linear layers of these models.
_WITHOUT_EFFECT = frozenset((
    "auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type",
    "inference_mode", "lora_dropout", "megatron_core", "loftq_config", "fan_in_fan_out",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size",
    "runtime_config",
))
# fmt: on
# Initializations that change the base weights.
_BASE_CHANGING = ("pissa", "corda", "olora", "loftq", "lora_ga")
_HINTS = {"target_parameters": ": a mixture's experts and routers take no adapter"}
# Biases that were trained are tensors, and refused as such.
_BIASES = ("none", "all", "lora_only")
_WORD = re.compile(r"\w+", re.ASCII)


def refused(where: str, what: str) -> AdapterRefused:
    return AdapterRefused(f"{where}: {what}", field="lora_path")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def other_base(path: str, names: Iterable[str]) -> str | None:
    """The base model that an adapter's config names, if it is none of these. Only the last part of
    a path or id counts, and no case. path: of the config.
    """
    try:
        base = read_config(path).get("base_model_name_or_path")
    except (AdapterRefused, OSError):
        return None
    if not isinstance(base, str) or not base.strip("/"):
        return None
    return None if _last_part(base) in map(_last_part, names) else base


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def read_config(path: str) -> dict[str, Any]:
    """path: of the file. Raises AdapterRefused or OSError."""
    return parse_config(config_text(path), path)


def config_text(path: str) -> bytes:
    """The file as it stands. Raises AdapterRefused or OSError."""
    with open_regular(path) as file:
        text: bytes = file.read(CONFIG_BYTES_MAX + 1)
    if len(text) > CONFIG_BYTES_MAX:
        raise refused(path, f"larger than {CONFIG_BYTES_MAX} bytes")
    if text.startswith(GIT_LFS_POINTER):
        raise refused(path, "a Git LFS pointer: run `git lfs pull` there")
    if not text:
        raise refused(path, "empty; copy or download it again")
    return text


def parse_config(text: bytes, path: str) -> dict[str, Any]:
    """Of what `config_text` returns. Raises AdapterRefused."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refused(path, f"not JSON: {error}") from error
    if not isinstance(config, dict):
        raise refused(path, "not a JSON object")
    return config


class AdapterConfig:
    """Targets, ranks and scales, as PEFT would read them.

    vocabulary: paths of the model's embedding and head.
    Raises AdapterRefused for wrong types and ranges, and for features that are not supported.
    """

    def __init__(
        self, config: Mapping[str, Any], path: str, vocabulary: Collection[str] = ()
    ) -> None:
        _check_features(config, path)
        if not only_vocabulary(config, vocabulary):
            saved = short(config["modules_to_save"])
            raise refused(path, f"modules_to_save = {saved} is not supported")
        self.dora: bool = config.get("use_dora") or False
        if not isinstance(self.dora, bool):
            raise refused(path, f"use_dora = {short(self.dora)} is not a boolean")
        self.invocation = _invocation(config, path)
        self._config = config
        self._vocabulary = vocabulary
        self._rank: int = config.get("r", 8)
        self._alpha: float = config.get("lora_alpha", 8)
        self._stabilized: bool = config.get("use_rslora", False)
        _check_number(path, "r", self._rank, _is_rank)
        _check_number(path, "lora_alpha", self._alpha, _is_alpha)
        if not isinstance(self._stabilized, bool):
            raise refused(path, f"use_rslora = {short(self._stabilized)} is not a boolean")
        self._ranks = _patterns(config, "rank_pattern", _is_rank, path)
        self._alphas = _patterns(config, "alpha_pattern", _is_alpha, path)
        self._targets = _module_test(config, "target_modules", path)
        self._excludes = _module_test(config, "exclude_modules", path)
        self._layers, self._layer_words = _layers(config, path)
        self.canonical = _canonical(config)

    def targets(self, module: str, layer: int) -> bool:
        """True if PEFT would, by the rules of `inject_adapter`. module: its name in the model."""
        return (
            self._targets(module)
            and not self._excludes(module)
            and (self._lists(module) or self._transforms(module, layer))
        )

    def _lists(self, module: str) -> bool:
        """True if `target_modules` has its whole path. PEFT asks for no layer then."""
        listed = self._config.get("target_modules")
        return isinstance(listed, list) and module in listed

    def _transforms(self, module: str, layer: int) -> bool:
        words = self._layer_words
        return (self._layers is None or layer in self._layers) and (
            not words or any(f".{word}.{layer}." in f".{module}" for word in words)
        )

    def targets_vocabulary(self, module: str) -> bool:
        """`targets` for the embedding or the head, to which all-linear does not extend."""
        if str(self._config.get("target_modules")).lower() == "all-linear":
            return False
        return any(
            self._targets(each)
            and not self._excludes(each)
            and (self._layers is None or self._lists(each))
            for each in _alike(self._config, module, self._vocabulary)
        )

    def saves(self, module: str) -> bool:
        return saves(self._config, module, self._vocabulary)

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """By the rules of `LoraModel._create_and_replace` (PEFT 0.21)."""
        rank = int(_first_match(self._ranks, module, self._rank))
        alpha = _first_match(self._alphas, module, self._alpha)
        return rank, alpha / (math.sqrt(rank) if self._stabilized else rank)


def _invocation(config: Mapping[str, Any], path: str) -> tuple[int, ...]:
    """The tokens of an activated LoRA."""
    tokens = config.get("alora_invocation_tokens")
    if tokens is None:
        return ()
    if not _is_list_of(tokens, int) or not 0 < len(tokens) <= _INVOCATION_MAX:
        raise refused(
            path,
            f"alora_invocation_tokens = {short(tokens)} are no 1 to {_INVOCATION_MAX} tokens",
        )
    if config.get("use_dora"):
        raise refused(path, "alora_invocation_tokens with use_dora")  # PEFT refuses it too
    return tuple(tokens)


def only_vocabulary(config: Mapping[str, Any], vocabulary: Collection[str]) -> bool:
    """True if `modules_to_save` names nothing but the embedding and the head."""
    saved = config.get("modules_to_save") or []
    return _is_list_of(saved, str) and all(
        any(_saved_as(module, name) for module in vocabulary) for name in saved
    )


def saves(config: Mapping[str, Any], module: str, vocabulary: Collection[str]) -> bool:
    """True if `modules_to_save` names the embedding or the head."""
    saved = config.get("modules_to_save") or []
    return any(
        _saved_as(each, name) for each in _alike(config, module, vocabulary) for name in saved
    )


def _saved_as(module: str, name: str) -> bool:
    return f".{module}".endswith(f".{name}")


def _alike(config: Mapping[str, Any], module: str, vocabulary: Collection[str]) -> Collection[str]:
    """`ensure_weight_tying` makes PEFT treat the head as it does the embedding."""
    return vocabulary if config.get("ensure_weight_tying") else (module,)


def _check_features(config: Mapping[str, Any], path: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise refused(path, f"peft_type {short(kind)} is not supported (only LORA)")
    for name, value in sorted(config.items()):
        if name in _HONOURED or name in _WITHOUT_EFFECT:
            continue
        if value and not (name == "bias" and value in _BIASES):
            hint = _HINTS.get(name, "")
            raise refused(path, f"{name} = {short(value)} is not supported{hint}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        raise refused(
            path,
            f"init_lora_weights = {short(start)} changes the base weights; save it with "
            "path_initial_model_for_weight_conversion to get a plain LoRA",
        )


def _patterns(
    config: Mapping[str, Any], name: str, right: Callable[[Any], bool], path: str
) -> list[tuple[Callable[[str], bool], float]]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise refused(path, f"{name} = {short(patterns)} is not an object")
    if len(patterns) > PATTERNS_MAX:
        raise refused(path, f"{name} has {len(patterns)} entries, at most {PATTERNS_MAX}")
    found = []
    for pattern, value in patterns.items():
        _check_number(path, f"{name}[{short(pattern)}]", value, right)
        found.append((_matcher(end_match, pattern, path, name), value))
    return found


def _matcher(
    kind: Callable[[str], Callable[[str], bool]], pattern: str, path: str, name: str
) -> Callable[[str], bool]:
    try:
        return kind(pattern)
    except PatternRefused as error:
        raise refused(
            path, f"{name}: {short(pattern)} cannot be matched in linear time: {error}"
        ) from error


def _first_match(
    patterns: list[tuple[Callable[[str], bool], float]], module: str, default: float
) -> float:
    return next((value for matches, value in patterns if matches(module)), default)


def _module_test(config: Mapping[str, Any], name: str, path: str) -> Callable[[str], bool]:
    value = config.get(name)
    if value is None:
        return lambda module: False
    if isinstance(value, str):
        if name == "target_modules" and value.lower() == "all-linear":
            return lambda module: True
        if name == "exclude_modules" and not value:
            return lambda module: False
        return _matcher(full_match, value, path, name)
    if not _is_list_of(value, str):
        raise refused(path, f"{name} = {short(value)} is neither a string nor a list of strings")
    ends = tuple(f".{each}" for each in value)
    return lambda module: f".{module}".endswith(ends)


def _layers(config: Mapping[str, Any], path: str) -> tuple[list[int] | None, list[str]]:
    """The layers that `layers_to_transform` allows, None: all; and what `layers_pattern` says that
    their number follows, if it says so.
    """
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is not None and type(layers) is not int and not _is_list_of(layers, int):
        raise refused(
            path, f"layers_to_transform = {short(layers)} is neither an integer nor a list of them"
        )
    # What PEFT refuses too.
    if isinstance(config.get("target_modules"), str) and not (layers is None and pattern is None):
        raise refused(path, "layers_to_transform or layers_pattern with target_modules as a string")
    words = [pattern] if pattern and isinstance(pattern, str) else pattern or []
    if not _is_list_of(words, str) or not all(_WORD.fullmatch(word) for word in words):
        raise refused(
            path, f"layers_pattern = {short(pattern)} is neither a word nor a list of them"
        )
    if words and layers is None:
        raise refused(path, "layers_pattern is set, but layers_to_transform is not")
    if layers is None or layers == []:
        return None, []
    return [layers] if isinstance(layers, int) else layers, words


def _check_number(path: str, name: str, value: Any, right: Callable[[Any], bool]) -> None:
    if not right(value):
        raise refused(path, f"{name} = {short(value)} is out of range")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**20


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 2**40 and math.isfinite(value)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


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
    if config.get("alora_invocation_tokens"):
        fields["alora_invocation_tokens"] = config["alora_invocation_tokens"]
    if config.get("use_dora"):
        fields["use_dora"] = True
    if config.get("modules_to_save"):
        fields["modules_to_save"] = modules(config["modules_to_save"])
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
