"""instructor: a typed answer, by JSON schema."""

import instructor
import openai
from expected import ANSWERS, QUESTION, Thing

client = instructor.from_openai(openai.OpenAI(), mode=instructor.Mode.JSON_SCHEMA)
for model in ANSWERS:
    found = client.chat.completions.create(
        model=model,
        response_model=Thing,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=64,
        max_retries=0,
    )
    assert isinstance(found, Thing)
print("a typed answer")
