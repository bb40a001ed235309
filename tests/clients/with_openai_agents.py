"""OpenAI's Agents SDK: runs over chat completions and over responses, and a stream."""

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    set_tracing_disabled,
)
from expected import ANSWERS, QUESTION, check
from openai import AsyncOpenAI

set_tracing_disabled(True)
SETTINGS = ModelSettings(temperature=0, max_tokens=64)


async def main() -> None:
    for name in ANSWERS:
        for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
            model = kind(model=name, openai_client=AsyncOpenAI())
            agent = Agent(name="asker", model=model, model_settings=SETTINGS)
            check(name, (await Runner.run(agent, QUESTION)).final_output)
            stream = Runner.run_streamed(agent, QUESTION)
            async for _ in stream.stream_events():
                pass
            check(name, stream.final_output)


asyncio.run(main())
print("runs and streams, over chat completions and responses")
