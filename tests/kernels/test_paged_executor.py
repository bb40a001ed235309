"""The paged path gives what the gathering one gives: batches of all kinds, padded, carried on."""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import EngineConfig
from cluster.errors import ConfigError, ModelUnsupported, StartupError
from cluster.values import Version
from replica.adapters.adapter_files import inspect
from replica.adapters.image import read_image
from replica.engine.engine import Engine
from replica.model import graphs
from replica.model.gather_executor import GatherExecutor
from replica.model.graphs import Captured, CudaCapture, Work
from replica.model.paged_batch import PackedRows
from replica.model.paged_executor import PagedExecutor
from replica.scheduling.request import NewRequest, Sampling
from tests.kernels.pipelined import (
    GREEDY,
    REPORT,
    TELL,
    TINY,
    VOCAB,
    WARM,
    adapters_of,
    assert_alike,
    load,
    run_both,
    texts_of,
)
from tests.kernels.recorded import Recorder
from tests.models import make_adapter, make_model
from tests.until import WORK_S

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2}
        | {"logits_scaling": 2.5},
    ),
    "gemma2": (
        "gemma2",
        {"sliding_window": 9, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 8.0}
        | {"query_pre_attn_scalar": 24},
    ),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("phi3", {"pad_token_id": 2}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    # Through transformers' own modules.
    "olmo3": ("olmo3", {"sliding_window": 9}),
}


GRADIENTS = True  # as in an engine, whose loaders know nothing of inference mode


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    architecture, settings = MODELS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    return make_model(directory / "model", architecture, **TINY | settings)


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return make_model(tmp_path / "model", **TINY)


def test_kernels_give_the_logprobs_of_torch(model: str, tmp_path: Path) -> None:
    adapters = adapters_of(tmp_path, model)
    runners = [load(model, adapters, kernels=kernels) for kernels in ("torch", "triton")]
    executor = runners[1]._executor
    assert isinstance(executor, PagedExecutor)
    executor.cache.fill_(float("nan"))  # What a page's former owner left must not matter.
    texts = texts_of((11, 2, 2, REPORT), (7, 4, 1, REPORT), (1, 3, 0, GREEDY), (3, 2, 3, WARM))
    run_both(runners, texts, random.Random(1), chunk_max=6)


@pytest.mark.usefixtures("by_reference")
def test_batches_of_all_kinds_give_what_torch_gives(model: str, tmp_path: Path, seed: int) -> None:
    adapters = adapters_of(tmp_path, model)
    runners = [load(model, adapters, kernels=kernels) for kernels in ("torch", "triton")]
    executor = runners[1]._executor
    assert isinstance(executor, PagedExecutor)
    executor.warm()
    narrow = Sampling(temperature=1.0, top_k=9, top_p=0.8)
    late = Sampling(temperature=0.0, min_tokens=8, stop_tokens=frozenset(range(0, VOCAB, 2)))
    texts = texts_of(
        (40, 9, 1, REPORT),
        (1, 30, 0, GREEDY),
        (23, 12, 2, WARM),
        (17, 20, 3, narrow),
        (9, 25, 2, late),
        (30, 14, 0, TELL),
    )
    assert run_both(runners, texts, random.Random(seed), chunk_max=12) > 30
    steps_of_single_tokens = texts_of((9, 2, 1, TELL), (3, 9, 0, GREEDY))
    run_both(runners, steps_of_single_tokens, random.Random(seed), chunk_max=1)


@pytest.mark.usefixtures("by_reference")
def test_steps_whose_adapters_change_the_vocabulary_are_not_replayed(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = {"save_embedding_layers": False}
    targets = ("v_proj", "lm_head", "embed_tokens")
    own = make_adapter(tmp_path / "own", llama, rank=4, targets=targets, saving=saving)
    adapters = [*adapters_of(tmp_path, llama), own]
    runners = [load(llama, adapters, kernels=kernels) for kernels in ("torch", "triton")]
    executor = runners[1]._executor
    assert isinstance(executor, PagedExecutor) and executor._graphs is not None
    replayed: set[int] = set()
    replay = executor._graphs.replay

    def recorded(packed: PackedRows, lora: bool) -> None:
        replayed.update(row.slot for row in packed.rows)
        replay(packed, lora)

    monkeypatch.setattr(executor._graphs, "replay", recorded)
    texts = texts_of((9, 9, 4, REPORT), (4, 17, 1, REPORT), (17, 4, 4, WARM), (3, 19, 0, REPORT))
    run_both(runners, texts, random.Random(1), chunk_max=8)
    assert replayed == {0, 1}


@pytest.mark.usefixtures("by_reference")
def test_a_model_of_transformers_is_not_captured_and_its_heads_are_of_one_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = make_model(tmp_path / "even", "olmo3", **TINY)
    executor = load(model_dir, kernels="triton")._executor
    assert isinstance(executor, PagedExecutor)
    assert executor._graphs is None
    uneven = make_model(tmp_path / "uneven", "gemma4_text", **TINY, global_head_dim=64)
    with pytest.raises(ModelUnsupported, match="set `kernels: torch`"):
        load(uneven, kernels="triton")
    # What nobody chose gives way.
    monkeypatch.setattr("replica.engine.runner._kernels", lambda *_: "triton")
    assert isinstance(load(uneven)._executor, GatherExecutor)


@pytest.mark.usefixtures("by_reference")
def test_rows_whose_sampling_looks_back_see_the_token_in_flight(
    llama: str, seed: int, tmp_path: Path
) -> None:
    runners = [load(llama, adapters_of(tmp_path, llama), kernels=k) for k in ("torch", "triton")]
    penalties = Sampling(
        temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.7
    )
    barred = (*((a, b) for a in range(VOCAB) for b in (a, 5)), (7, 8, 9), (11,))
    texts = texts_of(
        (12, 12, 1, penalties),
        (5, 12, 0, Sampling(temperature=0.0, bad_words=barred, logit_bias=((5, 3.0),))),
        (9, 12, 2, Sampling(temperature=0.0, frequency_penalty=2.0, min_p=0.1)),
        (3, 12, 0, GREEDY),
        (7, 12, 3, Sampling(frequency_penalty=-2.0, bad_words=barred)),
    )
    assert run_both(runners, texts, random.Random(seed), chunk_max=12) > 12
    for text in texts:
        assert len(text.out) == 12
        if text.sampling.bad_words:
            pairs = set(zip(text.out, text.out[1:], strict=False))
            assert not pairs & set(barred)


@pytest.mark.skipif(torch.cuda.is_available(), reason="graphs can be captured here")
def test_a_graph_is_replayed_with_other_rows_lengths_and_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "buckets", lambda rows_max: [rows_max])
    model_dir = make_model(tmp_path / "model", **TINY | {"num_hidden_layers": 1})
    adapters = adapters_of(tmp_path, model_dir)
    runners = [
        load(model_dir, adapters, kernels="torch", batch_rows_max=4),
        load(model_dir, adapters, kernels="triton", batch_rows_max=4, cuda_graphs=False),
    ]
    recorder = Recorder(monkeypatch)
    executor = runners[1]._executor
    assert isinstance(executor, PagedExecutor)
    executor.capture(recorder)

    texts = texts_of((9, 4, 1, REPORT), (2, 5, 2, GREEDY), (17, 3, 3, WARM), (1, 5, 0, REPORT))
    run_both(runners, texts, random.Random(2), chunk_max=20)
    assert recorder.replays >= 3
    other = make_adapter(tmp_path / "other", model_dir, rank=32, seed=9, strength=0.15)
    for runner in runners:
        runner.arena.clear(2)
        image = read_image(other, runner.shape, runner.dtype)
        runner.arena.copy_in(2**19, image)
        runner.arena.place(2, 2**19, image.layout)
    texts = texts_of((3, 3, 2, REPORT), (5, 3, 2, REPORT))
    run_both(runners, texts, random.Random(4), chunk_max=20)
    assert recorder.replays >= 5


def churn(
    model_dir: str,
    paths: Sequence[str],
    requests: int,
    captured: Captured = Captured.AS_CONFIGURED,
    **settings: Any,
) -> dict[str, Any]:
    """Tokens of requests that want adapters in turn, more of them than there are places for."""
    defaults: dict[str, Any] = {"slots_max": 2, "batch_rows_max": 4, "step_tokens_max": 16}
    config = EngineConfig(
        model_dir,
        threads=1,
        device="cpu",
        rank_max=32,
        directory_slots=8,
        seed=0,
        **defaults | settings,
    )
    engine = Engine(config)
    digests: list[str | None] = [None]
    for path in paths:
        info = inspect(path, engine.shape, config.rank_max)
        engine.register(Version(path, info.digest, path, info.rank, info.parameters), path)
        digests.append(info.digest)
    for i in range(requests):
        kinds = {"temperature": float(i % 2), "top_k": 20 * (i % 4 == 1)}
        sampling = Sampling(max_tokens=3 + i % 3, seed=i, **kinds)  # type: ignore[arg-type]
        prompt = tuple(range(2 + i, 9 + 3 * i))
        engine.add(NewRequest(f"{i}", prompt, sampling, digests[i % len(digests)]))
    got: dict[str, list[int]] = {}
    deadline_s = time.monotonic() + WORK_S
    while engine.has_work:
        assert time.monotonic() < deadline_s
        for delta in engine.step():
            assert delta.error is None, delta.error
            got.setdefault(delta.request_id, []).extend(delta.tokens)
        engine.scheduler.check()
    report = engine.report()
    assert report.loads >= len(paths) and report.capture_fallback == captured
    engine.close()
    return got


@pytest.mark.usefixtures("by_reference")
def test_an_engine_under_churn_gives_the_same_tokens(llama: str, tmp_path: Path) -> None:
    paths = adapters_of(tmp_path, llama)
    expected = churn(llama, paths, 16, kernels="torch")
    assert churn(llama, paths, 16, kernels="triton") == expected
    assert churn(llama, paths, 16, kernels="triton", cuda_graphs=False) == expected
    assert churn(llama, paths, 16, kernels="triton", plan_depth=2) == expected


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize("captured", [Captured.WITHOUT_SHRINK_STREAM, Captured.NOT_AT_ALL])
def test_an_engine_whose_captures_fail_starts_without_and_says_so(
    captured: Captured,
    llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    paths = adapters_of(tmp_path, llama)
    expected = churn(llama, paths, 8, kernels="torch")
    begun: list[Work] = []

    def fails_halfway(work: Work) -> Work:
        if not begun:
            begun.append(work)
            return work
        begun.clear()
        failures.append(work)
        raise RuntimeError(f"capture {len(failures)} is invalidated")

    failures: list[Work] = []
    monkeypatch.setattr(
        graphs, "keep", lambda work: work if len(failures) == captured else fails_halfway(work)
    )
    assert churn(llama, paths, 8, captured, kernels="triton") == expected
    said = [record.message for record in caplog.records if record.name == graphs.log.name]
    assert len(said) == captured and "without the shrink's own stream" in said[0]
    assert all(f"capture {n} is invalidated" in text for n, text in enumerate(said, 1))


def test_after_a_failed_capture_lora_uses_no_stream_of_its_own(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def capture(work: Work) -> Work:
        found.append(executor._lora.overlap)
        if len(found) == 1:
            raise RuntimeError("capturing stream has unjoined work")
        return work

    executor = load(llama, kernels="triton", batch_rows_max=1, cuda_graphs=False)._executor
    assert isinstance(executor, PagedExecutor)
    monkeypatch.setattr(graphs, "keep", capture)
    captured = graphs.capture_what_can_be(executor, torch.device("cpu"))
    assert captured is Captured.WITHOUT_SHRINK_STREAM
    assert found == [True, False, False]


def test_an_engine_does_not_start_where_a_failed_capture_has_lost_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(StartupError, match=r"only a new process .* illegal memory access"):
        graphs._recover(torch.device("cpu"))


@pytest.mark.gpu
def test_on_a_gpu_a_capture_that_failed_leaves_streams_and_memory_as_they_were(
    device: torch.device,
) -> None:
    x, side = torch.ones(1000, device=device), torch.cuda.Stream()
    event = torch.cuda.Event()

    def unjoined() -> None:
        x.add_(1)
        if torch.cuda.is_current_stream_capturing():
            event.record()
            side.wait_event(event)
            with torch.cuda.stream(side):
                x.mul_(2)
            torch.cuda.synchronize()

    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        CudaCapture(device)(unjoined)
    assert torch.cuda.current_stream() == before
    graphs._recover(device)
    replay = CudaCapture(device)(lambda: x.add_(1))
    x.zero_()
    replay()
    with torch.cuda.stream(side):
        assert int(torch.ones(3, device=device).sum()) == 3
    torch.cuda.synchronize()
    assert (x == 1).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("reference", [True, False])
def test_rows_beside_an_adapter_that_overflows_give_what_torch_gives(
    llama: str, tmp_path: Path, request: pytest.FixtureRequest, reference: bool
) -> None:
    if reference:
        request.getfixturevalue("by_reference")
    fine = make_adapter(tmp_path / "fine", llama, rank=4, seed=1, strength=0.15)
    hot = make_adapter(tmp_path / "hot", llama, rank=4, seed=2, strength=1e20)
    runners = [load(llama, [fine, hot], kernels=kernels) for kernels in ("torch", "triton")]
    prompts = texts_of((5, 2, 0, GREEDY), (4, 2, 2, GREEDY), (3, 2, 1, REPORT), (5, 2, 2, WARM))
    last: int | None
    for last in (None, 0):  # the prompts, then the tokens that each launch carries over
        rows = [text.row(9, None if last is None else n) for n, text in enumerate(prompts)]
        torch_rows, triton_rows = (runner.launch(rows).results() for runner in runners)
        for results in (torch_rows, triton_rows):
            assert [s and s.finite for s in results] == [True, False, True, False]
        assert_alike(triton_rows[0::2], torch_rows[0::2])


def test_an_engine_gives_the_same_tokens_by_the_kernels_themselves(
    llama: str, tmp_path: Path
) -> None:
    paths = adapters_of(tmp_path, llama)[:2]
    settings = {"slots_max": 1, "batch_rows_max": 2}
    expected = churn(llama, paths, 3, kernels="torch", **settings)
    assert churn(llama, paths, 3, kernels="triton", **settings) == expected


def test_two_ranks_give_the_same_tokens_by_the_kernels(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "num_key_value_heads": 2}
    model_dir = make_model(tmp_path / "model", **TINY | sizes)
    paths = adapters_of(tmp_path, model_dir)[:1]
    settings = {"slots_max": 1, "batch_rows_max": 2}
    expected = churn(model_dir, paths, 2, kernels="torch", **settings)
    assert churn(model_dir, paths, 2, kernels="triton", tensor_parallel=2, **settings) == expected


def test_triton_without_a_gpu_or_its_interpreter_is_refused(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        load(llama, kernels="triton")
    assert isinstance(load(llama)._executor, GatherExecutor)


@pytest.mark.gpu
def test_on_a_gpu_graphs_and_eager_launches_give_what_torch_gives(
    model: str, tmp_path: Path, seed: int
) -> None:
    adapters = adapters_of(tmp_path, model)
    runners = [load(model, adapters, kernels="torch")]
    for captured in (False, True):
        gpu = {"device": "cuda", "kernels": "triton", "cuda_graphs": captured}
        runners.append(load(model, adapters, **gpu))
    texts = texts_of((40, 9, 1, REPORT), (1, 30, 0, GREEDY), (23, 12, 2, WARM), (17, 20, 3, WARM))
    run_both(runners, texts, random.Random(seed), chunk_max=12)


@pytest.mark.gpu
def test_on_a_gpu_launches_in_bfloat16_are_made_before_results_are_taken(
    model: str, tmp_path: Path
) -> None:
    adapters = adapters_of(tmp_path, model)
    runner = load(model, adapters, device="cuda", kernels="triton", dtype="bfloat16")
    settings = ((40, 9, 1, REPORT), (1, 30, 0, GREEDY), (23, 12, 2, WARM), (17, 20, 3, WARM))
    found = []
    for _ in range(2):
        texts = texts_of(*settings)
        run_both([runner], texts, random.Random(3), chunk_max=12)
        found.append([text.out for text in texts])
    assert found[0] == found[1]
