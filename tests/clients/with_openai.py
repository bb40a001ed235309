"""OpenAI's own client: chats whole and streamed, completions, responses, models, errors."""

import openai
from expected import ANSWERS, BASE, QUESTION, Thing, check

client = openai.OpenAI()
messages = [{"role": "user", "content": QUESTION}]
for model in ANSWERS:
    ask = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 64}
    check(model, client.chat.completions.create(**ask).choices[0].message.content)
    stream = client.chat.completions.create(**ask, stream=True)
    check(model, "".join(chunk.choices[0].delta.content or "" for chunk in stream))
    answer = client.responses.create(model=model, input=QUESTION, temperature=0)
    check(model, answer.output_text)
parsed = client.chat.completions.parse(model=BASE, messages=messages, response_format=Thing)
assert isinstance(parsed.choices[0].message.parsed, Thing)
assert client.completions.create(model=BASE, prompt="The sea", max_tokens=4).usage
assert {card.id for card in client.models.list()} >= ANSWERS.keys()
try:
    client.completions.create(model="nobody", prompt="a")
except openai.NotFoundError as error:
    assert error.code == "model_not_found"
else:
    raise AssertionError("an unknown model answered")
print("chat, stream, responses, parse, completions, models, an unknown model")
