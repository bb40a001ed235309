"""Configurations and headers that are mutated at random: each is answered in time, and what is
registered has the same effect as before.

    python -m pytest tests/unit/adapters/test_mutated_files.py --mutants 2000
"""

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.adapter_paths import CONFIG_FILE, TENSORS_FILE
from cluster.errors import AdapterRefused
from replica.adapters.adapter_files import AdapterFiles, inspect, read_adapter
from replica.model.shape import ModelShape, read_shape
from tests.small_files import write_adapter, write_model_config

ANSWER_S = 2.0  # of this process' own time
RANK_MAX = 64
# Ends a pattern that matches no module, for which `re` would take minutes.
SLOW = "(.?)Z"
# What people and attackers write where PEFT expects something else.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf")),
    *("", "q_proj", "all-linear", "LORA", "none", "\ud800", "\0", "é" * 100, "x" * 5000),
    *("(.?)" * 60 + "Z", "((a*)*)*", "(?=q)", "a{,3}", "[[:alpha:]]", "(", "\\1", ".{1000}{1000}"),
    *([], ["q_proj"], ["v_proj"], [0], [[]], [None], {}, {"q_proj": 2}, {"q_proj": -1}),
    *({"(.?)" * 60 + "Z": 2}, {"": 2}, {"a": {"b": []}}, [["q_proj"] * 100] * 100),
)
FIELDS = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias"),
    *("use_dora", "modules_to_save", "init_lora_weights", "fan_in_fan_out", "new_in_peft_99"),
)


class Late(Exception):
    pass


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return read_shape(write_model_config(tmp_path_factory.mktemp("base")))


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fails a test that computes for longer in one go: `signal.setitimer` is armed by `answer`."""

    def late(*_: object) -> None:
        raise Late(f"no answer after {ANSWER_S} s")

    before = signal.signal(signal.SIGVTALRM, late)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def answer(path: Path, shape: ModelShape) -> AdapterFiles | None:
    """None if it is refused. Raises Late."""
    signal.setitimer(signal.ITIMER_VIRTUAL, ANSWER_S)
    try:
        inspect(str(path), shape, RANK_MAX)
        return read_adapter(str(path), shape)
    except AdapterRefused as error:
        assert error.message.encode() and error.field == "lora_path"
        return None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def mutated(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value in which one place is another."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice(sorted(value))
        copy = dict(value)
        kind = draw.randrange(4)
        if kind == 0:
            del copy[name]
        elif kind == 1:
            other = name[: draw.randint(0, len(name))] + draw.choice(("", "A", "\0", "_"))
            copy[other] = value[name]
        else:
            copy[name] = mutated(value[name], draw)
        return copy
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], mutated(value[at], draw), *value[at + 1 :]]
    if isinstance(value, int) and draw.random() < 0.5:
        return value + draw.choice((-1, 1, 8, 2**31))
    return draw.choice(VALUES)


def scrambled(data: bytes, draw: random.Random) -> bytes:
    """Some bytes are others, missing or there twice."""
    at, size = draw.randrange(len(data)), draw.choice((1, 1, 2, 30))
    middle = draw.choice((b"", draw.randbytes(size), data[at : at + size] * 2))
    return data[:at] + middle + data[at + size :]


def expected(config: dict[str, Any], files: AdapterFiles) -> bool:
    """True if PEFT, asked itself, gives each module of the adapter this rank and scale."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    fields = LoraConfig.__dataclass_fields__
    theirs = LoraConfig(**{k: v for k, v in config.items() if k in fields and k != "peft_type"})
    if str(theirs.target_modules).lower() == "all-linear":
        theirs.target_modules = {"q_proj"}  # as PEFT does, from the model's modules
    if str(theirs.exclude_modules).endswith(SLOW):
        theirs.exclude_modules = None
    for (layer, projection), pair in files.pairs.items():
        module = f"model.layers.{layer}.self_attn.{projection}"
        ranks, alphas = (
            {key: value for key, value in (patterns or {}).items() if not key.endswith(SLOW)}
            for patterns in (theirs.rank_pattern, theirs.alpha_pattern)
        )
        rank = ranks.get(get_pattern_key(ranks, module), theirs.r)
        alpha = alphas.get(get_pattern_key(alphas, module), theirs.lora_alpha)
        scale = alpha / (rank**0.5 if theirs.use_rslora else rank)
        if not check_target_module_exists(theirs, module):
            return False
        if (rank, scale) != (pair.rank, pair.scale):
            return False
    return True


def test_mutated_configurations(
    seed: int, mutants: int, shape: ModelShape, tmp_path: Path, in_time: None
) -> None:
    draw = random.Random(seed)
    path = Path(write_adapter(tmp_path / "a"))
    original = json.loads((path / CONFIG_FILE).read_text())
    registered = 0
    for number in range(mutants):
        config = dict(original)
        for _ in range(draw.randint(1, 3)):
            if draw.random() < 0.7:
                config[draw.choice(FIELDS)] = draw.choice(VALUES)
            else:
                found = mutated(config, draw)
                config = dict(found if isinstance(found, dict) else original)
        (path / CONFIG_FILE).write_text(json.dumps(config))
        files = answer(path, shape)
        if files is not None:
            registered += 1
            assert expected(config, files), f"mutant {number} of seed {seed}: {config}"
    assert 0 < registered < mutants


def test_scrambled_configurations(
    seed: int, mutants: int, shape: ModelShape, tmp_path: Path, in_time: None
) -> None:
    draw = random.Random(seed)
    path = Path(write_adapter(tmp_path / "a"))
    original = (path / CONFIG_FILE).read_bytes()
    for _ in range(mutants):
        (path / CONFIG_FILE).write_bytes(scrambled(original, draw))
        files = answer(path, shape)
        if files is not None:
            assert expected(json.loads((path / CONFIG_FILE).read_text()), files)


def test_mutated_headers(
    seed: int, mutants: int, shape: ModelShape, tmp_path: Path, in_time: None
) -> None:
    draw = random.Random(seed)
    path = Path(write_adapter(tmp_path / "a"))
    file = path / TENSORS_FILE
    original = file.read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    header = json.loads(original[8:end])
    wanted = read_adapter(str(path), shape)
    registered = 0
    for number in range(mutants):
        if not number:  # the same, written otherwise
            text = json.dumps(header, indent=1).encode()
        elif number % 2:
            text = json.dumps(mutated(header, draw)).encode()
        else:
            text = scrambled(original[8:end], draw)
        length = len(text) + (draw.choice((0,) * 8 + (1, -1, 2**40)) if number else 0)
        file.write_bytes(max(length, 0).to_bytes(8, "little") + text + original[end:])
        files = answer(path, shape)
        if files is not None:
            registered += 1
            assert (files.pairs.keys(), files.vocabulary) == (wanted.pairs.keys(), {})
            # The data may begin elsewhere, after a longer header.
            moved = {
                ours.begin - theirs.begin
                for where, pair in files.pairs.items()
                for ours, theirs in zip(
                    (pair.a, pair.b), (wanted.pairs[where].a, wanted.pairs[where].b), strict=True
                )
            }
            assert len(moved) == 1
            for where, pair in files.pairs.items():
                other = wanted.pairs[where]
                assert (pair.rank, pair.scale) == (other.rank, other.scale)
                for ours, theirs in ((pair.a, other.a), (pair.b, other.b)):
                    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert 0 < registered < mutants
