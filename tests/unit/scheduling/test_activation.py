"""An activated adapter changes the tokens from its invocation on, and shares the pages before."""

import random
from itertools import pairwise

import pytest

from replica.scheduling.activation import Activations
from replica.scheduling.pages import Pages
from replica.scheduling.request import NewRequest, Sampling
from replica.scheduling.scheduler import Scheduler
from replica.scheduling.timeline import Event
from tests.core import new, run, scheduler, settle

CALL = (91, 92)
CHAT = tuple(range(100, 140))
"""Two and a half pages."""


def core_of(**settings: int) -> Scheduler:
    core = scheduler(**settings)
    core.activations.register("a", CALL)
    core.activations.register("b", CALL)
    return core


def finish(core: Scheduler, name: str, digest: str | None, prompt: tuple[int, ...]) -> int:
    """Runs the request to its end. Returns how many of its prompt tokens were cached."""
    core.add(NewRequest(name, prompt, Sampling(max_tokens=2), digest), 0.0)
    cached = 0
    for step in range(20):
        _, deltas = settle(core, step * 0.05)
        for delta in deltas:
            assert delta.request_id == name and delta.error is None
            cached += delta.cached_tokens
            if delta.last:
                return cached
    raise AssertionError("it does not end")


def test_the_base_models_pages_are_shared_in_both_directions() -> None:
    core = core_of()
    called = (*CHAT, *CALL, *range(200, 240))
    assert finish(core, "base", None, (*CHAT, 150)) == 0
    assert finish(core, "first", "a", called) == 32
    assert finish(core, "again", "a", (*called, 300)) == 80, "its own pages too"
    assert finish(core, "other adapter", "b", called) == 32
    assert finish(core, "base again", None, called) == 32
    core = core_of()
    assert finish(core, "adapter", "a", called) == 0
    assert finish(core, "base", None, called) == 32
    assert finish(core, "plain", "c", called) == 0


def test_a_page_in_which_the_adapter_begins_elsewhere_is_another() -> None:
    """The second call makes the first one the base model's, in a page of the same tokens."""
    core = core_of()
    first = (*CHAT[:34], *CALL, *range(200, 211), CALL[0])
    assert len(first) == 48
    assert finish(core, "one", "a", (*first, 5, 6)) == 0
    assert finish(core, "one again", "a", (*first, 7, 6)) == 48
    assert finish(core, "two", "a", (*first, CALL[1], 5, 6)) == 32


def test_an_invocation_at_the_start_makes_all_tokens_the_adapters() -> None:
    core = core_of()
    prompt = (*CALL, *CHAT)
    assert finish(core, "base", None, prompt) == 0
    assert finish(core, "one", "a", prompt) == 0
    assert finish(core, "two", "a", prompt) == 32


def test_a_prompt_without_the_invocation_is_the_base_models() -> None:
    core = core_of()
    core.add(NewRequest("r", (*CHAT, CALL[0]), Sampling(), "a"), 0.0)
    plan, _ = run(core)
    (work,) = plan.rows
    assert work.slot == 0 and work.request.digest is None and not plan.arena_changes


def test_a_request_that_lost_its_pages_finds_those_of_the_base_model_again() -> None:
    core = core_of(pages=6)
    prompt = (*CHAT, *CALL, *range(200, 208))
    core.add(NewRequest("r", prompt, Sampling(max_tokens=30), "a"), 0.0)
    for step in range(3):
        settle(core, step * 0.05)
    core.add(new("urgent", prompt=20, max_tokens=40, priority=-1), 0.2)
    starts: list[int] = []
    for step in range(200):
        plan, _ = settle(core, 0.2 + step * 0.05)
        starts += [work.start for work in plan.rows if work.request.id == "r"]
        if not core.has_work:
            break
    assert core.timelines.counts[Event.PREEMPTED] == 1 and not core.has_work
    again = next(b for a, b in pairwise(starts) if b < a)
    assert again % 16 == 0, "from the end of a page that was still there"


def test_plain_adapters_and_forgotten_ones_are_left_as_they_are() -> None:
    activations = Activations()
    activations.register("a", CALL)
    activations.register("plain", ())
    for digest in ("plain", None, "unknown"):
        request = new("r", digest)
        assert activations.resolved(request) == (request, 0)
    activations.forget("a")
    request = new("r", "a")
    assert activations.resolved(request) == (request, 0)


def test_the_last_invocation_counts(seed: int) -> None:
    """In prompts of few different tokens, of which some look like others byte by byte."""
    draw = random.Random(seed)
    tokens = (0, 1, 256, 65536)
    for _ in range(500):
        call = tuple(draw.choices(tokens, k=draw.randint(1, 3)))
        prompt = tuple(draw.choices(tokens, k=draw.randint(1, 30)))
        activations = Activations()
        activations.register("a", call)
        request, start = activations.resolved(NewRequest("r", prompt, Sampling(), "a"))
        found = [i for i in range(len(prompt)) if prompt[i : i + len(call)] == call]
        assert (request.digest, start) == (("a", found[-1]) if found else (None, 0))


@pytest.mark.parametrize("cache", [True, False])
def test_without_a_fork_pages_are_found_as_before(cache: bool) -> None:
    pages = Pages(8, 16, cache)
    (page,) = pages.take(1) or ()
    pages.publish(None, CHAT[:16], page)
    assert pages.match(None, CHAT).pages == ((page,) if cache else ())
