"""Finds the shape of a model that runs through transformers' own modules.

A forward pass on torch's meta device, without weights, tells which linear modules every token goes
through once, and what each layer's attention stores. `python -m replica.model.module_walk DIR`
writes the pickled shape, or the error, for processes that do without torch.
"""

import pickle
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from cluster.errors import FleetError, ModelUnsupported
from replica.model.quantization import read_quantization
from replica.model.shape import (
    DTYPES,
    TransformersShape,
    VocabularyModule,
    read_eos_tokens,
    read_json,
)
from replica.model.transformers_model import (
    ATTENTION,
    UNREACHED,
    attach,
    linear_sizes,
    read_config,
    refusing,
)

_TOKENS = 5
_LAYER = re.compile(r"\.(\d+)(?=\.)")


def walk(model_dir: str) -> TransformersShape:
    """Raises ModelUnsupported naming the feature."""
    path = Path(model_dir) / "config.json"
    given = read_json(path)
    text_only = given.get("text_config")  # of a model that takes images, too
    quantization = read_quantization(given, model_dir)
    if quantization is None and isinstance(text_only, Mapping):
        quantization = read_quantization(text_only, model_dir)
    config = read_config(model_dir)
    text = config.get_text_config(decoder=True)
    dtype = _dtype(text.dtype or config.dtype, str(path))
    with refusing(model_dir), torch.device("meta"), torch.inference_mode():
        # In bfloat16, which the kernels for mixtures of experts need.
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=ATTENTION, trust_remote_code=False
        )
        trace = _Trace(model.eval())
        if quantization is not None and any(isinstance(m, Conv1D) for m in model.modules()):
            # Their weights are transposed, which only a shape that is not square would tell.
            raise ModelUnsupported("quantized Conv1D modules are not supported", field="model")
    modules, projections = _named(trace.linears)
    calls = list(trace.calls.values())
    return TransformersShape(
        architecture=config.model_type,
        layers=1 + max((layer for layer, _ in modules.values()), default=0),
        attention_layers=tuple(trace.calls),
        heads=max(call.heads for call in calls),
        kv_heads=max(call.kv_heads for call in calls),
        head_dim=max(call.size for call in calls),
        vocab=trace.vocab,
        context=_context(text, str(path)),
        eos_tokens=read_eos_tokens(model_dir, {**given, "eos_token_id": text.eos_token_id}),
        dtype=dtype,
        windows=tuple(call.window for call in calls),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        projections=projections,
        modules=modules,
        vocabulary=trace.vocabulary,
        quantization=quantization,
    )


@dataclass(frozen=True, slots=True)
class _Call:
    heads: int
    kv_heads: int
    size: int
    window: int | None


class _Trace:
    """One pass of `_TOKENS` tokens. linears: paths of the modules that every token goes through
    once, with their sizes. calls: layer → its attention. vocabulary: embedding and head, if every
    token goes through them once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[int, _Call] = {}
        sizes = {path: linear_sizes(module) for path, module in model.named_modules()}
        rows: dict[str, list[int]] = {path: [] for path, found in sizes.items() if found}
        attach(model, self)
        for path, counts in rows.items():
            note = partial(self._note, counts)
            model.get_submodule(path).register_forward_hook(note)
        found = _vocabulary(model)
        embedded: dict[str, list[int]] = {p: [] for p, each in found.items() if not each.head}
        for path, counts in embedded.items():
            note = partial(self._note_tokens, counts)
            model.get_submodule(path).register_forward_hook(note)
        tokens = torch.arange(_TOKENS)[None]
        logits = model(input_ids=tokens, position_ids=tokens, use_cache=False).logits
        if not self.calls:
            raise ModelUnsupported(f"{type(model).__name__}: {UNREACHED}", field="model")
        self.vocab: int = logits.shape[-1]
        self.linears = {p: size for p, size in sizes.items() if size and rows[p] == [_TOKENS]}
        counted = rows | embedded
        self.vocabulary = {p: each for p, each in found.items() if counted[p] == [_TOKENS]}

    def _note_tokens(
        self, counts: list[int], _: nn.Module, inputs: tuple[Any, ...], y: object
    ) -> None:
        counts.append(inputs[0].numel())

    def _note(self, counts: list[int], _: nn.Module, inputs: tuple[Any, ...], y: object) -> None:
        counts.append(inputs[0].shape[:-1].numel())

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        if layer in self.calls or len(keys) != _TOKENS:
            raise ModelUnsupported(f"layer {layer} does not attend as a decoder's", field="model")
        size = max(keys.shape[2], values.shape[2])
        self.calls[layer] = _Call(q.shape[1], keys.shape[1], size, window)
        return q.new_empty(_TOKENS, q.shape[1], values.shape[2])


def _vocabulary(model: Any) -> dict[str, VocabularyModule]:
    """Embedding and head, where they are plain modules of which PEFT makes adapters."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = {}
    for path, module in model.named_modules():
        scaled = hasattr(module, "embed_scale") or type(module).forward is nn.Embedding.forward
        if module is table and isinstance(module, nn.Embedding) and scaled:
            found[path] = VocabularyModule(False, module.num_embeddings, module.embedding_dim)
        if module is head and type(module).forward is nn.Linear.forward:
            found[path] = VocabularyModule(True, module.in_features, module.out_features)
    return found


def _named(
    linears: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, tuple[int, str]], dict[str, tuple[int, int]]]:
    """`modules` and `projections` of a `TransformersShape`, of the modules in numbered layers."""
    projections: dict[str, tuple[int, int]] = {}
    modules: dict[str, tuple[int, str]] = {}
    for path, sizes in linears.items():
        layer = _LAYER.findall(path)
        if len(layer) == 1:
            name = _LAYER.sub(".*", path)
            if projections.setdefault(name, sizes) != sizes:
                name = f"{name} of {sizes[0]} × {sizes[1]}"
                projections[name] = sizes
            modules[path] = int(layer[0]), name
    order = {name: i for i, name in enumerate(projections)}

    def place(item: tuple[str, tuple[int, str]]) -> tuple[int, int]:
        layer, name = item[1]
        return layer, order[name]

    return dict(sorted(modules.items(), key=place)), projections


def _context(text: PreTrainedConfig, where: str) -> int:
    context = getattr(text, "max_position_embeddings", None)
    if not isinstance(context, int):
        raise ModelUnsupported(f"{where}: no 'max_position_embeddings'", field="model")
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ModelUnsupported(
            f"{where}: layer_types {sorted(kinds)} are not supported", field="model"
        )
    given = getattr(text, "rope_parameters", None) or {}
    for rope in (given, *given.values()):
        if isinstance(rope, Mapping) and rope.get("rope_type") == "longrope":
            # Longer sequences rotate all their positions by other factors.
            context = min(context, rope["original_max_position_embeddings"])
    return context


def _dtype(dtype: torch.dtype | None, where: str) -> str:
    name = str(dtype or torch.float32).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelUnsupported(f"{where}: dtype {name!r} is not supported", field="model")
    return name


def main() -> None:
    try:
        result: TransformersShape | FleetError = walk(sys.argv[1])
    except FleetError as error:
        result = error
    sys.stdout.buffer.write(pickle.dumps(result))


if __name__ == "__main__":
    main()
