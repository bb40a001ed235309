"""The fused kernels against `reference.py`, and that against what the CPU's decoder computes."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from lora_kernels import fused, ops, reference
from replica.model import sampling
from replica.model.decoder import rotary_tables
from replica.model.gather_attention import GatherAttention, ModelInputs
from replica.model.gather_backend import GatherBackend
from replica.model.logit_rules import Draw
from replica.model.sampling import sample, uniforms
from replica.model.shape import read_shape
from replica.model.weights import Layer
from replica.scheduling.request import Sampling
from tests.models import make_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Both sides round once, from float32: they differ by a unit in the last place at most. In float32
# itself by the order of a sum of up to 129 squares and by its root (129 / 2 roundings of 6e-8), or
# by an exponential's argument, 16 and more, which is rounded.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def randn(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*size, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    if found.dtype != torch.float32:
        # One rounding more, or one less, shows in a tenth of the numbers and more.
        assert (found == wanted).float().mean() > 0.97


@pytest.mark.parametrize("hidden", [1, 16, 40, 129])
def test_rms_norm(hidden: int, kernel_dtype: torch.dtype) -> None:
    x, weight = randn(3, hidden, dtype=kernel_dtype), randn(hidden, dtype=kernel_dtype, seed=1)
    wanted = reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(wanted, F.rms_norm(x, weight.shape, weight, 1e-5))
    close(fused.rms_norm(x, weight, 1e-5), wanted)
    # Rows of a wider tensor.
    wide = randn(3, hidden + 7, dtype=kernel_dtype)
    wide[:, :hidden] = x
    wide[:, hidden:] = float("nan")
    close(fused.rms_norm(wide[:, :hidden], weight, 1e-5), wanted)


def test_no_rows() -> None:
    weight = torch.ones(8, device=DEVICE)
    assert fused.rms_norm(weight.new_empty(0, 8), weight, 1e-5).shape == (0, 8)
    assert fused.silu_mul(weight.new_empty(0, 8)).shape == (0, 4)
    none = weight.new_empty(0)
    assert fused.choose(weight.new_empty(0, 8), none, none).shape == (0, 2)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_add_rms_norm_leaves_the_sum_behind(scale: float, kernel_dtype: torch.dtype) -> None:
    x, held = randn(3, 40, dtype=kernel_dtype), randn(3, 40, dtype=kernel_dtype, seed=1)
    weight, again = randn(40, dtype=kernel_dtype, seed=2), held.clone()
    normed = fused.add_rms_norm(x, held, weight, 1e-5, scale)
    close(normed, reference.add_rms_norm(x, again, weight, 1e-5, scale))
    assert torch.equal(held, again)
    assert torch.equal(held, x * scale + randn(3, 40, dtype=kernel_dtype, seed=1))


@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul"])
@pytest.mark.parametrize("inner", [5, 48, fused._GATED_BLOCK + 3])
def test_gated(inner: int, name: str, kernel_dtype: torch.dtype) -> None:
    gate_up = randn(2, 2 * inner, dtype=kernel_dtype) * 4
    gate_up[0, 0], gate_up[1, 0] = 60, -60
    wanted = getattr(reference, name)(gate_up)
    found = getattr(ops, name)(gate_up.float()).to(kernel_dtype)
    if name == "silu_mul":
        close(found, wanted)
    # torch's GELU loses digits near 0, where it is 1 + tanh.
    tolerance = TOLERANCE[kernel_dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    close(getattr(fused, name)(gate_up), wanted)


class Cache:
    """One layer's keys and values as views of a page-major cache, and a batch of five tokens."""

    pages, layers, page_tokens = 4, 3, 4

    def __init__(self, kv_heads: int, size: int, dtype: torch.dtype) -> None:
        shape = (self.pages, self.layers, 2, kv_heads, self.page_tokens, size)
        self.memory = randn(*shape, dtype=dtype, seed=9)
        self.keys, self.values = self.memory[:, 1, 0], self.memory[:, 1, 1]


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 1, 16), (3, 3, 12), (8, 2, 8)])
@pytest.mark.parametrize("few", [0, 256])
def test_rotary_store(
    heads: int,
    kv_heads: int,
    size: int,
    norms: bool,
    kernel_dtype: torch.dtype,
    few: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "_TOKENS_FEW", few)
    found, wanted = (Cache(kv_heads, size, kernel_dtype) for _ in range(2))
    qkv = randn(5, heads + 2 * kv_heads, size, dtype=kernel_dtype)
    angles = randn(32, size // 2, seed=3)
    cos, sin = angles.cos(), angles.sin()
    tables = torch.cat((cos, cos), -1).to(kernel_dtype), torch.cat((-sin, sin), -1).to(kernel_dtype)
    positions = torch.tensor([0, 7, 31, 8, 0], dtype=torch.int32, device=DEVICE)
    # The last two are padding: one place of the dummy page, whatever lands there.
    targets = torch.tensor([3, 4, 11, 15, 15], dtype=torch.int64, device=DEVICE)
    gains = [randn(size, dtype=kernel_dtype, seed=seed) if norms else None for seed in (5, 6)]
    mine, theirs = qkv.clone(), qkv.clone()
    fused.rotary_store(
        mine, positions, *tables, found.keys, found.values, targets, gains[0], gains[1], 1e-5
    )
    reference.rotary_store(
        theirs, positions, *tables, wanted.keys, wanted.values, targets, gains[0], gains[1], 1e-5
    )
    close(mine, theirs)
    assert torch.equal(mine[:, heads:], qkv[:, heads:]), "keys and values in the batch stay"
    for memory in (found.memory, wanted.memory):
        memory[-1] = 0
    close(found.memory, wanted.memory)
    untouched = Cache(kv_heads, size, kernel_dtype).memory
    untouched[-1] = 0
    assert torch.equal(found.memory[:, [0, 2]], untouched[:, [0, 2]]), "another layer's"


@pytest.mark.parametrize("targets_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("norms", [False, True])
def test_rotary_store_is_what_the_decoder_does(
    norms: bool, targets_type: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape = read_shape(make_model(tmp_path_factory.mktemp("fused") / "model"))
    tables = rotary_tables(shape, 32, torch.float32, torch.device("cpu"))
    heads, kv_heads, size = shape.heads, shape.kv_heads, shape.head_dim
    gains = [randn(size, seed=seed).cpu() if norms else None for seed in (5, 6)]
    empty = torch.empty(0)
    layer = Layer((), (), empty, empty, gains[0], gains[1])
    qkv = randn(4, heads + 2 * kv_heads, size).cpu()
    positions, targets = torch.tensor([3, 0, 17, 31]), torch.tensor([5, 0, 7, 2])
    cache = torch.zeros(2, kv_heads, 2, 4, size)
    theirs = qkv.clone()
    attention = GatherAttention(cache[None])
    backend = GatherBackend(shape, tables, attention)
    none = torch.tensor([], dtype=torch.int64)
    backend.begin(ModelInputs(none, positions, targets, none, [], none))
    backend.rotate(theirs, layer, backend._turns)
    attention.store(0, theirs[:, heads:-kv_heads], theirs[:, -kv_heads:])
    memory = torch.zeros(2, 2, kv_heads, 4, size, device=DEVICE)
    mine = qkv.to(DEVICE)
    fused.rotary_store(
        mine,
        positions.to(DEVICE, torch.int32),
        tables[0].to(DEVICE),
        tables[1].to(DEVICE),
        memory[:, 0],
        memory[:, 1],
        targets.to(DEVICE, targets_type),
        *[None if gain is None else gain.to(DEVICE) for gain in gains],
        shape.norm_eps,
    )
    close(mine[:, :heads].cpu(), theirs[:, :heads])
    close(memory.cpu(), cache.permute(2, 0, 1, 3, 4))


def chosen(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    heat = torch.full((len(logits),), temperature, device=DEVICE)
    tokens, finite = fused.choose(logits.to(DEVICE), heat, uniform.to(DEVICE)).cpu().unbind(1)
    assert finite.tolist() == [1] * len(logits)
    return tokens


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_CHOICE_BLOCK", 64)


@pytest.mark.parametrize("vocab", [3, 64, 65, 300])
def test_greedy_is_the_first_of_the_largest(
    kernel_dtype: torch.dtype, vocab: int, small_blocks: None
) -> None:
    # Few different values: many are the largest, in several blocks.
    logits = randn(6, vocab, dtype=kernel_dtype).round()
    found = chosen(logits, 0.0, torch.zeros(6))
    assert found.dtype == torch.int64
    assert found.tolist() == logits.max(-1).indices.tolist()
    assert found.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("vocab", [3, 64, 300])
def test_a_draw_is_what_the_engine_draws_on_a_cpu(
    temperature: float, vocab: int, small_blocks: None
) -> None:
    logits = randn(12, vocab).cpu() * 3
    draws = [Draw(Sampling(temperature=temperature), 7, position, 0) for position in range(12)]
    uniform = torch.from_numpy(uniforms([7] * 12, range(12))).float()
    wanted = [s.token for s in sample(logits, draws, frozenset())]
    heat = torch.full((12,), temperature)
    assert reference.choose(logits, heat, uniform)[:, 0].tolist() == wanted
    # Sums in another order: now and then a number between two shares falls to the other side.
    found = chosen(logits, temperature, uniform)
    assert torch.equal(found, chosen(logits, temperature, uniform))
    ends = (logits.double() / temperature).softmax(-1).cumsum(-1)
    for row, token in enumerate(found.tolist()):
        begin = float(ends[row, token - 1]) if token else 0.0
        assert begin - 1e-5 <= uniform[row] <= float(ends[row, token]) + 1e-5
    assert sum(a != b for a, b in zip(found.tolist(), wanted, strict=True)) <= 1


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_nothing_of_probability_zero_is_chosen(uniform: float, small_blocks: None) -> None:
    logits = randn(4, 300).cpu() * 4
    # Whole blocks are ruled out, and both ends of the only ones that are not.
    logits[:, :70] = logits[:, 128:200] = logits[:, 210:] = float("-inf")
    found = chosen(logits, 1.0, torch.full((4,), uniform))
    assert torch.isfinite(logits.gather(1, found[:, None])).all()
    assert uniform != 0 or (found == 70).all()
    assert uniform != 1 - 2**-24 or (found >= 200).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter.
def test_rows_of_all_kinds_in_one_batch(small_blocks: None) -> None:
    logits = randn(6, 200).cpu()
    logits[[1, 5]] = float("nan")
    logits[2] = float("-inf")
    logits[3, 77] = float("inf")
    heat = torch.tensor([0.0, 1.0, 1.0, 1.0, 1e-6, 0.0], device=DEVICE)
    uniform = torch.full((6,), 0.4, device=DEVICE)
    found = fused.choose(logits.to(DEVICE), heat, uniform)[:, 0].tolist()
    # Nothing but any token at all is asked of those that are not finite.
    assert all(0 <= token < 200 for token in found)
    assert found[0] == int(logits[0].argmax()) and found[4] == int(logits[4].argmax())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("choose", [fused.choose, reference.choose])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_that_are_not_finite_are_told(
    choose: Callable[..., torch.Tensor],
    temperature: float,
    kernel_dtype: torch.dtype,
    small_blocks: None,
) -> None:
    logits = randn(7, 200, dtype=kernel_dtype)
    logits[1] = float("nan")
    logits[2, 77] = float("nan")
    logits[3, 199] = float("inf")
    logits[4] = float("-inf")
    logits[5, :150] = float("-inf")  # ruled out, and whole blocks of it
    heat = torch.full((7,), temperature, device=DEVICE)
    tokens, finite = choose(logits, heat, torch.full((7,), 0.4, device=DEVICE)).unbind(1)
    assert finite.tolist() == [1, 0, 0, 0, 0, 1, 1]
    assert ((tokens >= 0) & (tokens < 200)).all()
    alone = choose(logits[[0, 5, 6]], heat[:3], torch.full((3,), 0.4, device=DEVICE))[:, 0]
    assert tokens[[0, 5, 6]].tolist() == alone.tolist()


def test_draws_follow_the_probabilities(small_blocks: None) -> None:
    row = torch.zeros(130).fill_(float("-inf"))
    row[[2, 60, 66, 129]] = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    uniform = (torch.arange(20) + 0.5) / 20
    found = chosen(row.expand(20, -1).contiguous(), 1.0, uniform)
    assert torch.bincount(found, minlength=130)[[2, 60, 66, 129]].tolist() == [2, 4, 6, 8]


EOS = frozenset({0})
LOGPROBS: tuple[int | None, ...] = (None, 0, 3)


def draws_of_all_kinds() -> list[Draw]:
    """Each row with a seed, at a place in the sequence, and before its `min_tokens` or after."""
    settings = [
        Sampling(temperature=heat, top_k=top_k, top_p=top_p, min_tokens=2, logprobs=logprobs)
        for heat in (0.0, 0.7)
        for top_k, top_p in ((0, 1.0), (4, 1.0), (0, 0.6), (9, 0.8))
        for logprobs in LOGPROBS
    ]
    return [Draw(each, n, 3 * n, n % 4) for n, each in enumerate(settings)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_all_kinds_of_rows_are_chosen_as_on_a_cpu(small_blocks: None) -> None:
    draws = draws_of_all_kinds()
    logits = randn(len(draws), 150) * 3
    logits[:, 0] = 4.0
    overflowed = {3, len(draws) - 1}
    logits[list(overflowed), 7] = float("nan")
    rules = sampling.prepare(draws, EOS, 150, logits.device, kernel=True)
    choice = sampling.choose(logits, rules).to_host()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    found, wanted = sampling.read(choice, draws), sample(logits.cpu(), draws, EOS)
    for row, (draw, mine, theirs) in enumerate(zip(draws, found, wanted, strict=True)):
        assert mine.finite == theirs.finite == (row not in overflowed)
        if row in overflowed:
            continue
        assert mine.token == theirs.token
        assert mine.token != 0 or draw.generated >= 2, "the end comes after min_tokens"
        assert (mine.logprobs is None) == (theirs.logprobs is None)
        if mine.logprobs is not None and theirs.logprobs is not None:
            assert mine.logprobs.token == mine.token
            assert mine.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-5)
            assert [t for t, _ in mine.logprobs.top] == [t for t, _ in theirs.logprobs.top]


def test_choosing_reads_nothing_back() -> None:
    """A fake tensor has no values: whatever wanted one, and would wait for it, raises."""
    draws = draws_of_all_kinds()
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.empty(len(draws), 150)
        rules = sampling.prepare(draws, EOS, 150, logits.device, kernel=False)
        choice = sampling.choose(logits, rules)
        assert choice.tokens.shape == (len(draws), 2) and choice.logprobs is not None
        with pytest.raises(DataDependentOutputException):
            sampling.read(choice, draws)
