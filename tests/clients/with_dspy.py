"""DSPy: calls of a model, and what its history says of them."""

import os

import dspy
from expected import ANSWERS, QUESTION, check

base = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": "none", "cache": False}
for model in ANSWERS:
    lm = dspy.LM(f"openai/{model}", temperature=0, max_tokens=64, **base)
    check(model, lm(QUESTION)[0])
    check(model, lm(messages=[{"role": "user", "content": QUESTION}])[0])
    assert all(call["usage"]["completion_tokens"] > 0 for call in lm.history)
print("calls, usage")
