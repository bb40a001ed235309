"""A causal model of transformers over one packed batch: its own modules, with our attention, KV
pages and LoRA.

transformers calls our attention by name (`AttentionInterface`), with queries and keys that the
model has rotated. A batch is one sequence of packed rows: `position_ids` say where each token is in
its row, and no mask is built.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from cluster.errors import ModelUnsupported
from lora_kernels.vocabulary import Vocabulary
from replica.model.gather_attention import GatherAttention, ModelInputs
from replica.model.quantization import Quantization
from replica.model.ranks import Ranks
from replica.model.shape import TransformersShape
from replica.model.stored_checkpoint import StoredCheckpoint

if TYPE_CHECKING:
    from replica.model.paged_attention import PagedAttention, PagedBatch

ATTENTION = "lorafleet"
"""The name of our attention in transformers, which builds no masks for names that it ignores."""
UNREACHED = "its attention cannot be replaced, so it cannot be served"


class Attention(Protocol):
    """`GatherAttention` or `PagedAttention`."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> torch.Tensor: ...


class Adds(Protocol):
    """The part of `decoder.Deltas` that modules need, whose base matmul is their own."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def gained(self) -> torch.Tensor | None: ...

    def add(self, x: torch.Tensor, y: torch.Tensor, layer: int, group: int) -> None: ...


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls. query, key, value: [1, heads, tokens, size]. Settings that it does
    not know are left to the check at the start (`start_check.py`).
    """
    if s_aux is not None:
        raise ModelUnsupported("attention sinks are not supported", field="model")
    if attention_mask is not None:
        raise ModelUnsupported("its attention needs a mask of its own", field="model")
    q, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[2] ** -0.5 if scaling is None else scaling
    attention: Attention = module.paged_attention
    mixed = attention.attend(module.layer_idx, q, keys, values, scale, sliding_window, softcap)
    return mixed[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)


def attach(model: nn.Module, attention: Attention) -> None:
    """Lets the model's layers attend through `attention`."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.paged_attention = attention  # type: ignore[assignment]


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features), or None if it is no plain linear module."""
    if type(module).forward is nn.Linear.forward:
        return module.in_features, module.out_features  # type: ignore[return-value]
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return inputs, outputs
    return None


@contextlib.contextmanager
def refusing(model_dir: str) -> Iterator[None]:
    """Turns what transformers and the model's code raise into ModelUnsupported."""
    try:
        yield
    except ModelUnsupported as error:
        if error.message.startswith(model_dir):
            raise
        raise ModelUnsupported(f"{model_dir}: {error.message}", field=error.field) from error
    except Exception as error:
        reason = "transformers: " + " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, KeyError) and error.args == (ATTENTION,):
            reason = UNREACHED
        raise ModelUnsupported(f"{model_dir}: {reason}", field="model") from error


def read_config(model_dir: str) -> PreTrainedConfig:
    """Raises ModelUnsupported. No code is loaded from the directory. Says nothing of quantization:
    transformers gets dequantized weights.
    """
    with refusing(model_dir):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
        for part in (config, config.get_text_config(decoder=True)):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
    return config


class TransformersModel:
    """Adds deltas to the outputs of linear modules, after their bias.

    context: longest sequence served. modules: must use `ATTENTION`. tells_prompts: see `Model`.
    """

    ranks: Ranks | None = None
    tells_prompts: bool = True

    def __init__(self, shape: TransformersShape, context: int, modules: PreTrainedModel) -> None:
        self.shape, self.context, self.modules = shape, context, modules
        self._dtype: torch.dtype = modules.dtype
        self._device: torch.device = modules.device
        self._layer_of = {layer: i for i, layer in enumerate(shape.attention_layers)}
        self._keeps = "logits_to_keep" in inspect.signature(modules.forward).parameters
        self._deltas: Adds | None = None
        self._body = _body(modules)
        self._wanted: torch.Tensor | None = None
        attach(modules, self)
        groups = {name: i for i, name in enumerate(shape.projections)}
        for path, (layer, name) in shape.modules.items():
            add = partial(self._add, layer=layer, group=groups[name])
            modules.get_submodule(path).register_forward_hook(add)
        for path, module in shape.vocabulary.items():
            change = self._head if module.head else self._embed
            modules.get_submodule(path).register_forward_hook(change)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    def decoder(self, attention: GatherAttention | PagedAttention) -> TransformersDecoder:
        return TransformersDecoder(self, attention)

    def forward(
        self, attention: Attention, batch: ModelInputs | PagedBatch, deltas: Adds | None
    ) -> torch.Tensor:
        """Logits [outputs, vocab]."""
        self._attention, self._deltas = attention, deltas
        self._wanted = batch.wanted if self._keeps else None
        wanted = {} if batch.wanted is None else {"logits_to_keep": batch.wanted}
        logits: torch.Tensor = self.modules(
            input_ids=batch.tokens.long()[None],
            position_ids=batch.positions.long()[None],
            use_cache=False,
            **(wanted if self._keeps else {}),
        ).logits[0]
        return logits if self._keeps or batch.wanted is None else logits[batch.wanted]

    def hidden(
        self, attention: Attention, batch: ModelInputs | PagedBatch, deltas: Adds | None
    ) -> torch.Tensor:
        self._attention, self._deltas = attention, deltas
        positions = batch.positions.long()[None]
        return self._states(input_ids=batch.tokens.long()[None], position_ids=positions)

    def _states(self, **inputs: torch.Tensor) -> torch.Tensor:
        outputs = self._body(**inputs, use_cache=False)
        self._outputs = type(outputs)
        states: torch.Tensor = outputs.last_hidden_state[0]
        return states

    def head(
        self, hidden: torch.Tensor, wanted: torch.Tensor | None, deltas: Adds | None
    ) -> torch.Tensor:
        """Logits of states that `hidden` gave. Families scale and cap logits in their own ways, so
        it is their code that computes them, around a body that only returns the states.
        """
        self._deltas, self._wanted = deltas, wanted
        states = hidden if wanted is None else hidden.index_select(0, wanted)
        tokens = torch.zeros(1, len(states), dtype=torch.int64, device=self._device)
        outputs = self._outputs(last_hidden_state=states[None])
        self._body.forward = lambda *_, **__: outputs
        try:
            logits: torch.Tensor = self.modules(input_ids=tokens, use_cache=False).logits[0]
        finally:
            del self._body.forward
        return logits

    def alone(self, tokens: torch.Tensor, deltas: Adds | None) -> torch.Tensor:
        """Logits [tokens, vocab] of one sequence [1, tokens], as transformers computes them."""
        self._deltas, self._wanted = deltas, None
        logits: torch.Tensor = self.modules(input_ids=tokens, use_cache=False).logits[0]
        return logits

    def check_head(self, tokens: torch.Tensor) -> None:
        """Sets `tells_prompts`. tokens: as for `alone`."""
        wanted = self.alone(tokens, None)
        try:
            found = self.head(self._states(input_ids=tokens), None, None)
            self.tells_prompts = torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)
        except Exception:  # the code of a family may raise anything
            self.tells_prompts = False

    def weight(self, layer: int, projection: str) -> torch.Tensor:
        (path,) = (p for p, where in self.shape.modules.items() if where == (layer, projection))
        module = self.modules.get_submodule(path)
        assert isinstance(module.weight, torch.Tensor)
        return module.weight.T if isinstance(module, Conv1D) else module.weight

    def attend(self, layer: int, *settings: Any) -> torch.Tensor:
        return self._attention.attend(self._layer_of[layer], *settings)

    def _add(
        self, module: Any, inputs: tuple[Any, ...], y: torch.Tensor, *, layer: int, group: int
    ) -> None:
        if self._deltas is None:
            return
        x, out = inputs[0].flatten(0, -2), y.flatten(0, -2)
        gained = self._deltas.gained
        if gained is None or module.bias is None:
            self._deltas.add(x, out, layer, group)
            return
        # A gain leaves the bias alone. Other rows' outputs keep every bit.
        bias = module.bias * gained
        out -= bias
        self._deltas.add(x, out, layer, group)
        out += bias

    def _embed(self, module: nn.Module, inputs: tuple[Any, ...], y: torch.Tensor) -> None:
        if self._deltas is not None:
            # Gemma's embeddings multiply by it, and PEFT their deltas too.
            scale = float(getattr(module, "embed_scale", 1.0))
            self._deltas.vocabulary.embed(inputs[0].flatten(), y.flatten(0, -2), scale)

    def _head(self, module: Any, inputs: tuple[Any, ...], y: torch.Tensor) -> None:
        if self._deltas is not None:
            x, logits = inputs[0].flatten(0, -2), y.flatten(0, -2)
            self._deltas.vocabulary.head(x, logits, self._wanted, module.bias)


@dataclass(frozen=True, slots=True)
class TransformersDecoder:
    model: TransformersModel
    attention: Any  # GatherAttention or PagedAttention, as are its batches

    def forward(self, batch: ModelInputs | PagedBatch, deltas: Adds | None) -> torch.Tensor:
        """Logits [outputs, vocab]. deltas: None if all rows use the base model."""
        self.attention.begin(batch)
        return self.model.forward(self.attention, batch, deltas)

    def hidden(self, batch: ModelInputs | PagedBatch, deltas: Adds | None) -> torch.Tensor:
        self.attention.begin(batch)
        return self.model.hidden(self.attention, batch, deltas)

    def head(
        self, hidden: torch.Tensor, wanted: torch.Tensor | None, deltas: Adds | None
    ) -> torch.Tensor:
        return self.model.head(hidden, wanted, deltas)


def _body(modules: PreTrainedModel) -> Any:
    """The module whose states the head gets."""
    decoder = modules.get_decoder()
    return modules.base_model if decoder is modules else decoder


def load_model(
    model_dir: str,
    shape: TransformersShape,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    dummy_seed: int | None = None,
) -> TransformersModel:
    """Raises ModelUnsupported naming a tensor that is missing, misshapen or unknown. dummy_seed:
    seed of random weights, which need no files; None reads the checkpoint.
    """
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": ATTENTION}
    with refusing(model_dir):
        if dummy_seed is not None:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                torch.manual_seed(dummy_seed)
                modules = _from_config(model_dir, settings)
        elif shape.quantization is not None:
            modules = _dequantized(model_dir, shape.quantization, settings)
        else:
            modules, found = AutoModelForCausalLM.from_pretrained(
                model_dir,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                **settings,
            )
            _check_found(found)
    return TransformersModel(shape, context, modules.to(device).eval().requires_grad_(False))


def _from_config(model_dir: str, settings: Mapping[str, Any]) -> Any:
    config = read_config(model_dir)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)


def _dequantized(model_dir: str, quantization: Quantization, settings: Mapping[str, Any]) -> Any:
    """transformers renames and fuses the dequantized weights, as those of experts."""
    with torch.device("meta"):
        empty = _from_config(model_dir, settings)
    path, device = Path(model_dir), torch.device("cpu")
    with StoredCheckpoint(path, settings["dtype"], device, quantization) as checkpoint:
        modules, found = type(empty).from_pretrained(
            None,
            config=empty.config,
            state_dict=checkpoint.all_later(),
            output_loading_info=True,
            **settings,
        )
        if not checkpoint.has_bias():  # those that were not read are GPTQ's zeros
            unexpected = found["unexpected_keys"]
            found["unexpected_keys"] = {key for key in unexpected if not key.endswith(".bias")}
    _check_found(found)
    return modules


def _check_found(found: Mapping[str, Any]) -> None:
    """found: what transformers tells about loading."""
    for what in ("missing", "mismatched", "unexpected"):
        for key in sorted(map(str, found[f"{what}_keys"]))[:1]:
            raise ModelUnsupported(f"{what} tensor {key}", field="model")
