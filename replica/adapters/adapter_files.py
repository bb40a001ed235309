"""Reads PEFT adapter files and checks that this model can serve them, without torch.

Accepted is LoRA on the linear modules of the model's layers, its embedding and its head, and whole
weights of these two. The tensors decide what it targets; the configuration decides their scale.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from cluster.adapter_paths import CONFIG_FILE, TENSORS_FILE
from cluster.errors import AdapterRefused
from cluster.file_copies import open_regular
from replica.adapters.adapter_config import (
    AdapterConfig,
    config_text,
    parse_config,
    refused,
    short,
)
from replica.adapters.chat_files import NO_CHAT, Chat
from replica.adapters.finite import first_not_finite
from replica.adapters.found_files import check_present
from replica.adapters.safetensors_header import (
    HeaderInvalid,
    TensorSpan,
    header_text,
    parse_header,
)
from replica.model.shape import Shape, VocabularyModule

DTYPES = ("F32", "F16", "BF16")
_HASHED_BYTES = 4 * 2**20

PREFIX = "base_model.model."
_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+?)\."
    r"(lora_(?P<side>[AB])\.weight|lora_embedding_(?P<table>[AB])|(?P<whole>weight)"
    r"|(?P<magnitude>lora_magnitude_vector)(\.weight)?)"
)
_OF_EXPERTS = re.compile(r"\.(experts|block_sparse_moe|mlp\.(gate|router))\.")
_LAYER = re.compile(r"\.(0|[1-9]\d{0,5})\.")

# Adapters of one recipe have one configuration and one header, whose check takes milliseconds for a
# large model: the last ones are known by both texts and the length of the data.
_KNOWN_MAX = 16
_Texts = tuple[bytes, bytes, int]


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """digest: SHA-256 (hex). rank: the largest. parameters: elements of its image. dora: it has
    gains. invocation: the tokens that activate it; (): it is always active. chat: what differs from
    the base model.
    """

    digest: str
    rank: int
    parameters: int
    dora: bool = False
    invocation: tuple[int, ...] = ()
    chat: Chat = NO_CHAT


@dataclass(frozen=True, slots=True)
class Pair:
    """The delta of one projection, scale · B · A. a: [rank, in]. b: [out, rank]. magnitude: DoRA's,
    [out]; the image has two values for each of its own.
    """

    a: TensorSpan
    b: TensorSpan
    rank: int
    scale: float
    magnitude: TensorSpan | None = None

    @property
    def elements(self) -> int:
        gains = 0 if self.magnitude is None else 2 * self.magnitude.elements
        return self.a.elements + self.b.elements + gains


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A checked adapter. pairs: (layer, projection) → matrices, in the order of the image.

    vocabulary: path of embedding or head → matrices, or the weight that replaces the base's.
    spans: name → tensor, of the whole file.
    """

    tensors_path: str
    canonical_config: bytes
    pairs: Mapping[tuple[int, str], Pair]
    vocabulary: Mapping[str, Pair | TensorSpan]
    spans: Mapping[str, TensorSpan]
    invocation: tuple[int, ...] = ()

    @property
    def ranks(self) -> dict[str, int]:
        """Of what the messages name."""
        layers = {f"layer {layer} {name}": p.rank for (layer, name), p in self.pairs.items()}
        return layers | {m: p.rank for m, p in self.vocabulary.items() if isinstance(p, Pair)}

    @property
    def rank(self) -> int:
        return max(self.ranks.values(), default=0)

    @property
    def dora(self) -> bool:
        return any(pair.magnitude is not None for pair in self.pairs.values())

    @property
    def parameters(self) -> int:
        return sum(part.elements for part in (*self.pairs.values(), *self.vocabulary.values()))

    def gain_elements(self, shape: Shape) -> int:
        gained = [name for (_, name), pair in self.pairs.items() if pair.magnitude is not None]
        return sum(2 * shape.projections[name][1] for name in gained)

    def parameters_of(self, shape: Shape) -> int:
        """Elements of one rank's image. shape: of one rank."""
        widths = {name: sum(sizes) for name, sizes in shape.projections.items()}
        layers = sum(pair.rank * widths[name] for (_, name), pair in self.pairs.items())
        return (
            layers
            + self.gain_elements(shape)
            + sum(part.elements for part in self.vocabulary.values())
        )


_known: dict[_Texts, tuple[Shape, AdapterFiles]] = {}  # the oldest first


def inspect(
    path: str, shape: Shape, rank_max: int, dtype: str = "float32", chat: Chat = NO_CHAT
) -> AdapterInfo:
    """Reads the whole tensors file. dtype: the engine's, in which all values must be finite.

    Raises AdapterRefused with file and reason.
    """
    files = read_adapter(path, shape)
    check_ranks(files, rank_max)
    try:
        digest = _digest(files, dtype, chat.text)
    except OSError as error:
        raise refused(files.tensors_path, str(error)) from error
    found = files.rank, files.parameters, files.dora, files.invocation
    return AdapterInfo(digest, *found, chat)


def check_ranks(files: AdapterFiles, rank_max: int) -> None:
    """Raises AdapterRefused."""
    for where, rank in files.ranks.items():
        if rank > rank_max:
            raise refused(
                files.tensors_path,
                f"{where} has rank {rank}, the maximum is {rank_max}; "
                f"start with --rank-max {files.rank} (engine.rank_max)",
            )


def read_adapter(path: str, shape: Shape) -> AdapterFiles:
    """Raises AdapterRefused. Reads only the configuration and the tensors file's header."""
    check_present(path)
    config_path, tensors_path = str(Path(path, CONFIG_FILE)), str(Path(path, TENSORS_FILE))
    try:
        texts = config_text(config_path), *header_text(tensors_path)
        known = _known.get(texts)
        if known is None or known[0] is not shape:
            config = AdapterConfig(
                parse_config(texts[0], config_path), config_path, shape.vocabulary
            )
            spans = parse_header(*texts[1:])
            known = shape, _checked(config, spans, shape, config_path, tensors_path)
            _remember(texts, known)
    except OSError as error:
        raise refused(path, str(error)) from error
    except HeaderInvalid as error:
        raise refused(tensors_path, str(error)) from error
    return replace(known[1], tensors_path=tensors_path)


def _remember(texts: _Texts, known: tuple[Shape, AdapterFiles]) -> None:
    """Any thread may call it."""
    _known[texts] = known
    for oldest in list(_known)[:-_KNOWN_MAX]:
        _known.pop(oldest, None)


def _checked(
    config: AdapterConfig,
    spans: Mapping[str, TensorSpan],
    shape: Shape,
    config_path: str,
    tensors_path: str,
) -> AdapterFiles:
    """Raises AdapterRefused. The paths are for its message."""
    sides = _sides(spans, shape, tensors_path)
    pairs, projections = {}, shape.projections
    # The order of the model's modules is the order of the image.
    for module, (layer, projection) in shape.modules.items():
        if module in sides:
            if not config.targets(module, layer):
                raise _not_targeted(module, tensors_path, config_path)
            sizes = projections[projection]
            pairs[layer, projection] = _pair(module, sides[module], sizes, config, tensors_path)
    vocabulary: dict[str, Pair | TensorSpan] = {}
    for module, sized in shape.vocabulary.items():
        own = sides.get(module, {})
        whole = own.pop("weight", None)
        if whole is not None and (own or not config.saves(module)):
            raise refused(
                f"{module} in {tensors_path}", f"a whole weight that {config_path} does not save"
            )
        if own and not config.targets_vocabulary(module):
            raise _not_targeted(module, tensors_path, config_path)
        sizes = sized.inputs, sized.outputs
        if whole is not None:
            _check_shape(f"{module} in {tensors_path}", "the weight", whole.shape, sized.weight)
            vocabulary[module] = whole
        elif own:
            if config.dora:
                raise refused(
                    f"{module} in {tensors_path}",
                    "DoRA is not supported there; train it without, or without this module",
                )
            vocabulary[module] = _pair(module, own, sizes, config, tensors_path)
    if config.invocation:
        _check_activated(config, config_path, vocabulary, shape.vocab)
    return AdapterFiles("", config.canonical, pairs, vocabulary, spans, config.invocation)


def _check_activated(
    config: AdapterConfig, path: str, vocabulary: Mapping[str, object], vocab: int
) -> None:
    if vocabulary:
        raise refused(path, f"alora_invocation_tokens with {next(iter(vocabulary))}")
    for token in config.invocation:
        if not 0 <= token < vocab:
            raise refused(
                path, f"alora_invocation_tokens: {token} is none of the model's {vocab} tokens"
            )


def _digest(files: AdapterFiles, dtype: str, chat: bytes) -> str:
    """Of the configuration, the tensors file, which says how long it is, and `chat`. Raises
    AdapterRefused for a value that is not finite: a NaN would spread to other adapters' rows.
    """
    digest = hashlib.sha256(b"%d:%b" % (len(files.canonical_config), files.canonical_config))
    with open_regular(files.tensors_path) as file:
        spans = sorted(files.spans.items(), key=lambda item: item[1].begin)
        digest.update(file.read(spans[0][1].begin))
        # Neighbours of one dtype are read together, in large pieces, so that a busy thread of this
        # process seldom takes the GIL in between.
        for stored, group in itertools.groupby(spans, key=lambda item: item[1].dtype):
            run = list(group)
            begin, last = run[0][1].begin, run[-1][1]
            for start, piece in _pieces(file, begin, last.begin + last.bytes):
                digest.update(piece)
                index = first_not_finite(piece, stored, dtype)
                if index is not None:
                    at = start + index * run[0][1].bytes // max(run[0][1].elements, 1)
                    name = next(n for n, span in run if at < span.begin + span.bytes)
                    raise refused(
                        files.tensors_path, f"tensor {name} holds a value not finite in {dtype}"
                    )
    digest.update(chat)
    return digest.hexdigest()


def _pieces(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, memoryview]]:
    """(offset, bytes) of each piece. The bytes are overwritten by the next one. Raises OSError."""
    buffer = memoryview(bytearray(min(end - begin, _HASHED_BYTES)))
    while begin < end:
        piece = buffer[: end - begin]
        filled = 0
        while filled < len(piece):
            count = file.readinto(piece[filled:])  # type: ignore[attr-defined]
            if not count:
                raise OSError("the tensors file ended early")
            filled += count
        yield begin, piece
        begin += len(piece)


def _sides(
    spans: Mapping[str, TensorSpan], shape: Shape, tensors_path: str
) -> dict[str, dict[str, TensorSpan]]:
    """module → `A`, `B`, `magnitude` or `weight` → tensor. Refuses unknown tensors."""
    sides: dict[str, dict[str, TensorSpan]] = {}
    known = shape.modules, shape.vocabulary
    for name, span in spans.items():
        module, side = _parsed_name(name, *known, shape.layers, tensors_path)
        if span.dtype not in DTYPES:
            raise refused(
                tensors_path, f"{name} is {span.dtype}, only {', '.join(DTYPES)} are supported"
            )
        sides.setdefault(module, {})[side] = span
    if not sides:
        raise refused(tensors_path, "no tensors")
    return sides


def _not_targeted(module: str, tensors_path: str, config_path: str) -> AdapterRefused:
    where = f"{module} in {tensors_path}"
    return refused(where, f"has tensors, but {config_path} does not target it")


def _pair(
    module: str,
    sides: Mapping[str, TensorSpan],
    sizes: tuple[int, int],
    config: AdapterConfig,
    tensors_path: str,
) -> Pair:
    where = f"{module} in {tensors_path}"
    for side, other in ("AB", "BA"):
        if side not in sides:
            raise refused(where, f"has lora_{other} but no lora_{side}")
    (inputs, outputs), (rank, scale) = sizes, config.rank_and_scale(module)
    _check_shape(where, "lora_A", sides["A"].shape, (rank, inputs))
    _check_shape(where, "lora_B", sides["B"].shape, (outputs, rank))
    magnitude = sides.get("magnitude")
    if (magnitude is not None) != config.dora:
        has = "no lora_magnitude_vector" if magnitude is None else "a lora_magnitude_vector"
        raise refused(where, f"has {has}, but use_dora = {config.dora}")
    if magnitude is not None:
        _check_shape(where, "lora_magnitude_vector", magnitude.shape, (outputs,))
    return Pair(sides["A"], sides["B"], rank, scale, magnitude)


def _check_shape(where: str, side: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise refused(
            where, f"{side} has shape {list(found)}, the model and the config need {list(wanted)}"
        )


def _parsed_name(
    name: str,
    modules: Mapping[str, object],
    vocabulary: Mapping[str, VocabularyModule],
    layers: int,
    path: str,
) -> tuple[str, str]:
    """(module, side). Refuses unknown tensors."""
    match = _TENSOR_NAME.fullmatch(name)
    if match is not None:
        module = match["module"]
        end = vocabulary.get(module)
        if match["side"] and (module in modules or (end is not None and end.head)):
            return module, match["side"]
        if match["magnitude"] and (module in modules or end is not None):
            return module, "magnitude"
        if match["table"] and end is not None and not end.head:
            return module, match["table"]
        if match["whole"] and end is not None:
            return module, "weight"
    raise refused(path, f"tensor {short(name)}{_why_unknown(name, modules, layers)}")


def _why_unknown(name: str, modules: Mapping[str, object], layers: int) -> str:
    for prefix in (PREFIX, f"{PREFIX}model."):
        match = _TENSOR_NAME.fullmatch(prefix + name)
        if match is not None and match["module"] in modules:
            return f": lacks PEFT's prefix {PREFIX!r}; save it with PeftModel.save_pretrained"
    match = _TENSOR_NAME.fullmatch(f"{PREFIX}model.{name.removeprefix(PREFIX)}")
    if match is not None and match["module"] in modules:
        return f": trained on the model without its head; its prefix must be '{PREFIX}model.'"
    if _OF_EXPERTS.search(name):
        return " is not supported: a mixture's experts and routers take no adapter"
    layer = _LAYER.search(name)
    if layer is not None and int(layer[1]) >= layers:
        return f": the model has only {layers} layers"
    if name.endswith("bias"):
        return ": a trained bias is not supported"
    return " is not supported"
