"""LangChain: invoke, stream, a batch over adapters, structured output."""

from expected import ANSWERS, BASE, QUESTION, Thing, check
from langchain_openai import ChatOpenAI

for model in ANSWERS:
    chat = ChatOpenAI(model=model, temperature=0, max_tokens=64)
    check(model, chat.invoke(QUESTION).content)
    check(model, "".join(chunk.content for chunk in chat.stream(QUESTION)))
    for message in chat.batch([QUESTION] * 4):
        check(model, message.content)
chat = ChatOpenAI(model=BASE, temperature=0)
found = chat.with_structured_output(Thing, method="json_schema").invoke(QUESTION)
assert isinstance(found, Thing)
print("invoke, stream, batch, structured output")
