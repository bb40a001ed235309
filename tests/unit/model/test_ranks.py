"""A model divided between ranks gives the logits of the whole model. Here ranks are threads."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from cluster.config import EngineConfig
from cluster.errors import ConfigError
from replica.adapters.image import read_image
from replica.engine.runner import Runner
from replica.model.families import MIXTURES
from replica.model.launch import Row
from replica.model.ranks import Ranks
from replica.model.shape import ModelShape, Shard, read_shape
from replica.scheduling.request import Sampling
from tests.models import TARGETS, make_adapter, make_model
from tests.quantized import SCHEMES, write_quantized

TOLERANCE = 1e-4
VOCAB = 320
EVERYTHING = Sampling(temperature=0.0, logprobs=VOCAB)
T = TypeVar("T")


class ThreadRanks(Ranks):
    """Collective operations between threads, with a barrier."""

    def __init__(self, shard: Shard, meeting: threading.Barrier, table: list[Any]) -> None:
        self.shard = shard
        self.device = torch.device("cpu")
        self._meeting, self._table = meeting, table

    def all(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._table[self.shard.rank] = x.clone()
        self._meeting.wait(30)
        found = [part.clone() for part in self._table]
        self._meeting.wait(30)
        return found

    def all_reduce(self, x: torch.Tensor) -> None:
        x.copy_(torch.stack(self.all(x)).sum(0))

    def share(self, x: torch.Tensor) -> None:
        x.copy_(self.all(x)[0])

    def gather(self, parts: torch.Tensor, x: torch.Tensor) -> None:
        parts.copy_(torch.cat(self.all(x)))

    def least(self, value: int) -> int:
        return min(int(each) for each in self.all(torch.tensor(value)))


class Group:
    """Runners that compute one model together. Slot n of each holds adapter n - 1."""

    def __init__(self, model: str, ranks: int, adapters: Sequence[str] = ()) -> None:
        self.shape = read_shape(model)
        meeting = threading.Barrier(ranks)
        table: list[Any] = [None] * ranks
        self._threads = ThreadPoolExecutor(ranks)
        config = EngineConfig(
            model, device="cpu", threads=1, batch_rows_max=8, tensor_parallel=ranks
        )

        def start(rank: int) -> Runner:
            shard = Shard(rank, ranks)
            own = ThreadRanks(shard, meeting, table) if ranks > 1 else None
            runner = Runner(config, self.shape, own)
            offset = 0
            for slot, path in enumerate(adapters, start=1):
                image = read_image(path, self.shape, torch.float32, shard=shard)
                runner.arena.copy_in(offset, image)
                runner.arena.place(slot, offset, image.layout)
                offset += -(-image.bytes // 256) * 256
            return runner

        self.runners = self._each(start, ranks)

    def run(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Log-probabilities of the rows, [vocab] each."""
        found = self._each(lambda rank: self.runners[rank].run(rows), len(self.runners))
        tokens = [[sampled and sampled.token for sampled in each] for each in found]
        assert tokens == [tokens[0]] * len(found)
        logprobs = []
        for sampled in found[0]:
            assert sampled is not None and sampled.logprobs is not None
            values = torch.empty(VOCAB)
            for token, value in sampled.logprobs.top:
                values[token] = value
            logprobs.append(values)
        return logprobs

    def close(self) -> None:
        self._threads.shutdown()

    def _each(self, call: Callable[[int], T], ranks: int) -> list[T]:
        return list(self._threads.map(call, range(ranks)))


def steps(group: Group, slots: Sequence[int]) -> list[torch.Tensor]:
    """One prompt per slot in one batch, then two single tokens for each."""
    generator = torch.Generator().manual_seed(5)
    found = []
    texts = [torch.randint(6, VOCAB, (9 + 5 * n,), generator=generator).tolist() for n in slots]
    starts = [0 for _ in slots]
    for _ in range(3):
        rows = [
            Row(text[start:], start, [4 * i, 4 * i + 1, 4 * i + 2], slot, EVERYTHING, 0, 0)
            for i, (text, start, slot) in enumerate(zip(texts, starts, slots, strict=True))
        ]
        found += group.run(rows)
        starts = [len(text) for text in texts]
        texts = [[*text, 7 + i] for i, text in enumerate(texts)]
    return found


MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama": ("llama", 2, {}),
    "llama-biases-tied": (
        "llama",
        2,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-4-ranks": ("llama", 4, {"num_key_value_heads": 4}),
    "llama-odd-vocabulary": ("llama", 2, {"vocab_size": VOCAB - 1}),
    "mistral-window": ("mistral", 2, {"sliding_window": 8}),
    "qwen2": ("qwen2", 2, {}),
    "qwen3": ("qwen3", 2, {"head_dim": 32}),
    "granite": ("granite", 2, {"residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "gemma2": ("gemma2", 2, {"sliding_window": 8}),
    "gemma3": ("gemma3_text", 2, {"sliding_window": 8}),
    "phi3": ("phi3", 2, {"pad_token_id": 2}),
    "mixtral": ("mixtral", 2, {"num_local_experts": 4}),
    "qwen3-moe": ("qwen3_moe", 2, {"num_experts": 8, "moe_intermediate_size": 32}),
}


@pytest.mark.filterwarnings(r"ignore:Model has .tie_word_embeddings:UserWarning:peft\..*")
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_all_ranks_together_are_those_of_one(name: str, tmp_path: Path) -> None:
    architecture, ranks, settings = MODELS[name]
    model = make_model(tmp_path / "model", architecture, **settings)
    some, every = ("q_proj", "o_proj", "up_proj"), TARGETS
    if architecture == "phi3":
        some = every = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    if architecture in MIXTURES:
        some = every = TARGETS[:4]
    adapters = [
        make_adapter(
            tmp_path / "a",
            model,
            rank=4,
            targets=(*some, "lm_head", "embed_tokens"),
            saving={"save_embedding_layers": False},
        ),
        make_adapter(
            tmp_path / "b", model, rank=16, targets=every, seed=2, layers_to_transform=[0, 2]
        ),
    ]
    slots = [1, 0, 2, 1]
    alone, together = Group(model, 1, adapters), Group(model, ranks, adapters)
    whole, parts = steps(alone, slots), steps(together, slots)
    for i, (own, theirs) in enumerate(zip(parts, whole, strict=True)):
        assert (own - theirs)[: alone.shape.vocab].abs().max() <= TOLERANCE, i
    base = steps(alone, [0] * 4)
    assert (whole[0] - base[0]).abs().max() > 0.1, "the adapters hardly do anything"
    for group in (alone, together):
        group.close()


@pytest.mark.parametrize("name", ["awq", "gptq, act-order", "packed", "fp8 blocks"])
def test_ranks_share_a_quantized_model(name: str, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    plain = make_model(tmp_path / "plain", scheme.architecture)
    quantized = write_quantized(plain, tmp_path / "quantized", scheme)
    alone, together = Group(plain, 1), Group(quantized, 2)
    whole, parts = steps(alone, [0, 0]), steps(together, [0, 0])
    for own, theirs in zip(parts, whole, strict=True):
        assert (own - theirs).abs().max() <= TOLERANCE
    for group in (alone, together):
        group.close()


@pytest.mark.parametrize(
    ("ranks", "named"), [(3, "heads"), (4, "kv_heads equally, there are 2"), (5, "heads")]
)
def test_a_model_that_ranks_cannot_share(ranks: int, named: str, tmp_path: Path) -> None:
    shape: ModelShape = read_shape(make_model(tmp_path))
    with pytest.raises(ConfigError, match=rf"tensor_parallel: {ranks} .* {named}") as refused:
        shape.divided(ranks)
    assert refused.value.field == "tensor_parallel"


def test_each_rank_holds_its_part_and_no_more(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    alone, together = Group(model, 1), Group(model, 2)
    (whole,), (first, _) = alone.runners, together.runners
    assert first._executor.cache.numel() * 2 == whole._executor.cache.numel()
    assert first.shape.projections["q_proj"] == (64, 32)
    assert first.shape.projections["down_proj"] == (48, 64)
    for group in (alone, together):
        group.close()
