"""LlamaIndex: a chat and a stream through its client for servers like OpenAI's."""

import os

from expected import ANSWERS, QUESTION, check
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

for model in ANSWERS:
    llm = OpenAILike(
        model=model,
        api_base=os.environ["OPENAI_BASE_URL"],
        is_chat_model=True,
        temperature=0,
        max_tokens=64,
    )
    messages = [ChatMessage(role="user", content=QUESTION)]
    check(model, llm.chat(messages).message.content)
    check(model, "".join(part.delta or "" for part in llm.stream_chat(messages)))
print("chat, stream")
