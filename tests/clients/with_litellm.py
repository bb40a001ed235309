"""LiteLLM: a completion, a stream, and the mapping of errors."""

import os

import litellm
from expected import ANSWERS, QUESTION, check

messages = [{"role": "user", "content": QUESTION}]
base = {"api_base": os.environ["OPENAI_BASE_URL"], "temperature": 0, "max_tokens": 64}
for model in ANSWERS:
    ask = {"model": f"openai/{model}", "messages": messages, **base}
    check(model, litellm.completion(**ask).choices[0].message.content)
    stream = litellm.completion(**ask, stream=True)
    check(model, "".join(chunk.choices[0].delta.content or "" for chunk in stream))
try:
    litellm.completion(model="openai/nobody", messages=messages, **base)
except litellm.NotFoundError:
    print("completion, stream, an unknown model")
else:
    raise AssertionError("an unknown model answered")
