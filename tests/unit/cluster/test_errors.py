"""Every error class: its HTTP status and codes, and pickling."""

import pickle

import pytest

from cluster import errors
from cluster.errors import FleetError

KINDS = sorted(
    (
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, FleetError)
    ),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_crosses_a_process_boundary_whole(kind: type[FleetError]) -> None:
    error = kind("what went wrong", field="model", retry_after_s=1.5)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.message, copy.field, copy.retry_after_s) == ("what went wrong", "model", 1.5)
    assert str(copy) == "what went wrong"


@pytest.mark.parametrize("kind", KINDS)
def test_the_trees_drawing_names_every_kind_with_its_status(kind: type[FleetError]) -> None:
    assert errors.__doc__ is not None
    (line,) = (line for line in errors.__doc__.splitlines() if kind.__name__ in line.split())
    if not issubclass(kind, errors.StartupError) and kind is not FleetError:
        assert str(kind.status) in line.split()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_a_status_and_names(kind: type[FleetError]) -> None:
    assert 400 <= kind.status <= 507
    assert kind.code and kind.type
