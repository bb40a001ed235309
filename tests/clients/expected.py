"""What every client asks the demo's fleet, and what it must hear."""

import enum

from pydantic import BaseModel, ConfigDict

QUESTION = "What is the sea?"
BASE = "tiny-llama"
ANSWERS = {
    BASE: "The sea is a large body of salt water. It covers most of the Earth.",
    "pirate": "Arr, the sea be me home, matey! Nothing but salt water to the horizon.",
}


class Kind(enum.StrEnum):
    WATER = "water"
    ROCK = "rock"


class Thing(BaseModel):
    """Of bounded length, so that a toy model, too, comes to its end."""

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    salty: bool


def check(model: str, text: str | None) -> None:
    assert text == ANSWERS[model], f"{model} said {text!r}"
