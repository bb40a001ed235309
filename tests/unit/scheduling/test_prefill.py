"""A long prompt leaves an eighth of each step to shorter ones behind it."""

from collections.abc import Callable, Sequence

from replica.scheduling.plan import Work
from replica.scheduling.prefill import Prefill
from replica.scheduling.request import Phase, Request, Sampling
from tests.core import begin, new, ran, run, scheduler

STEP_TOKENS = 80


def prompt(name: str, tokens: int, priority: int = 0, begun: bool = True) -> Request:
    phase = Phase.RUNNING if begun else Phase.WAITING
    request = Request(name, (0,) * tokens, Sampling(), None, None, priority, 0.0, phase)
    request.tokens_max = tokens + 1
    return request


def crowd(step: int, count: int, tokens: int) -> list[Request]:
    return [prompt(f"{step}-{i}", tokens, begun=False) for i in range(count)]


def admit(request: Request) -> bool:
    request.become(Phase.RUNNING)
    return True


def steps(
    requests: Sequence[Request],
    count: int,
    arrive: Callable[[int], Sequence[Request]] = lambda _: (),
    keeps: bool = True,
) -> list[dict[str, int]]:
    """Tokens of each prompt in each step. arrive: new requests of a step."""
    prefill, taken = Prefill(STEP_TOKENS, keeps), []
    running, waiting = list(requests), list[Request]()
    for number in range(1, count + 1):
        waiting += arrive(number)
        running.sort(key=lambda r: r.priority)
        begun = [r for r in running if r.computed < len(r.prompt)]
        works: list[Work] = list(prefill.rows(number, STEP_TOKENS, begun, list(waiting), admit))
        running += [r for r in waiting if r.phase is Phase.RUNNING]
        waiting = [r for r in waiting if r.phase is Phase.WAITING]
        taken.append({w.request.id: w.end - w.start for w in works})
        assert sum(taken[-1].values()) <= STEP_TOKENS
    return taken


def test_a_long_prompt_alone_takes_every_step_whole() -> None:
    assert steps([prompt("long", 200)], 3) == [{"long": 80}, {"long": 80}, {"long": 40}]


def test_prompts_that_fit_go_in_order() -> None:
    assert steps([prompt("a", 60), prompt("b", 50)], 2) == [{"a": 60, "b": 20}, {"b": 30}]


def test_a_short_prompt_takes_one_step_beside_a_long_one() -> None:
    taken = steps([prompt("long", 8000), prompt("short", 70)], 2)
    assert taken == [{"short": 70, "long": 10}, {"long": 80}]


def test_the_kept_tokens_are_saved_up_to_one_step() -> None:
    long = [prompt("long", 80_000)]
    taken = steps(long, 9, lambda n: [prompt(f"s{n}", 75, begun=False)] if n in (2, 9) else [])
    assert taken[1] == {"s2": 75, "long": 5} and taken[8] == {"s9": 75, "long": 5}


def test_short_prompts_take_an_eighth_at_most() -> None:
    count = 80
    taken = steps([prompt("long", 80_000)], count, lambda n: crowd(n, 4, 10))
    long = sum(step["long"] for step in taken)
    assert long >= count * STEP_TOKENS * 7 / 8 - STEP_TOKENS
    assert all(sum(step.values()) == STEP_TOKENS for step in taken)


def test_a_prompt_of_about_the_same_length_waits_for_the_long_one() -> None:
    taken = steps([prompt("first", 800), prompt("second", 500), prompt("new", 500, begun=False)], 9)
    assert all(step == {"first": STEP_TOKENS} for step in taken)


def test_a_prompt_too_long_for_the_kept_tokens_yields_to_those_that_fit() -> None:
    requests = [prompt("long", 80_000), prompt("middle", 2000)]
    taken = steps(requests, 10, lambda n: [prompt("short", 10, begun=False)] if n == 5 else [])
    assert taken[3] == {"long": 70, "middle": 10}
    assert taken[4] == {"long": 70, "short": 10}
    assert taken[5] == {"long": 70, "middle": 10}


def test_of_the_prompts_that_do_not_fit_the_shortest_goes_first() -> None:
    requests = [prompt("long", 80_000), prompt("middle", 2000)]
    taken = steps(requests, 10, lambda n: [prompt("short", 20, begun=False)] if n == 5 else [])
    assert taken[4] == taken[5] == {"long": 70, "short": 10}
    assert taken[6] == {"long": 70, "middle": 10}


def test_requests_too_long_for_the_kept_tokens_do_not_fill_the_batch() -> None:
    admitted: list[str] = []

    def count(request: Request) -> bool:
        admitted.append(request.id)
        return admit(request)

    prefill, long = Prefill(STEP_TOKENS, keeps=True), prompt("long", 80_000)
    list(prefill.rows(1, STEP_TOKENS, [long], crowd(1, 20, 900), count))
    assert admitted == ["1-0"]


def test_an_urgent_prompt_passes_less_urgent_ones() -> None:
    """A hundred steps of this prompt would come first."""
    taken = steps(
        [prompt("long", 8000)], 4, lambda n: [prompt("u", 200, -1, begun=False)] if n == 2 else []
    )
    assert taken == [{"long": 80}, {"u": 80}, {"u": 80}, {"u": 40, "long": 40}]


def test_an_urgent_long_prompt_leaves_nothing_to_less_urgent_ones() -> None:
    taken = steps([prompt("long", 8000), prompt("short", 10, 1)], 2)
    assert taken == [{"long": 80}, {"long": 80}]


def test_without_keeping_a_long_prompt_takes_whole_steps() -> None:
    taken = steps([prompt("long", 8000), prompt("short", 10)], 3, keeps=False)
    assert all(step == {"long": STEP_TOKENS} for step in taken)


def test_a_base_request_does_not_wait_for_a_long_prompt() -> None:
    core = scheduler(tokens=64, context=2048, pages=256)
    begin(core, new("long", "a", prompt=1600))
    core.add(new("short", prompt=20, max_tokens=1), 0.0)
    plan, deltas = run(core)
    assert ran(plan) == ["short", "long"] and [d.request_id for d in deltas] == ["short"]
